"""Which samples make up each batch: a pure function of seed, task, attempt, epoch and step, cut by rank."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from lightning_cl.hashing import mix


class Replayed(NamedTuple):
    """The past samples of one batch of one rank.

    Args:
        key: Seed of this step; together with task and sample it seeds the random transforms of that sample.
        slots: Positions of the samples in the memory.
        samples: Task and positions in its data, in the order of the slots.
    """

    key: int
    slots: list[int]
    samples: list[tuple[int, list[int]]]


class Draw(NamedTuple):
    """The order for one batch of one rank, as it travels to the data set (and into loader workers).

    Args:
        part: Which of the loader's data sets the samples come from.
        key: Seed of this epoch; together with a sample's id it seeds the random transforms of that sample.
        ids: Positions of the samples in their data set.
        replayed: Past samples, whose rows follow those of ``ids``.
        offered: Positions of all ranks' samples of this step that the memory is to learn from it.
    """

    part: int
    key: int
    ids: list[int]
    replayed: Replayed | None = None
    offered: list[int] | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.ids) + (0 if self.replayed is None else len(self.replayed.slots))


class Cursor(NamedTuple):
    """Where the run stands: looked up when the first batch is asked for, thus after any restore.

    Args:
        attempt: How often the task was begun again.
        epoch: Epoch inside the attempt.
        step: Batches of that epoch that are consumed already.
    """

    attempt: int = 0
    epoch: int = 0
    step: int = 0


def batches_per_epoch(num_samples: int, global_batch: int, num_replicas: int, drop_last: bool) -> int:
    """Count the steps of one epoch over all ranks.

    The last batch may be short, and is then shared out as evenly as it goes. A rest smaller than the number of
    ranks would leave ranks without a sample, so it joins the batch before it.
    """
    full, rest = divmod(num_samples, global_batch)
    if rest == 0 or drop_last:
        return full
    return full if rest < num_replicas and full else full + 1


class TaskSampler(DistributedSampler[int]):
    """Hand out the batches of one task, or of several tasks one after another, to one rank.

    It yields whole batches (`Draw`), for a loader with ``batch_size=None``. What it yields depends neither on global
    random state nor on workers nor on what was iterated before, so any position can be taken up again, and every
    number of ranks sees the same samples at each step of an equal global batch. Being a `DistributedSampler`, it is
    left in place by Lightning.

    Args:
        parts: The data sets, one after another; batches do not cross from one to the next.
        batch_size: Samples of a batch on each rank.
        num_replicas: Number of ranks.
        rank: This rank.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether a short last batch is left out.
        seed: Seed of the stream.
        stream_key: Tells tasks apart that share a seed: the task's index.
        cursor: Returns where the run stands; without it iteration starts at the epoch given to `set_epoch`.

    Attributes:
        issued: Where a pass notes the draws that it yields, if a loader wants to know them.

    Raises:
        ValueError: If a data set has fewer samples than there are ranks, or ``drop_last`` leaves no batch.

    Example::

        >>> sampler = TaskSampler([range(5)], batch_size=2, shuffle=False)
        >>> [draw.ids for draw in sampler]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        parts: Sequence["Dataset[object] | Sequence[object]"],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        stream_key: int = 0,
        cursor: Callable[[], Cursor] | None = None,
    ) -> None:
        # the parent only asks the data set for its length, which this class never uses
        super().__init__(parts[0], num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.stream_key = stream_key
        self.global_batch = batch_size * num_replicas
        self._lengths = [len(part) for part in parts]  # type: ignore[arg-type]
        self.issued: deque[Draw] | None = None
        self._cursor = cursor
        self._batches = [batches_per_epoch(n, self.global_batch, num_replicas, drop_last) for n in self._lengths]
        for length, batches in zip(self._lengths, self._batches, strict=True):
            if length < num_replicas:
                raise ValueError(
                    f"A task has {length} samples for {num_replicas} ranks, so some ranks would have nothing to do."
                    f" Use at most {length} devices, or fewer and larger tasks."
                )
            if batches == 0:
                raise ValueError(
                    f"`drop_last=True` leaves no batch of a task: it has {length} samples, the global batch is"
                    f" {self.global_batch} ({num_replicas} x {batch_size}). Use a smaller `batch_size`, or"
                    " `drop_last=False`."
                )

    @override
    def __len__(self) -> int:
        return sum(self._batches)

    @override
    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        cursor = self._cursor() if self._cursor is not None else Cursor(epoch=self.epoch)
        draw, issued = self.start_pass(cursor), self.issued
        skip = cursor.step
        for part, batches in enumerate(self._batches):
            if skip >= batches:
                skip -= batches
                continue
            key = mix(self.seed, self.stream_key, part, cursor.attempt, cursor.epoch)
            order = self._order(self._lengths[part], key)
            for step in range(skip, batches):
                order_of_step = draw(part, key, step, self._batch(order, step, last=step == batches - 1))
                if issued is not None:
                    issued.append(order_of_step)
                yield order_of_step
            skip = 0

    def start_pass(self, cursor: Cursor) -> Callable[[int, int, int, Sequence[int]], Draw]:
        """Return what makes the draws of one pass: of part, key of the epoch, step and the samples of all ranks."""
        return lambda part, key, step, batch: Draw(part, key, self.share(batch))

    def share(self, batch: Sequence[int]) -> list[int]:
        """Return this rank's share of a batch; the first ranks have one sample more where it does not divide."""
        share, rest = divmod(len(batch), self.num_replicas)
        start = self.rank * share + min(self.rank, rest)
        return list(batch[start : start + share + (self.rank < rest)])

    def _order(self, length: int, key: int) -> Sequence[int]:
        if not self.shuffle:
            return range(length)
        order: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(key)).tolist()
        return order

    def _batch(self, order: Sequence[int], step: int, last: bool) -> Sequence[int]:
        start = step * self.global_batch
        return order[start : len(order) if last and not self.drop_last else start + self.global_batch]
