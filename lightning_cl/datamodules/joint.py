"""Everything at once: the upper bound of a stream."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from lightning_cl.datamodules.labels import known_classes
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.tasks import Task, TaskDataset
from lightning_cl.tasks.stream import DataSplit


class Joint(TaskSequence):
    """Train on the data of all tasks as one task: what continual methods are compared with.

    Args:
        base: Any DataModule.
        **options: Those of `TaskSequence`; with one task, those about several make no difference.

    Example::

        >>> from lightning_cl.datamodules import Digits
        >>> Joint(Digits()).num_tasks
        1
    """

    def __init__(self, base: LightningDataModule, **options: Any) -> None:
        super().__init__([base], **options)

    @override
    def define_tasks(self) -> Sequence[Task]:
        return [Task(0, "all classes", known_classes(self.task_data(0, "train")))]

    @override
    def task_data(self, task: int, split: DataSplit) -> TaskDataset | None:
        return self.base_of(task).task_dataset(split)
