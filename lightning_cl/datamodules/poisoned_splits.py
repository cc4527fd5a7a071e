"""The task data of a sequence, with some tasks poisoned."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cl.datamodules.image_pixels import pixels_of
from lightning_cl.datamodules.labels import labels_of_task
from lightning_cl.datamodules.poison import Poison
from lightning_cl.datamodules.poisoned_dataset import PixelPoison, PoisonedBatches, PoisonedDataset, poison_dataset
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.reporting.contact_sheet import SheetRow
from lightning_cl.tasks import TaskDataset
from lightning_cl.tasks.random_state import forked_cpu_generators
from lightning_cl.tasks.stream import DataSplit

_CHECKED_SAMPLES = 8  # of each corruption
_SHEET_ROWS, _SHEET_PAIRS = 6, 4


class PoisonedSplit(NamedTuple):
    """One split of one poisoned task.

    Args:
        source: The clean data set.
        indices: The task's positions in it, ``(samples,)``.
        seed: Seed of the choices.
        dataset: The poisoned data set, with the same positions.
        labels: Class of each sample of the task, ``(samples,)``.
        assignment: Corruptions of each class that is poisoned.
        kinds: Which of the poison's corruptions each sample has, -1 for none, ``(samples,)``.
    """

    source: Dataset[Any]
    indices: Tensor
    seed: int
    dataset: Dataset[Any]
    labels: Tensor
    assignment: dict[int, tuple[str, ...]]
    kinds: Tensor

    def is_of(self, data: TaskDataset, seed: int) -> bool:
        """Whether this is the poison of some data."""
        return self.seed == seed and self.source is data.dataset and torch.equal(self.indices, data.indices)


class PoisonedSplits:
    """Stands in a sequence for its `task_data`, and poisons what that returns.

    Args:
        sequence: The sequence. It is changed.
        poisons: How which tasks are poisoned.
    """

    def __init__(self, sequence: TaskSequence, poisons: tuple[Poison, ...]) -> None:
        self.sequence = sequence
        self._poisons = {poison.task: poison for poison in poisons}
        self._known: dict[tuple[int, DataSplit], PoisonedSplit] = {}
        sequence.task_data = self  # type: ignore[method-assign]

    def __call__(self, task: int, split: DataSplit) -> TaskDataset | None:
        """Return the data of one task, or ``None`` if there is no such split."""
        data = self._clean(task, split)
        found = self.find(task, split)
        if data is None or found is None:
            return data
        return TaskDataset(found.dataset, data.indices, data.collate_fn, data.transform)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # found again where they are needed

    def find(self, task: int, split: DataSplit) -> PoisonedSplit | None:
        """Return a split, or ``None`` if it is not poisoned or not there.

        Raises:
            MisconfigurationException: If its samples have no class labels or no images.
        """
        poison = self._poisons.get(task)
        data = None if poison is None or split == "test" else self._clean(task, split)
        if poison is None or data is None:
            return None
        seed = self.sequence.seed if poison.seed is None else poison.seed
        known = self._known.get((task, split))
        if known is None or not known.is_of(data, seed):
            known = self._known[task, split] = self._poison(poison, data, split, seed)
        return known

    def check(self, task: int) -> None:
        """Refuse a task that cannot be poisoned, before it is trained on.

        Raises:
            MisconfigurationException: If its samples have no class labels or no images.
        """
        for split in ("train", "val"):
            found = self.find(task, split)
            if found is None:
                continue
            if split == "train" and bool((found.kinds < 0).all()):
                rank_zero_warn(f"Nothing of task {task} is poisoned: see `severity` and `samples`.")
            try:
                self._check_images(task, found, report=split == "train")
            except ValueError as error:
                raise _cannot_be_poisoned(task, error) from None

    def _check_images(self, task: int, split: PoisonedSplit, report: bool) -> None:
        poison = self._poisons[task]
        for kind, name in enumerate(poison.corruptions):
            some = (split.kinds == kind).nonzero().squeeze(1)[:_CHECKED_SAMPLES]
            pairs = self._pairs(split, some)
            if report and pairs and all(torch.equal(before, after) for before, after in pairs):
                size = "x".join(map(str, pairs[0][0].shape[1:]))
                rank_zero_warn(
                    f"`{name}` at `severity={poison.severity}` leaves images of {size} pixels, such as task {task} has,"
                    " as they are. Choose another `corruption`."
                )
        if isinstance(split.dataset, PoisonedBatches):
            split.dataset.prepare()

    def examples(self, task: int) -> list[SheetRow]:
        """Return a few images of each of a few classes, before and after."""
        found = self.find(task, "train")
        if found is None:
            return []
        rows = []
        for label in sorted(found.assignment):
            kinds = torch.where(found.labels == label, found.kinds, -1)
            for kind in sorted(set(kinds.tolist()) - {-1}):
                members = (kinds == kind).nonzero().squeeze(1)[:_SHEET_PAIRS]
                rows.append(SheetRow(label, self._poisons[task].corruptions[kind], self._pairs(found, members)))
        return rows[:_SHEET_ROWS]

    def _pairs(self, split: PoisonedSplit, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
        with forked_cpu_generators():
            return [self._pair(split, position) for position in split.indices[chosen].tolist()]

    def _pair(self, split: PoisonedSplit, position: int) -> tuple[Tensor, Tensor]:
        if isinstance(split.dataset, PoisonedDataset):
            before, after = split.dataset.before_and_after(position)
        else:
            find = self.sequence.structure.find_inputs
            before, after = find(split.source[position]), find(split.dataset[position])
        return pixels_of(before), pixels_of(after)

    def _poison(self, poison: Poison, data: TaskDataset, split: DataSplit, seed: int) -> PoisonedSplit:
        source: Dataset[Any] = data.dataset
        labels = self._labels(poison.task, data)
        train = None if split == "train" else self.find(poison.task, "train")
        # a split may lack some of the classes
        assignment = poison.assign(sorted(set(labels.tolist())), seed) if train is None else train.assignment
        kinds = poison.choose(labels, data.indices, assignment, seed)
        dataset = source
        if bool((kinds >= 0).any()):
            of_all = torch.full((len(source),), -1, dtype=torch.int8)  # type: ignore[arg-type]
            of_all[data.indices] = kinds.to(torch.int8)
            pixels = PixelPoison(of_all, poison.corruptions, poison.severity, seed)
            try:
                dataset = poison_dataset(source, pixels, self.sequence.structure)
            except ValueError as error:
                raise _cannot_be_poisoned(poison.task, error) from None
        return PoisonedSplit(source, data.indices, seed, dataset, labels, assignment, kinds)

    def _labels(self, task: int, data: TaskDataset) -> Tensor:
        try:
            labels = labels_of_task(data, self.sequence.structure, read=True)
        except ValueError as error:
            raise _cannot_be_poisoned(task, error) from None
        return torch.zeros(0, dtype=torch.long) if labels is None else labels

    def _clean(self, task: int, split: DataSplit) -> TaskDataset | None:
        return type(self.sequence).task_data(self.sequence, task, split)


def _cannot_be_poisoned(task: int, error: ValueError) -> MisconfigurationException:
    return MisconfigurationException(f"Task {task} cannot be poisoned by `PoisonedTask`. {error}")
