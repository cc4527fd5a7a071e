"""A loader that starts where the run stands, and the data set behind it."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, StackDataset, Subset, TensorDataset, default_collate
from typing_extensions import override

from lightning_cl.hashing import mix, mix_each
from lightning_cl.tasks.batches import BatchStructure, join_rows, kind_of, replace_part
from lightning_cl.tasks.random_state import (
    forked_cpu_generators,
    python_and_numpy_states,
    seed_generators,
    seed_torch_generator,
)
from lightning_cl.tasks.sampler import Draw, Replayed, TaskSampler


def flatten_subsets(dataset: Dataset[Any]) -> tuple[Dataset[Any], Tensor]:
    """Look through nested `Subset`s (``random_split`` makes them): the data set inside, and the positions in it."""
    indices = torch.arange(len(dataset))  # type: ignore[arg-type]
    while type(dataset) is Subset:
        # an empty list would become floats
        indices = torch.as_tensor(dataset.indices, dtype=torch.long)[indices]
        dataset = dataset.dataset
    return dataset, indices


def only_passes_on(dataset: Dataset[Any]) -> bool:
    """Whether a data set fetches many samples at once only by asking for one after another."""
    # torch's own containers ask sample by sample inside their `__getitems__`, where no sample can be seeded
    return getattr(type(dataset), "__getitems__", None) in (Subset.__getitems__, StackDataset.__getitems__)


class InputTransform:
    """A transform of the inputs of a sample, wherever the sample has them.

    Args:
        transform: Takes the inputs and gives new ones. If it has a true attribute ``batched``, it also takes many at
            once, along a leading dimension.
        structure: Where a sample has its inputs.
    """

    def __init__(self, transform: Callable[[Any], Any], structure: BatchStructure) -> None:
        self.transform = transform
        self.structure = structure

    def of_sample(self, sample: Any) -> Any:
        """Return a sample with its inputs transformed."""
        inputs = self.structure.find_inputs(sample)
        return replace_part(sample, inputs, self.transform(inputs))

    def of_samples(self, samples: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        """Return samples with their inputs transformed, each under its own seed."""
        transformed = []
        for sample, seed in zip(samples, seeds, strict=True):
            seed_generators(seed)
            transformed.append(self.of_sample(sample))
        return transformed

    def of_batch(self, batch: Any, seeds: Sequence[int]) -> Any:
        """Return a collated batch with the inputs of each sample transformed, each under its own seed."""
        inputs = self.structure.find_inputs(batch)
        # of a batch of vectors the last two dimensions are no image, but samples and features
        if getattr(self.transform, "batched", False) and inputs.ndim > 2:
            return replace_part(batch, inputs, self.transform(inputs))
        rows = []
        for row, seed in zip(inputs, seeds, strict=True):
            seed_generators(seed)
            rows.append(torch.as_tensor(self.transform(row)))
        return replace_part(batch, inputs, torch.stack(rows))


class TaskDataset(Dataset[Any]):
    """The samples of one task: positions in a data set, fetched and collated a batch at a time.

    Random transforms are seeded for each sample from its place in the stream, and leave the global generators as they
    were: a sample looks the same whichever rank, worker or resumed run fetches it. A data set that fetches many
    samples at once (``__getitems__``) is asked, and seeded, once a batch: there the draws depend on which samples share
    a batch on a rank. With a true attribute ``deterministic`` it is spared the seeding, and gets the positions as a
    tensor.

    Args:
        dataset: The base's data set.
        indices: The task's positions in it; all by default.
        collate_fn: Makes a batch of a list of samples.
        transform: Applied to each sample after the data set's own transforms.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Tensor | None = None,
        collate_fn: Callable[[Any], Any] = default_collate,
        transform: InputTransform | None = None,
    ) -> None:
        self.dataset, positions = flatten_subsets(dataset)
        self.indices = positions if indices is None else positions[indices]
        self.collate_fn = collate_fn
        self.transform = transform
        self._seeds_torch_alone = True  # until a sample draws from another generator

    def __len__(self) -> int:
        return len(self.indices)

    @override
    def __getitem__(self, draw: Draw) -> Any:
        return fetch([Rows(self, draw.key, draw.ids)])

    def at_once(self, positions: Tensor) -> Any:
        """Return a collated batch of a data set that draws nothing, by one index; ``None`` of any other."""
        if self.transform is None:
            if getattr(self.dataset, "deterministic", False) and hasattr(self.dataset, "__getitems__"):
                return self.collate_fn(self.dataset.__getitems__(positions))
            if type(self.dataset) is TensorDataset and self.collate_fn is default_collate:
                return [tensor[positions] for tensor in self.dataset.tensors]
        return None

    def has_source_of(self, other: "TaskDataset") -> bool:
        """Return whether the samples come out of the same data set in the same way."""
        return (
            self.dataset is other.dataset and self.transform is other.transform and self.collate_fn == other.collate_fn
        )

    def samples(self, indices: list[int], seeds: list[int]) -> Any:
        """Return samples, or the collated batch that a data set makes of them, each under its own seed."""
        fetch = None if only_passes_on(self.dataset) else getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return self._each(indices, seeds)
        seed_generators(seeds[0])
        samples = fetch(indices)
        if self.transform is None:
            return samples
        if isinstance(samples, list):
            return self.transform.of_samples(samples, seeds)
        return self.transform.of_batch(samples, seeds)

    def _each(self, indices: list[int], seeds: list[int]) -> list[Any]:
        if self._seeds_torch_alone:
            before = python_and_numpy_states()
            samples = [
                self._sample(index, seed, seed_torch_generator) for index, seed in zip(indices, seeds, strict=True)
            ]
            if python_and_numpy_states() == before:
                return samples
            self._seeds_torch_alone = False  # and these samples are made once more
        return [self._sample(index, seed, seed_generators) for index, seed in zip(indices, seeds, strict=True)]

    def _sample(self, index: int, seed: int, seed_with: Callable[[int], None]) -> Any:
        seed_with(seed)
        sample = self.dataset[index]
        return sample if self.transform is None else self.transform.of_sample(sample)


class Rows(NamedTuple):
    """Some rows of a batch.

    Args:
        data: Where their samples come from.
        key: Seeds, together with a sample's place in its data set, the random transforms of that sample.
        ids: Positions of the samples in ``data``.
    """

    data: TaskDataset
    key: int
    ids: list[int]


def fetch(parts: Sequence[Rows]) -> Any:
    """Return one collated batch of the rows of several parts."""
    # by way of numpy, since indexing a tensor with a list costs ten times as much
    positions = [part.data.indices[torch.from_numpy(np.asarray(part.ids))] for part in parts]
    first = parts[0].data
    alike = all(part.data.has_source_of(first) for part in parts[1:])
    if alike:
        batch = first.at_once(positions[0] if len(parts) == 1 else torch.cat(positions))
        if batch is not None:
            return batch
    with forked_cpu_generators():
        seeds = [mix_each((part.key,), at).tolist() for part, at in zip(parts, positions, strict=True)]
        if alike:
            return first.collate_fn(first.samples(torch.cat(positions).tolist(), [s for some in seeds for s in some]))
        samples = [part.data.samples(at.tolist(), some) for part, at, some in zip(parts, positions, seeds, strict=True)]
        if _collate_together(parts, samples):
            return first.collate_fn([sample for some in samples for sample in some])
        batches = [part.data.collate_fn(some) for part, some in zip(parts, samples, strict=True)]
        return join_rows(batches, [len(part.ids) for part in parts])


def _collate_together(parts: Sequence[Rows], samples: Sequence[Any]) -> bool:
    # one call lets a collate function pad all rows to one length, but it cannot mix samples of different kinds
    return (
        all(isinstance(some, list) for some in samples)
        and all(part.data.collate_fn == parts[0].data.collate_fn for part in parts)
        and len({kind_of(some[0]) for some in samples}) == 1
    )


class _JoinedTasks(Dataset[Any]):
    def __init__(self, parts: Sequence[TaskDataset], past: Mapping[int, TaskDataset]) -> None:
        self.parts = list(parts)
        self.past = past

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @override
    def __getitem__(self, draw: Draw) -> Any:
        rows = [Rows(self.parts[draw.part], draw.key, draw.ids)] if draw.ids else []
        key, _, samples = draw.replayed or Replayed(0, [], [])
        return fetch(rows + [Rows(self.past[task], mix(key, task), ids) for task, ids in samples])


def as_it_is(batch: Any) -> Any:
    """Collate a batch that is one already."""
    return batch


class TaskLoader(DataLoader[Any]):
    """A `DataLoader` over task data whose position is looked up when its first batch is asked for.

    Lightning makes iterators early (before a checkpoint's loops are restored) and twice; here that costs nothing and
    fixes nothing, because workers start, and the sampler reads its position, with the first batch. The loader has a
    generator of its own, so that starting workers draws nothing from the global one.

    Args:
        parts: Task data, one after another.
        sampler: Says which samples each batch has.
        on_draw: Called with the `Draw` behind each batch just before the batch is handed out.
        past: Where replayed samples come from, by task.
        **settings: ``num_workers``, ``pin_memory`` and the other arguments of `DataLoader` that do not choose samples.
    """

    def __init__(
        self,
        parts: Sequence[TaskDataset],
        sampler: TaskSampler,
        on_draw: Callable[[Draw], None] | None = None,
        past: Mapping[int, TaskDataset] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            _JoinedTasks(parts, past or {}),
            batch_size=None,
            sampler=sampler,
            collate_fn=as_it_is,
            generator=torch.Generator().manual_seed(mix(sampler.seed, sampler.stream_key)),
            **settings,
        )
        self._on_draw = on_draw
        self._task_sampler = sampler

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator: nothing of this runs before the first `next`
        if self._on_draw is None:
            yield from super().__iter__()
            return
        # workers run ahead of the batch that is handed out, in the order of the draws
        issued: deque[Draw] = deque()
        self._task_sampler.issued = issued
        for batch in super().__iter__():
            self._on_draw(issued.popleft())
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is a function of the Trainer's progress. Its presence says "resumable"."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept what `state_dict` returned."""
