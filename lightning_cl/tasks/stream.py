"""What the task clock and the observers need of a task sequence."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_cl.tasks.batches import BatchStructure
from lightning_cl.tasks.loader import TaskDataset
from lightning_cl.tasks.replay_plan import ReplayPlan
from lightning_cl.tasks.sampler import Draw
from lightning_cl.tasks.task import Task

Split = Literal["val", "test"]
DataSplit = Literal["train", "val", "test"]


@runtime_checkable
class TaskStream(Protocol):
    """A sequence of tasks, as the task clock sees it. `TaskSequence` is one; `SingleTask` wraps an ordinary fit."""

    reset_optimizer: bool

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks in their order."""

    @property
    def checkpoint_key(self) -> str:
        """Under which name a checkpoint has its state."""

    @property
    def structure(self) -> BatchStructure:
        """Where inputs and targets stand in a batch."""

    def epochs_of(self, task: int) -> int | None:
        """Return the epochs of a task, or ``None`` for those of ``Trainer(max_epochs=...)``."""

    def batches_of(self, task: int) -> int | None:
        """Return the training batches of an epoch of a task on this rank, or ``None`` if unknown."""

    @property
    def evaluates_tasks_apart(self) -> bool:
        """Whether validation has a loader for each task."""

    def served_tasks(self, split: Split) -> Sequence[int]:
        """Return the tasks that the loaders of a split serve now, in their order; a task without data has none."""

    def enter_task(self, task: int) -> None:
        """Make a task the current one."""

    def evaluation_loader(self, task: int, split: Split) -> Iterable[Any] | None:
        """Return a loader over one task's evaluation set, or ``None`` if there is none."""


@runtime_checkable
class ReplayStream(TaskStream, Protocol):
    """A stream whose training samples can be asked for again. `TaskSequence` is one."""

    seed: int
    replay: ReplayPlan | None
    training_draw: Draw | None
    training_rows: int | None

    @property
    def current_task(self) -> Task:
        """The task that is trained now, or was last."""

    @property
    def replay_rows(self) -> Tensor | None:
        """Which rows of the current training batch are replayed; ``None`` where nothing replays."""

    @property
    def num_classes(self) -> int | None:
        """How many outputs the labels need; ``None`` where tasks have no classes."""

    def samples_of(self, task: int, split: DataSplit = "train") -> int | None:
        """Return the number of a task's samples, or ``None`` where data can only be iterated."""

    def labels_of(self, task: int, read: bool = True) -> Tensor | None:
        """Return the class of each training sample; ``None`` if they had to be read, and ``read`` is false."""

    def check_labels(self, task: int) -> None:
        """Raise a ``ValueError`` if the targets of a task are no class labels, as far as its first sample tells."""

    def task_data(self, task: int, split: Literal["train"]) -> TaskDataset | None:
        """Return the training data of a task."""

    def training_view(self, task: int) -> TaskDataset:
        """Return a task's training samples as an evaluation sees them."""

    def samples_loader(
        self,
        task: int,
        split: DataSplit,
        indices: Tensor,
        on_draw: Callable[[Draw], None],
        every_rank: bool = False,
    ) -> Iterable[Any]:
        """Return a loader over samples of a task as an evaluation sees them, shared out over the ranks."""


class SingleTask:
    """An ordinary fit, without a task sequence: a stream of one task."""

    reset_optimizer = True
    evaluates_tasks_apart = True
    checkpoint_key = "SingleTask"  # it has no state

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.tasks: Sequence[Task] = (Task(0, "task 0"),)
        self.structure = BatchStructure()

    def epochs_of(self, task: int) -> int | None:
        """Leave the epochs to the Trainer."""
        return None

    def batches_of(self, task: int) -> int | None:
        """Leave the steps to the Trainer."""
        return None

    def served_tasks(self, split: Split) -> Sequence[int]:
        """Return the one task."""
        return (0,)

    def enter_task(self, task: int) -> None:
        """Do nothing: there is one task."""

    def evaluation_loader(self, task: int, split: Split) -> Iterable[Any] | None:
        """Return the validation loader of the fit."""
        loaders = self._trainer.val_dataloaders
        if split != "val" or loaders is None:
            return None
        if isinstance(loaders, (list, tuple)):
            return loaders[0] if len(loaders) == 1 else None
        return loaders  # type: ignore[no-any-return]
