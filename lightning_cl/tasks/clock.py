"""The task clock: the callback that moves a fit from task to task."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_cl.tasks import compat, rollback
from lightning_cl.tasks.added_loss import LossTerms
from lightning_cl.tasks.callback import ContinualCallback
from lightning_cl.tasks.dispatch import begins_phase, continual_callbacks, is_accepted, send
from lightning_cl.tasks.early_stopping import TaskEarlyStopping
from lightning_cl.tasks.limits import TaskLimits
from lightning_cl.tasks.overrides import InstanceOverrides
from lightning_cl.tasks.progress import TaskProgress
from lightning_cl.tasks.random_state import collect_random_state
from lightning_cl.tasks.sampler import Cursor
from lightning_cl.tasks.stream import SingleTask, TaskStream
from lightning_cl.tasks.task import Task

CHECKPOINT_KEY = "lightning_cl"


class TaskClock(Callback):
    """Move a fit from task to task, and send the task hooks.

    It stands first in ``trainer.callbacks`` while a fit lasts. `TaskSequence` puts it there, or a `ContinualCallback`
    in a fit without a sequence; users never make one.

    Args:
        stream: The tasks.
    """

    def __init__(self, stream: TaskStream) -> None:
        self.stream = stream
        self.progress = TaskProgress()
        self._known_limits: TaskLimits | None = None
        self._overrides = InstanceOverrides()
        self._replaced: list[tuple[TaskEarlyStopping, EarlyStopping]] = []
        self._copy: dict[str, Any] | None = None
        self._parts: rollback.Parts | None = None
        self._random_states: list[dict[str, Any]] | None = None
        self._repeat_as: int | None = None
        self._batch_listeners: list[ContinualCallback] = []

    @classmethod
    def of(cls, trainer: Trainer) -> "TaskClock | None":
        """Return the clock of a running fit."""
        return next((callback for callback in compat.callbacks_of(trainer) if isinstance(callback, cls)), None)

    @classmethod
    def install(
        cls, trainer: Trainer, pl_module: LightningModule | None = None, stream: TaskStream | None = None
    ) -> "TaskClock":
        """Put a clock first among the callbacks, unless there is one."""
        clock = cls.of(trainer)
        if clock is not None:
            return clock
        clock = cls(SingleTask(trainer) if stream is None else stream)
        # a new list: the callbacks' `setup` may be walking through the old one
        compat.set_callbacks(trainer, [clock, *compat.callbacks_of(trainer)])
        if pl_module is not None:
            clock.setup(trainer, pl_module, "fit")
        return clock

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._known_limits is not None:
            return
        _check_trainer(trainer, pl_module, self.stream)
        if any(callback.wants_rollback for callback in continual_callbacks(trainer)):
            rollback.check_rollback_support(trainer)
        self._replace_early_stopping(trainer)
        self._known_limits = TaskLimits(trainer, self.stream)
        if not isinstance(self.stream, SingleTask):  # a second `fit` begins the stream again; an ordinary one does not
            self.progress.first_epoch = compat.processed_epochs(trainer)
            self.progress.first_step = trainer.global_step
        self._stand_at_task(trainer)

        def configure_optimizers(original: Callable[[], Any]) -> Any:
            with self.limits.horizon_of(self.progress.task):
                return original()

        def on_train_epoch_end(original: Callable[[], None]) -> None:
            # after the user's hooks of this epoch, before `ModelCheckpoint` writes
            original()
            self._end_epoch(trainer, pl_module)

        self._overrides.wrap(pl_module, "configure_optimizers", configure_optimizers)
        self._overrides.wrap(pl_module, "on_train_epoch_end", on_train_epoch_end)
        callbacks = continual_callbacks(trainer)
        LossTerms(trainer, pl_module, callbacks).attach(self._overrides)
        usual = ContinualCallback.on_batch_trained
        self._batch_listeners = [c for c in callbacks if type(c).on_batch_trained is not usual]

    @property
    def limits(self) -> TaskLimits:
        """How long tasks last."""
        if self._known_limits is None:
            raise RuntimeError("The task clock was asked before its `setup`.")
        return self._known_limits

    def _replace_early_stopping(self, trainer: Trainer) -> None:
        callbacks, several = list(compat.callbacks_of(trainer)), len(self.stream.tasks) > 1
        for position, callback in enumerate(callbacks):
            if type(callback) is EarlyStopping:
                twin = TaskEarlyStopping.like(callback)
                callbacks[position] = twin
                self._replaced.append((twin, callback))
                # Lightning is about to call `setup` on the callback that was replaced
                twin.setup(trainer, trainer.lightning_module, "fit")
                if several:
                    rank_zero_warn(
                        f"EarlyStopping(monitor={callback.monitor!r}) ends the task here, not the stream."
                        " `TaskEarlyStopping` says so by its name, and takes the same arguments."
                    )
            elif several and isinstance(callback, EarlyStopping) and not isinstance(callback, TaskEarlyStopping):
                rank_zero_warn(
                    f"{type(callback).__name__} ends the whole stream when it stops; derive it from"
                    " `lightning_cl.tasks.TaskEarlyStopping` to end the task only."
                )
        compat.set_callbacks(trainer, callbacks)

    def uninstall(self, trainer: Trainer) -> None:
        """Leave Trainer and module as they were before the fit."""
        self._overrides.undo()
        self._batch_listeners = []
        if self._known_limits is not None:
            self._known_limits.restore()
            self._known_limits = None
        self._copy = self._parts = None
        originals = {id(twin): original for twin, original in self._replaced}
        for twin, original in self._replaced:
            original.__dict__.update({k: v for k, v in twin.__dict__.items() if k in original.__dict__})
        self._replaced = []
        compat.set_callbacks(trainer, [originals.get(id(c), c) for c in compat.callbacks_of(trainer) if c is not self])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.uninstall(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # in a stream the sequence takes the clock off, after callbacks that write a checkpoint of the failed run
        if isinstance(self.stream, SingleTask):
            self.uninstall(trainer)

    @property
    def task(self) -> Task:
        """The current task."""
        return self.stream.tasks[self.progress.task]

    @property
    def planned_epochs(self) -> int:
        """Epochs planned for the current task; -1 if only steps limit it."""
        return self.limits.epochs(self.progress.task)

    @property
    def can_go_back(self) -> bool:
        """Whether there is a copy of the run from the current task's start."""
        return self._copy is not None

    def cursor(self, trainer: Trainer) -> Cursor:
        """Return the position of the next batch, for the sampler."""
        return Cursor(self.progress.attempt, self.progress.epochs, compat.next_batch_index(trainer))

    def enter_next_task(self) -> None:
        """Go on to the next task if the current one is over; called when its data is asked for."""
        if self.progress.committed and self.progress.task + 1 < len(self.stream.tasks):
            self.progress.task += 1
            self.progress.begin_attempt(0)
            self.stream.enter_task(self.progress.task)

    def repeat_task(self, attempt: int) -> None:
        """Train the task once more after it was undone; called in ``accept_task`` or ``on_task_rejected``.

        Args:
            attempt: Number of the attempt: data order and transforms are a function of it, 0 being those of a task
                that was never repeated.
        """
        self._repeat_as = attempt

    @property
    def repeats(self) -> bool:
        """Whether the task that was just undone is trained once more."""
        return self._repeat_as is not None

    def _stand_at_task(self, trainer: Trainer) -> None:
        self.stream.enter_task(self.progress.task)
        self.limits.allow(self.progress.task, self.progress.first_epoch, self.progress.first_step)

    def state_of_rank(self) -> dict[str, Any]:
        """Return what a resumed run needs of the clock, with the random state of this rank alone."""
        return {"progress": asdict(self.progress), "random": collect_random_state(), "copy": self._copy}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = gather_state(self.state_of_rank())

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        key = self.stream.checkpoint_key
        of_sequence = checkpoint.get(key)
        state = checkpoint.get(CHECKPOINT_KEY) or (of_sequence or {}).get("ended_run")
        if state is None:
            if isinstance(self.stream, SingleTask):
                return
            raise MisconfigurationException(
                "The checkpoint holds no progress of a stream, so the fit cannot be resumed from it: it was written by"
                " a fit without a task sequence, or with `save_weights_only=True`. To start a stream from its weights,"
                " load them into the module before `fit`."
            )
        if of_sequence is None and not isinstance(self.stream, SingleTask):
            raise MisconfigurationException(
                f"The checkpoint is from another sequence: it holds no state of a {key}. Resume"
                " with the kind of sequence that the run had."
            )
        self.progress = TaskProgress(**state["progress"])
        self._random_states = state["random"]
        self._copy = state["copy"]
        if self.progress.task >= len(self.stream.tasks):
            raise MisconfigurationException(
                f"The checkpoint stands at task {self.progress.task}, but the sequence has {len(self.stream.tasks)}"
                " tasks. Resume with at least as many tasks as the run had."
            )
        self.enter_next_task()
        self._stand_at_task(trainer)
        if self.progress.committed:  # there was no next task
            self.limits.end_fit(self.progress.first_epoch)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compat.repair_resume_after_batch(trainer)
        if self._random_states is not None:
            rollback.restore_random_states(self._random_states, trainer.global_rank)
            self._random_states = None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.progress.started:
            return
        if self._copy is None and any(callback.wants_rollback for callback in continual_callbacks(trainer)):
            self._copy, self._parts = rollback.take_copy(trainer, keep=self), rollback.Parts.of(trainer, pl_module)
        if self.progress.begun > 0 and self.stream.reset_optimizer:
            _renew_optimizers(trainer)
        for early_stopping in _early_stoppings(trainer):
            early_stopping.start_task()
        send(trainer, pl_module, "on_task_start", self.task)
        self.progress.started = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for callback in self._batch_listeners:
            callback.on_batch_trained(trainer, pl_module, batch_idx)

    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = self.progress
        progress.epochs += 1
        epochs, steps = progress.epochs, trainer.global_step - progress.first_step
        stops = [callback.task_should_stop(trainer, pl_module) for callback in _early_stoppings(trainer)]
        told = False
        if isinstance(self.stream, SingleTask):
            # its limits count from the first fit of this Trainer, and one that is told to stop is over, whereas a
            # stream that is stopped can be resumed
            epochs, steps = compat.processed_epochs(trainer), trainer.global_step
            told = trainer.should_stop
        enough = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        stopped = any(stops) and enough
        if self.limits.reached(progress.task, epochs, steps) or (told and enough):
            self._close_task(trainer, pl_module)
        elif begins_phase(trainer, pl_module, self.task, stopped):
            for early_stopping in _early_stoppings(trainer):
                early_stopping.start_task()
        elif stopped:
            self._close_task(trainer, pl_module)

    def _close_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = self.progress
        self._repeat_as = None
        if is_accepted(trainer, pl_module, self.task):
            send(trainer, pl_module, "on_task_end", self.task)
        else:
            if self._copy is None:
                raise MisconfigurationException(
                    f"Task {progress.task} was refused, but there is no copy to go back to: a callback that may return"
                    " False from `accept_task` must have `wants_rollback` return True."
                )
            renews = self.stream.reset_optimizer
            rollback.go_back(trainer, pl_module, self._copy, keep=self, parts=self._parts, renews_optimizers=renews)
            send(trainer, pl_module, "on_task_rejected", self.task)
            if self._repeat_as is None:
                progress.rejected.append(progress.task)
        progress.first_epoch = compat.processed_epochs(trainer)
        progress.first_step = trainer.global_step
        if self._repeat_as is not None:
            progress.begin_attempt(self._repeat_as)
        else:
            progress.committed = True
            self._copy = self._parts = None
        upcoming = progress.task + progress.committed
        if upcoming < len(self.stream.tasks):
            self.limits.allow(upcoming, progress.first_epoch, progress.first_step)
            compat.ask_for_loaders_again(trainer)
        else:
            self.limits.end_fit(progress.first_epoch)


def _early_stoppings(trainer: Trainer) -> list[TaskEarlyStopping]:
    return [callback for callback in compat.callbacks_of(trainer) if isinstance(callback, TaskEarlyStopping)]


def gather_state(of_rank: dict[str, Any]) -> dict[str, Any]:
    """Complete `TaskClock.state_of_rank` with the random states of the other ranks; to be called on all of them."""
    return {**of_rank, "random": rollback.gather_random_states(of_rank["random"])}


def _renew_optimizers(trainer: Trainer) -> None:
    before = list(trainer.optimizers)
    trainer.strategy.setup_optimizers(trainer)
    if any(new is old for new in trainer.optimizers for old in before):
        rank_zero_warn(
            "`configure_optimizers` returned an optimizer that was used before, so its state goes on into the next"
            " task. Build a new one in it (LightningCLI's `--optimizer` does not: take an `OptimizerCallable` in the"
            " module), or say `reset_optimizer=False`."
        )


def _check_trainer(trainer: Trainer, pl_module: LightningModule, stream: TaskStream) -> None:
    if isinstance(stream, SingleTask):
        return
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"`Trainer(overfit_batches={trainer.overfit_batches})` replaces the sampler"  # type: ignore[attr-defined]
            " that a task sequence needs. Use `limit_train_batches`."
        )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in compat.callbacks_of(trainer)):
        raise MisconfigurationException(
            "`StochasticWeightAveraging` plans its epochs before the fit and cannot follow a stream of tasks."
            " Use `WeightAveraging`."
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy) and stream.reset_optimizer and len(stream.tasks) > 1:
        raise MisconfigurationException(
            "DeepSpeed binds the optimizer to its engine, so it cannot be renewed for each task."
            " Say `reset_optimizer=False`, or use `Trainer(strategy='ddp')`."
        )
