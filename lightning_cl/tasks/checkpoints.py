"""What can be said before a stream begins of callbacks that follow figures of task ends."""

from collections.abc import Collection
from itertools import accumulate

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.tasks import compat
from lightning_cl.tasks.clock import TaskClock
from lightning_cl.tasks.early_stopping import TaskEarlyStopping


def check_followers(trainer: Trainer, clock: TaskClock, figures: Collection[str]) -> None:
    """Refuse a callback that would look for a figure of task ends before it exists.

    Raises:
        MisconfigurationException: If early stopping follows one, or a checkpoint callback that saves at other times.
    """
    for callback in compat.callbacks_of(trainer):
        if isinstance(callback, TaskEarlyStopping) and callback.monitor in figures:
            raise MisconfigurationException(
                f"Early stopping cannot follow `monitor={callback.monitor!r}`: it exists only when a task has ended."
                " Monitor a metric that your module logs in validation."
            )
        if isinstance(callback, ModelCheckpoint) and callback.monitor in figures and callback.save_top_k != 0:
            check_saves_at_task_ends(trainer, callback, clock)


def check_saves_at_task_ends(trainer: Trainer, checkpoint: ModelCheckpoint, clock: TaskClock) -> None:
    """Refuse a checkpoint that follows a figure of task ends, but would be written in epochs that have none.

    Raises:
        MisconfigurationException: If it would, saying which ``every_n_epochs`` fits.
    """
    epochs = [clock.limits.epochs(task.index) for task in clock.stream.tasks]
    if -1 in epochs:  # tasks that are counted in steps end in epochs that nobody knows yet
        return
    first, *ends = accumulate(epochs, initial=clock.progress.first_epoch)

    def saves_at_ends(every: int) -> bool:
        return every > 0 and all(epoch in ends for epoch in range(every, ends[-1] + 1, every) if epoch > first)

    every, at_epoch_end = checkpoint.every_n_epochs or 0, compat.saves_at_epoch_end(trainer, checkpoint)
    if at_epoch_end and saves_at_ends(every):
        return
    fitting = every if saves_at_ends(every) else next(filter(saves_at_ends, range(1, ends[-1] + 1)))
    advice = f"every_n_epochs={fitting}" + ("" if at_epoch_end else ", save_on_train_epoch_end=True")
    raise MisconfigurationException(
        f"`ModelCheckpoint(monitor={checkpoint.monitor!r})` would save in epochs without that figure, which is"
        f" measured at the end of a task's last epoch. Say `ModelCheckpoint(monitor={checkpoint.monitor!r}, {advice})`."
    )
