"""Which batches a task sequence hands out: training batches with what is replayed in them, and evaluation batches."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_cl.datamodules.base_data import BaseData
from lightning_cl.datamodules.delegation import DelegatingDataModule
from lightning_cl.datamodules.labels import labels_of_task, read_labels
from lightning_cl.tasks import BatchStructure, Cursor, Draw, Task, TaskDataset, TaskLoader, TaskSampler
from lightning_cl.tasks.replay_plan import ReplayPlan, ReplaySampler
from lightning_cl.tasks.stream import DataSplit

EvalTasks = Literal["seen", "current", "all"]
EvalLoaders = Literal["joined", "per_task"]


class TaskLoaders(DelegatingDataModule):
    """The loaders of a task sequence; what the tasks are, and where the stream stands, its subclass knows.

    Attributes:
        replay: How past samples join the training batches; set by the callback that replays, for the length of a fit.
        training_draw: The order behind the training batch that was handed out last, where samples are replayed.
        training_rows: Rows of that batch, once they were counted.
    """

    seed: int
    shuffle: bool | None
    eval_tasks: EvalTasks
    eval_loaders: EvalLoaders
    structure: BatchStructure
    replay: ReplayPlan | None = None
    training_draw: Draw | None = None
    training_rows: int | None = None
    _current: int | None

    @property
    @abstractmethod
    def tasks(self) -> Sequence[Task]:
        """The tasks."""

    @abstractmethod
    def task_data(self, task: int, split: DataSplit) -> TaskDataset | None:
        """Return the data of one task, or ``None`` if there is no such split."""

    def base_of(self, task: int) -> BaseData:
        """Return the base that a task's data come from."""
        return self._bases[0]

    @property
    def replay_rows(self) -> Tensor | None:
        """Which rows of the current training batch are replayed, ``(batch,)`` bool.

        ``None`` where nothing replays, or where the batch has not one row per sample.
        """
        draw = self.training_draw
        if self.replay is None or draw is None or self.training_rows not in (None, draw.rows):
            return None
        rows = torch.zeros(draw.rows, dtype=torch.bool)
        rows[len(draw.ids) :] = True
        return rows

    def samples_of(self, task: int, split: DataSplit = "train") -> int | None:
        """Return the number of a task's samples, or ``None`` where data can only be iterated."""
        if self.base_of(task).is_iterable(split):
            return None
        data = self._required_data(task) if split == "train" else self.task_data(task, split)
        return 0 if data is None else len(data)

    def labels_of(self, task: int, read: bool = True) -> Tensor | None:
        """Return the class of each training sample of a task.

        Args:
            task: Index of the task.
            read: Whether samples are read where their data set does not know the labels; else ``None`` comes back.

        Raises:
            ValueError: If the targets are no class labels.
        """
        return labels_of_task(self._required_data(task), self.structure, read)

    def check_labels(self, task: int) -> None:
        """Raise a ``ValueError`` if the targets of a task are no class labels, as far as its first sample tells."""
        labels = self.labels_of(task, read=False)
        if labels is not None and len(labels) > 0 and int(labels.min()) < 0:
            raise ValueError(f"Class labels are numbers from 0, got {int(labels.min())}.")
        if labels is None:
            data = self._required_data(task)
            read_labels(Subset(data.dataset, data.indices[:1].tolist()), self.structure)

    def training_view(self, task: int) -> TaskDataset:
        """Return a task's training samples as an evaluation sees them: without random augmentation.

        Where samples were copied, as an evaluation saw them, the others are missing.
        """
        copied = None if self.replay is None or task == self._current else self.replay.copies(task)
        if copied is not None:
            return copied  # type: ignore[no-any-return]
        data = self._required_data(task)
        evaluated = self.base_of(task).evaluated(data.dataset)
        return TaskDataset(evaluated, data.indices, data.collate_fn, data.transform)

    def samples_loader(
        self,
        task: int,
        split: DataSplit,
        indices: Tensor,
        on_draw: Callable[[Draw], None],
        every_rank: bool = False,
    ) -> Iterable[Any]:
        """Return a loader over samples of a task as an evaluation sees them, shared out over the ranks.

        Args:
            task: Index of the task.
            split: Whose samples.
            indices: Which of them.
            on_draw: Called with the order behind each batch; its ``ids`` are positions in ``indices``.
            every_rank: Whether each rank gets all of them.
        """
        view = self.training_view(task) if split == "train" else self.task_data(task, split)
        if view is None:
            raise MisconfigurationException(f"Task {task} has no {split} data.")
        if bool((view.indices[indices] < 0).any()):
            raise ValueError(f"Samples of task {task} were asked for that are not among the copied ones.")
        base = self.base_of(task)
        data = TaskDataset(view.dataset, view.indices[indices], view.collate_fn, view.transform)
        ranks = {} if every_rank else self._ranks()
        sampler = TaskSampler([data], base.batch_size("val"), shuffle=False, seed=self.seed, stream_key=task, **ranks)
        return TaskLoader([data], sampler, on_draw, **base.loader_settings("val"))

    def _training_loader(self, task: int, cursor: Callable[[], Cursor] | None) -> TaskLoader:
        base, data = self.base_of(task), self._required_data(task)
        settings: dict[str, Any] = {
            "batch_size": base.batch_size("train"),
            "shuffle": base.shuffles() if self.shuffle is None else self.shuffle,
            "drop_last": base.drops_last(),
            "seed": self.seed,
            "stream_key": task,
            "cursor": cursor,
            **self._ranks(),
        }
        if self.replay is None:
            return TaskLoader([data], TaskSampler([data], **settings), **base.loader_settings("train"))
        settings["shuffle"] = settings["shuffle"] or self.replay.mix == "joint"
        sampler = ReplaySampler(data, self.replay, **settings)
        past = {}
        for number in self.replay.tasks_before(task):
            copied = self.replay.copies(number)
            past[number] = self._required_data(number) if copied is None else copied
        if self.replay.online:
            past[task] = data
        return TaskLoader([data], sampler, self._note_training_draw, past, **base.loader_settings("train"))

    def _note_training_draw(self, draw: Draw) -> None:
        self.training_draw, self.training_rows = draw, None

    @property
    def evaluates_tasks_apart(self) -> bool:
        """Whether validation has a loader for each task."""
        return self.eval_loaders == "per_task"

    def served_tasks(self, split: Literal["val", "test"]) -> Sequence[int]:
        """Return the tasks that the loaders of a split serve now, in their order; a task without data has none."""
        current = len(self.tasks) - 1 if self._current is None else self._current
        wanted = {"seen": range(current + 1), "current": [current], "all": range(len(self.tasks))}[self.eval_tasks]
        return [task for task in wanted if self._has_data(task, split)]

    def evaluation_loader(self, task: int, split: Literal["val", "test"]) -> Iterable[Any] | None:
        """Return a loader over one task's validation or test set, or ``None`` if there is none."""
        return self._evaluation_loader([task], split)

    @override
    def val_dataloader(self) -> Any:
        return self._evaluation_loaders("val")

    @override
    def test_dataloader(self) -> Any:
        return self._evaluation_loaders("test")

    def _required_data(self, task: int) -> TaskDataset:
        data = self.task_data(task, "train")
        if data is None:
            raise MisconfigurationException(f"Task {task} has no training data.")
        return data

    def _evaluation_loaders(self, split: Literal["val", "test"]) -> Any:
        served = self.served_tasks(split)
        if self.eval_loaders == "joined":
            return self._evaluation_loader(served, split) or []
        return [self._evaluation_loader([task], split) for task in served]

    def _has_data(self, task: int, split: Literal["val", "test"]) -> bool:
        if self.base_of(task).is_iterable(split):
            return True
        data = self.task_data(task, split)
        return data is not None and len(data) > 0

    def _evaluation_loader(self, tasks: Sequence[int], split: Literal["val", "test"]) -> DataLoader[Any] | None:
        iterable = [task for task in tasks if self.base_of(task).is_iterable(split)]
        if iterable:
            if len(self._bases) < len(self.tasks):
                raise MisconfigurationException(
                    f"The {split} data of {type(self._bases[0].module).__name__} can only be iterated, so no task can"
                    " be cut out of them. Give the tasks as DataModules of their own, with `TaskList`."
                )
            if len(tasks) > 1:
                raise MisconfigurationException(
                    f"The {split} data of task {iterable[0]} can only be iterated, so they cannot be joined with those"
                    " of other tasks. Say `eval_loaders='per_task'`, or `eval_tasks='current'`."
                )
            return self.base_of(iterable[0]).loader(split)
        found = [(task, self.task_data(task, split)) for task in tasks]
        served = {task: data for task, data in found if data is not None and len(data) > 0}
        if not served:
            return None
        base = self.base_of(next(iter(served)))
        numbers, parts = list(served), list(served.values())
        sampler = TaskSampler(parts, batch_size=base.batch_size(split), shuffle=False, seed=self.seed, **self._ranks())
        return TaskLoader(parts, sampler, self._listener(numbers), **base.loader_settings(split))

    def _ranks(self) -> dict[str, Any]:
        strategy = None if self.trainer is None else self.trainer.strategy
        ranks: dict[str, Any] = getattr(strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        return ranks

    def _listener(self, tasks: Sequence[int]) -> Callable[[Draw], None] | None:
        """Return what a loader over these tasks tells of each batch it hands out."""
        return None
