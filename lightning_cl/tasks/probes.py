"""Fixed samples that stay on the device, to look at a network again and again."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_cl.hashing import mix, mix_each
from lightning_cl.tasks.batches import as_labels, join_rows, take_rows
from lightning_cl.tasks.evaluation import evaluating, sample_batches
from lightning_cl.tasks.stream import DataSplit, ReplayStream

_CHUNK_BYTES = 1 << 26


class Chunk(NamedTuple):
    """Some samples as one batch.

    Args:
        batch: The batch, on the device.
        labels: The class of each sample.
        tasks: The task of each sample.
    """

    batch: Any
    labels: Tensor
    tasks: Tensor


class Probes:
    """Samples of several tasks, each rank's share of them in as few batches as is sensible.

    Which samples they are is a function of the seed, and of nothing else: they are the same in every run, on any number
    of ranks and after a resume.
    """

    def __init__(self) -> None:
        self._parts: dict[int, list[Chunk]] = {}
        self._joined: list[Chunk] | None = None
        self._clones = True  # until a call has left its input alone

    def __contains__(self, task: int) -> bool:
        return task in self._parts

    def fetch(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stream: ReplayStream,
        task: int,
        indices: Tensor,
        split: DataSplit,
    ) -> None:
        """Fetch this rank's share of some samples of a task, as an evaluation sees them; to be called on all ranks."""
        chunks = []
        with evaluating(trainer, pl_module):
            for ids, batch in sample_batches(trainer, pl_module, stream, task, indices, split):
                labels = as_labels(stream.structure.find_targets(batch))
                if len(labels) != len(ids):
                    raise ValueError(
                        f"{len(ids)} samples of task {task} gave {len(labels)} rows. Let the collate function and the"
                        " DataModule's transfer hooks keep one row per sample."
                    )
                chunks.append(Chunk(batch, labels, torch.full_like(labels, task)))
        self._parts[task] = chunks
        self._joined = None

    @property
    def chunks(self) -> list[Chunk]:
        """The samples of all tasks in few batches."""
        if self._joined is None:
            parts = [chunk for task in sorted(self._parts) for chunk in self._parts[task]]
            self._joined = list(_join(parts))
        return self._joined

    def call(self, function: Callable[[Any], Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what a function returns for each batch, with the labels and tasks of its rows.

        A module may change its input, or take the batch apart: the samples stay as they are. A batch that is too much
        for the device is halved, for good.
        """
        position = 0
        while position < len(self.chunks):
            batch, labels, tasks = self.chunks[position]
            try:
                output = self._output(function, batch)
            except torch.cuda.OutOfMemoryError:
                if len(labels) < 2:
                    raise
                self.chunks[position : position + 1] = _halves(self.chunks[position])
                continue
            yield output, labels, tasks
            position += 1

    def _output(self, function: Callable[[Any], Tensor], batch: Any) -> Tensor:
        tensors: list[Tensor] = []

        def give(tensor: Tensor) -> Tensor:
            tensors.append(tensor.clone() if self._clones else tensor)
            return tensors[-1]

        handed = apply_to_collection(batch, Tensor, give)
        before = [tensor._version for tensor in tensors]
        output = function(handed)
        if self._clones:
            self._clones = [tensor._version for tensor in tensors] != before
        return output


def choose(count: int, samples: int, seed: int, task: int) -> Tensor:
    """Return the positions of ``count`` of a task's samples, ascending, drawn by their keys."""
    keys = mix_each((mix(seed, task),), torch.arange(samples))
    return keys.argsort()[:count].sort().values


def _join(parts: list[Chunk]) -> Iterator[Chunk]:
    group: list[Chunk] = []
    size = 0
    for part in parts:
        more = _bytes_of(part.batch)
        if group and size + more > _CHUNK_BYTES:
            yield from _joined(group)
            group, size = [], 0
        group.append(part)
        size += more
    if group:
        yield from _joined(group)


def _halves(chunk: Chunk) -> list[Chunk]:
    count = len(chunk.labels)
    halves = slice(count // 2), slice(count // 2, None)
    return [Chunk(take_rows(chunk.batch, rows, count), chunk.labels[rows], chunk.tasks[rows]) for rows in halves]


def _bytes_of(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, (Mapping, list, tuple)):
        return sum(map(_bytes_of, batch.values() if isinstance(batch, Mapping) else batch))
    return 0


def _joined(group: list[Chunk]) -> list[Chunk]:
    try:
        batch = join_rows([chunk.batch for chunk in group], [len(chunk.labels) for chunk in group])
    except ValueError:  # tasks of different shapes stay apart
        return group
    return [Chunk(batch, torch.cat([c.labels for c in group]), torch.cat([c.tasks for c in group]))]
