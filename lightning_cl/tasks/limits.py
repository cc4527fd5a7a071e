"""How long a task lasts: the limits of the Trainer mean one task, and the fit goes on for all of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.tasks.stream import TaskStream


class TaskLimits:
    """The user's limits for one task, and what the fit loop is told.

    Args:
        trainer: The Trainer; its limits are read here, and put back by `restore`.
        stream: The tasks.

    Raises:
        MisconfigurationException: If the first of several tasks would never end.
    """

    def __init__(self, trainer: Trainer, stream: TaskStream) -> None:
        self._fit_loop = trainer.fit_loop
        self._trainer = trainer
        self._stream = stream
        self._max_epochs = self._fit_loop.max_epochs
        self._max_steps = self._fit_loop.max_steps
        endless = any(self.epochs(task.index) == -1 for task in stream.tasks) and self._max_steps == -1
        if endless and len(stream.tasks) > 1:
            raise MisconfigurationException(
                "A task would never end: got `Trainer(max_epochs=-1, max_steps=-1)` with"
                f" {len(stream.tasks)} tasks. Both count per task; set one of them, or `epochs_per_task`."
            )

    def epochs(self, task: int) -> int:
        """Return the epochs planned for a task; -1 if only steps limit it."""
        planned = self._stream.epochs_of(task)
        if planned is not None:
            return planned
        return -1 if self._max_epochs is None else self._max_epochs

    def reached(self, task: int, epochs: int, steps: int) -> bool:
        """Return whether a task is over after these epochs and optimizer steps of its own."""
        planned = self.epochs(task)
        return (planned != -1 and epochs >= planned) or (self._max_steps != -1 and steps >= self._max_steps)

    def allow(self, task: int, first_epoch: int, first_step: int) -> None:
        """Let the fit loop run to the end of a task that begins at these counts."""
        planned = self.epochs(task)
        self._fit_loop.max_epochs = -1 if planned == -1 else first_epoch + planned
        self._fit_loop.epoch_loop.max_steps = -1 if self._max_steps == -1 else first_step + self._max_steps

    def end_fit(self, epochs: int) -> None:
        """Let the fit loop end here, although the last task could have gone on."""
        self._fit_loop.max_epochs = epochs

    def restore(self) -> None:
        """Put the user's limits back."""
        self._fit_loop.max_epochs = self._max_epochs
        self._fit_loop.epoch_loop.max_steps = self._max_steps

    @contextmanager
    def horizon_of(self, task: int) -> Iterator[None]:
        """Show the horizon that an optimizer built now will live for.

        That is one task where each has its own optimizer, else the whole stream: in ``trainer.max_epochs``,
        ``trainer.max_steps`` and ``trainer.estimated_stepping_batches``.
        """
        fit_loop, epoch_loop = self._fit_loop, self._fit_loop.epoch_loop
        shown, own_batches = (fit_loop.max_epochs, epoch_loop.max_steps), fit_loop.max_batches
        fit_loop.max_epochs, epoch_loop.max_steps = self.epochs(task), self._max_steps
        if not self._stream.reset_optimizer and len(self._stream.tasks) > 1:
            own_batches = self._show_stream()
        whole_stream = fit_loop.max_batches
        try:
            yield
        finally:
            fit_loop.max_epochs, epoch_loop.max_steps = shown
            if fit_loop.max_batches == whole_stream:
                fit_loop.max_batches = own_batches

    def _show_stream(self) -> int | float:
        """Show the horizon of the whole stream, and return how many batches an epoch of the current task has."""
        fit_loop = self._fit_loop
        tasks = range(len(self._stream.tasks))
        epochs = [self.epochs(task) for task in tasks]
        if self._max_steps != -1:
            fit_loop.epoch_loop.max_steps = self._max_steps * len(tasks)
        if -1 in epochs:
            return fit_loop.max_batches
        fit_loop.max_epochs = sum(epochs)
        batches = [self._limited(self._stream.batches_of(task)) for task in tasks]
        if any(count is None for count in batches):
            return fit_loop.max_batches
        # the estimate is min(ceil(max_batches / accumulate) * max_epochs, max_steps): too high an estimate by the
        # longest task makes the second, exact number the smaller one
        fit_loop.setup_data()
        own_batches = fit_loop.max_batches  # infinite before the data were there
        fit_loop.max_batches = max(count for count in batches if count is not None)
        accumulate = self._trainer.accumulate_grad_batches
        total = sum(
            max(math.ceil(n / accumulate), 1) * e for n, e in zip(batches, epochs, strict=True) if n is not None
        )
        if self._max_steps == -1 or total < fit_loop.epoch_loop.max_steps:
            fit_loop.epoch_loop.max_steps = total
        return own_batches

    def _limited(self, batches: int | None) -> int | None:
        limit = self._trainer.limit_train_batches
        if batches is None or limit is None:
            return batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
