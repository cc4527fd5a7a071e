"""The progress bar of a stream."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.style import Style
from rich.text import Text
from typing_extensions import override

# Below this many columns the longer description would break the line, so that the bar is shortened.
_WIDE = 120


class TaskProgressBar(RichProgressBar):
    """Show the task and the epoch within the task in Lightning's Rich progress bar.

    The whole stream is one ``fit``, so the epoch number of the plain bar says little: the third epoch of the second
    task reads "Task 2/5 · Epoch 3/3" here. With a DataModule that is no stream this is `RichProgressBar`. A stream is
    any DataModule with the attributes ``num_tasks``, ``current_task``, ``task_epoch`` and ``task_epochs``.

    The bar stops when the training does: what other callbacks print in ``on_fit_end`` stands below it.

    Args:
        refresh_rate: How many times a second the bar is drawn; 0 draws none.
        leave: Whether the finished bar of each epoch stays on the screen.
        theme: The styles of the bar's parts.
        console_kwargs: What `rich.console.Console` takes.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TaskProgressBar(leave=True)], accelerator="cpu", logger=False)
    """

    # The name of the epoch that runs now; `None` outside a stream.
    _epoch_name: str | None = None

    @override
    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        columns: list[ProgressColumn] = super().configure_columns(trainer)
        if not _is_stream(trainer):
            return columns
        if get_console().width < _WIDE:
            columns = [column for column in columns if not isinstance(column, ProcessingSpeedColumn)]
            for column in columns:
                if isinstance(column, BarColumn):
                    column.bar_width = 10
        return [_DescriptionColumn(self), *columns[1:]]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_name = _epoch_name(trainer)
        super().on_train_epoch_start(trainer, pl_module)
        self._name_train_bar()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        is_resumed = self.train_progress_bar_id is None
        if is_resumed:
            # An epoch that is resumed in its middle has no `on_train_epoch_start`.
            self._epoch_name = _epoch_name(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if is_resumed:
            self._name_train_bar()

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        if self._epoch_name is not None:
            # The longer description needs the room, and the bar would show version 3 as "3.000".
            metrics.pop("v_num", None)
        return metrics

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        # Stopped twice, a bar that is written to a file or a pipe ends in an empty line.
        self.progress = None
        self._epoch_name = None

    def _name_train_bar(self) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, epoch_name=self._epoch_name)


class _DescriptionColumn(TextColumn):
    """The bar's description, or for the train bar of a stream the name of its epoch."""

    def __init__(self, bar: TaskProgressBar) -> None:
        super().__init__("[progress.description]{task.description}")
        self._bar = bar

    @override
    def render(self, task: Task) -> Text:
        # The train bar is drawn once before it has the field, even before its id is known. That of an epoch before
        # (`leave=True`) keeps the name in its field.
        is_new = "epoch_name" not in task.fields and self._bar.train_progress_bar_id in (None, task.id)
        name = self._bar._epoch_name if is_new else task.fields.get("epoch_name")
        if name is None:
            return super().render(task)
        style: str | Style = self._bar.theme.description
        return Text(name, style=style or "progress.description")


def _is_stream(trainer: Trainer) -> bool:
    names = ("num_tasks", "current_task", "task_epoch", "task_epochs")
    return all(hasattr(getattr(trainer, "datamodule", None), name) for name in names)


def _epoch_name(trainer: Trainer) -> str | None:
    """Name the current task and epoch, both from 1; `None` where there is no stream."""
    if not _is_stream(trainer):
        return None
    stream: Any = trainer.datamodule  # type: ignore[attr-defined]
    name = f"Task {stream.current_task.index + 1}/{stream.num_tasks} · Epoch {stream.task_epoch + 1}"
    return name if stream.task_epochs < 0 else f"{name}/{stream.task_epochs}"
