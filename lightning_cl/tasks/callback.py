"""The callback that knows about tasks: the hooks that the task clock sends."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.tasks.task import Task


class ContinualCallback(Callback):
    """Base class of callbacks that act at task boundaries, add a loss, or may veto a task.

    In a stream the hooks come for every task. In an ordinary fit, without a task sequence, the whole fit is one task.
    A *behaviour* changes training or prediction; an *observer* (``observer = True``) only measures: its task hooks come
    after those of all behaviours, with the random state put back after them. A behaviour that reads what others commit
    at a task's end, such as a memory, says ``commits_late = True`` and comes after them. One whose
    ``around_training_step`` reads the very batch that the module gets says ``acts_innermost = True``.

    Example::

        >>> class StopAfterFirstTask(ContinualCallback):
        ...     def on_task_end(self, trainer, pl_module, task):
        ...         if task.index == 0:
        ...             pl_module.backbone.requires_grad_(False)
    """

    observer: bool = False
    commits_late: bool = False
    acts_innermost: bool = False

    @property
    def is_active(self) -> bool:
        """Whether the callback takes part; one that is switched off is as if it were not there."""
        return True

    @property
    def wants_rollback(self) -> bool:
        """Whether a copy of the run is kept from the start of each task, so that `accept_task` may refuse it."""
        return False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that a task clock runs, also in a fit without a task sequence."""
        from lightning_cl.tasks.clock import TaskClock  # the clock dispatches to this class

        if stage == "fit":
            TaskClock.install(trainer, pl_module)

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Called before the first batch of a task, with optimizers renewed."""

    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        """Return whether the finished task may be kept. One veto on any rank undoes it on all."""
        return True

    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Called when a task was vetoed, after everything stands again as it did at the task's start."""

    def next_phase(self, trainer: Trainer, pl_module: LightningModule, task: Task, stopped: bool) -> bool:
        """Return whether another phase of the task begins with the next epoch; must be the same on all ranks.

        Behaviours are asked when an epoch ends and the limits of the task leave it another one. In a new phase every
        early stopping of the task begins afresh. Where none begins, a task that was stopped is over.

        Args:
            trainer: The Trainer.
            pl_module: The module in training.
            task: The current task.
            stopped: Whether early stopping ends what is trained now.
        """
        return False

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Called when a task was accepted, before checkpoints of this epoch are written."""

    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        """Return a term to add to the loss of ``training_step``, or ``None``.

        It runs inside the forward pass: under autocast and DDP, and divided by gradient accumulation. The term is
        logged as ``loss/<callback>``.

        Args:
            trainer: The Trainer.
            pl_module: The module in training.
            batch: The batch, as ``training_step`` got it.
            batch_idx: Its index in the epoch.
            outputs: What ``training_step`` returned.
        """
        return None

    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Called after each training batch, before any callback's ``on_train_batch_end``.

        What a behaviour keeps of a batch belongs here: a checkpoint that is written in ``on_train_batch_end`` has it,
        wherever the callback that writes it stands in the list.
        """

    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        """Return ``step(batch)``, the module's own ``training_step``; the batch or what comes back may be changed.

        Args:
            trainer: The Trainer.
            pl_module: The module in training.
            batch: The batch on the device.
            batch_idx: Its index in the epoch.
            step: Calls ``training_step`` on a batch.
        """
        return step(batch)
