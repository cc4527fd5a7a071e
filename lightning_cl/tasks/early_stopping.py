"""Early stopping that ends the task instead of the stream."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override


class TaskEarlyStopping(EarlyStopping):
    """Stop a task, not the stream, when a metric no longer improves; each task starts with a fresh best score.

    In a stream the task clock puts this in the place of a plain `EarlyStopping`. The task ends with the epoch in which
    the check failed. Where a callback trains a task in phases, such as `EarlyExits`, it ends the phase, and each phase
    starts afresh too. In a fit without tasks it is an ordinary `EarlyStopping`.

    Args:
        monitor: Metric to watch.
        **kwargs: Every other argument of `EarlyStopping`.

    Example::

        >>> TaskEarlyStopping("val_loss", patience=3).patience
        3
    """

    def __init__(self, monitor: str, **kwargs: Any) -> None:
        super().__init__(monitor, **kwargs)
        self._in_stream = False
        self._task_should_stop = False

    @classmethod
    def like(cls, early_stopping: EarlyStopping) -> "TaskEarlyStopping":
        """Return one with the arguments of a plain `EarlyStopping`."""
        twin = cls(early_stopping.monitor)
        twin.__dict__.update(early_stopping.__dict__)
        return twin

    @property
    @override
    def state_key(self) -> str:
        """The key of a plain `EarlyStopping`, so that a checkpoint of a stream fits a Trainer outside it."""
        return f"EarlyStopping{ {'monitor': self.monitor, 'mode': self.mode}!r}"

    def start_task(self) -> None:
        """Forget what was reached before; called by the task clock when a task or another phase of it begins."""
        fresh = EarlyStopping(self.monitor, mode=self.mode, patience=self.patience)
        self.load_state_dict(fresh.state_dict())
        self._in_stream = True
        self._task_should_stop = False

    def task_should_stop(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Return whether the task should end with this epoch; called by the task clock when the epoch ends."""
        self._check(trainer, pl_module, at_epoch_end=True)
        return self._task_should_stop

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin as an ordinary one; the clock says when a task starts."""
        super().setup(trainer, pl_module, stage)
        self._in_stream = self._task_should_stop = False

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing in a stream: the clock asks earlier, since the task must end before checkpoints are written."""
        if not self._in_stream:
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metric where it is checked after validation."""
        if self._in_stream:
            self._check(trainer, pl_module, at_epoch_end=False)
        else:
            super().on_validation_end(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule, at_epoch_end: bool) -> None:
        asked_to_stop = trainer.should_stop
        trainer.should_stop = False
        if at_epoch_end:
            super().on_train_epoch_end(trainer, pl_module)
        else:
            super().on_validation_end(trainer, pl_module)
        self._task_should_stop |= trainer.should_stop
        trainer.should_stop = asked_to_stop

    @override
    def state_dict(self) -> dict[str, Any]:
        """Add the decision of this task to the state."""
        return {**super().state_dict(), "in_stream": self._in_stream, "task_should_stop": self._task_should_stop}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; a plain `EarlyStopping`'s state fits as well."""
        super().load_state_dict(state_dict)
        self._in_stream = state_dict.get("in_stream", self._in_stream)
        self._task_should_stop = state_dict.get("task_should_stop", False)
