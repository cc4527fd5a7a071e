"""The same classes under changing conditions."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from lightning_cl.datamodules.labels import known_classes
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.tasks import Task, TaskDataset
from lightning_cl.tasks.loader import InputTransform
from lightning_cl.tasks.stream import DataSplit


class DomainIncremental(TaskSequence):
    """Make one task of each transform: all the data, seen through it (permuted, rotated, corrupted ...).

    Args:
        base: Any DataModule.
        transforms: One for each task, applied to the inputs of every sample after the data set's own transforms;
            ``None`` leaves them as they are. `Permute`, `Rotate`, or any callable.
        **options: Those of `TaskSequence`: ``epochs_per_task``, ``reset_optimizer``, ``eval_tasks``, ``eval_loaders``,
            ``shuffle``, ``val_fraction``, ``eval_transform``, ``inputs``, ``target_key``, ``seed``.

    Raises:
        ValueError: If there is no transform.

    Example::

        >>> from lightning_cl.datamodules import Digits, Rotate
        >>> [t.name for t in DomainIncremental(Digits(), transforms=[None, Rotate(90)]).tasks]
        ['unchanged', 'Rotate(degrees=90)']
    """

    def __init__(
        self,
        base: LightningDataModule,
        transforms: list[Callable[..., Any] | None],
        **options: Any,
    ) -> None:
        if not transforms:
            raise ValueError("`transforms` must have one entry for each task, got an empty list.")
        for transform in transforms:
            if transform is not None and not callable(transform):
                raise TypeError(f"`transforms` must be callables or None, got {transform!r}.")
        self.transforms = transforms
        super().__init__([base], **options)

    @override
    def define_tasks(self) -> Sequence[Task]:
        classes = known_classes(self.base_of(0).task_dataset("train"))
        return [Task(index, _name(transform), classes) for index, transform in enumerate(self.transforms)]

    @override
    def task_data(self, task: int, split: DataSplit) -> TaskDataset | None:
        transform = self.transforms[task]
        applied = None if transform is None else InputTransform(transform, self.structure)
        return self.base_of(task).task_dataset(split, transform=applied)


def _name(transform: Callable[..., Any] | None) -> str:
    if transform is None:
        return "unchanged"
    if hasattr(transform, "__name__"):
        return str(transform.__name__)
    kind: Any = type(transform)
    return kind.__name__ if kind.__repr__ is object.__repr__ else repr(transform)
