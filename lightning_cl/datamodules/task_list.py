"""Any DataModules, one after another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from lightning_cl.datamodules.base_data import BaseData
from lightning_cl.datamodules.labels import known_classes
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.tasks import Draw, Task, TaskDataset
from lightning_cl.tasks.batches import count_rows, join_rows, take_rows
from lightning_cl.tasks.stream import DataSplit


class TaskList(TaskSequence):
    """Make one task of each DataModule of a list.

    Iterable data sets pass through as their own loaders. Such a run resumes exactly at epoch boundaries only.

    Args:
        datamodules: One for each task. A run can be continued with a longer list.
        names: Names of the tasks; those of the DataModules' classes by default.
        **options: Those of `TaskSequence`: ``epochs_per_task``, ``reset_optimizer``, ``eval_tasks``, ``eval_loaders``,
            ``shuffle``, ``val_fraction``, ``eval_transform``, ``inputs``, ``target_key``, ``seed``.

    Raises:
        ValueError: If the list is empty, or ``names`` has another length.

    Example::

        >>> from lightning_cl.datamodules import Digits
        >>> TaskList([Digits(), Digits()]).num_tasks
        2
    """

    def __init__(
        self,
        datamodules: list[LightningDataModule],
        names: list[str] | None = None,
        **options: Any,
    ) -> None:
        if not datamodules:
            raise ValueError("`datamodules` must have one DataModule for each task, got an empty list.")
        if names is not None and len(names) != len(datamodules):
            raise ValueError(f"`names` has {len(names)} entries for {len(datamodules)} `datamodules`.")
        self._serving = 0  # the task whose batch was handed out last
        self._names = names or [f"{index}: {type(module).__name__}" for index, module in enumerate(datamodules)]
        self._apart: int | None = None  # the task that is evaluated on its own
        self._loader_tasks: list[int] | None = None  # the tasks of the evaluation loaders that Lightning has
        super().__init__(datamodules, **options)

    @override
    def base_of(self, task: int) -> BaseData:
        return self._bases[task]

    @override
    def define_tasks(self) -> Sequence[Task]:
        return [
            Task(index, name, None if base.is_iterable() else known_classes(base.task_dataset("train")))
            for index, (name, base) in enumerate(zip(self._names, self._bases, strict=True))
        ]

    @override
    def task_data(self, task: int, split: DataSplit) -> TaskDataset | None:
        return self.base_of(task).task_dataset(split)

    @override
    def pass_on(self, hook: str) -> None:
        setattr(self, hook, partial(self._call_on_base, hook))

    def _call_on_base(self, hook: str, batch: Any, *args: Any) -> Any:
        draw = self.training_draw if self.trainer is not None and self.trainer.training else None
        if draw is None or draw.replayed is None or count_rows(batch) != draw.rows:
            return self._call_on_base_of(self._task_of_batch(dataloader_idx=args[-1]), hook, batch, *args)
        # replayed rows go through the hooks of the DataModule that they come from
        parts, counts, start = [], [], 0
        own = [(self._current or 0, draw.ids)] if draw.ids else []
        for task, ids in [*own, *draw.replayed.samples]:
            rows = take_rows(batch, slice(start, start + len(ids)), draw.rows)
            parts.append(self._call_on_base_of(task, hook, rows, *args))
            counts.append(len(ids))
            start += len(ids)
        return join_rows(parts, counts)

    def _call_on_base_of(self, task: int, hook: str, *args: Any) -> Any:
        return getattr(self.base_of(task).module, hook)(*args)

    @override
    def _listener(self, tasks: Sequence[int]) -> Callable[[Draw], None] | None:
        return partial(self._note_draw, tasks)

    def _note_draw(self, tasks: Sequence[int], draw: Draw) -> None:
        self._serving = tasks[draw.part]

    def _task_of_batch(self, dataloader_idx: int) -> int:
        # loaders of ours say whose batch they hand out, the DataModules' own iterable ones do not
        if self._apart is not None:
            return self._apart
        if self.trainer is not None and self.trainer.training:
            return self._current or 0
        if self.trainer is not None and self.trainer.predicting:
            return 0
        return self._serving if self._loader_tasks is None else self._loader_tasks[dataloader_idx]

    @override
    def evaluation_loader(self, task: int, split: Literal["val", "test"]) -> Iterable[Any] | None:
        loader = super().evaluation_loader(task, split)
        return None if loader is None else _OneTasksBatches(self, task, loader)

    @override
    def samples_loader(self, task: int, *args: Any, **kwargs: Any) -> Iterable[Any]:
        return _OneTasksBatches(self, task, super().samples_loader(task, *args, **kwargs))

    @override
    def _evaluation_loaders(self, split: Literal["val", "test"]) -> Any:
        served = self.served_tasks(split)
        self._loader_tasks = list(served) if self.evaluates_tasks_apart or len(served) == 1 else None
        return super()._evaluation_loaders(split)


class _OneTasksBatches:
    """A task's evaluation loader, which tells the sequence whose batches are on their way while it is iterated."""

    def __init__(self, sequence: TaskList, task: int, loader: Iterable[Any]) -> None:
        self._sequence = sequence
        self._task = task
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self._sequence._apart = self._task
        try:
            yield from self._loader
        finally:
            self._sequence._apart = None
