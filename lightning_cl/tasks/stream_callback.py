"""What the callbacks share that read the samples of a stream of tasks."""

from collections.abc import Iterable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.taps import find_head
from lightning_cl.tasks.callback import ContinualCallback
from lightning_cl.tasks.clock import TaskClock
from lightning_cl.tasks.stream import ReplayStream
from lightning_cl.tasks.task import Task


class StreamCallback(ContinualCallback):
    """Base class of callbacks that read the samples of a stream of tasks.

    In `setup` of a fit they take hold of the stream; at the end of the Trainer call they let go of it.
    """

    _stream: ReplayStream | None = None
    _clock: TaskClock | None = None

    @property
    def name(self) -> str:
        """What it is called in errors and warnings."""
        return type(self).__name__

    @property
    def in_stream(self) -> bool:
        """Whether a fit with a task sequence is running."""
        return self._stream is not None

    @property
    def stream(self) -> ReplayStream:
        """The tasks of the running fit."""
        if self._stream is None:
            raise RuntimeError(f"{self.name} was asked outside a fit of a task sequence.")
        return self._stream

    @property
    def clock(self) -> TaskClock:
        """The clock of the running fit."""
        if self._clock is None:
            raise RuntimeError(f"{self.name} was asked outside a fit of a task sequence.")
        return self._clock

    def find_stream(self, trainer: Trainer) -> bool:
        """Take hold of the stream of the fit that is set up; return whether there is one."""
        clock = TaskClock.of(trainer)
        if clock is None or not isinstance(clock.stream, ReplayStream):
            return False
        self._stream, self._clock = clock.stream, clock
        return True

    def need_stream(
        self,
        trainer: Trainer,
        reason: str,
        several: bool = False,
        sequence: str = "ClassIncremental(your_datamodule, num_tasks=5)",
    ) -> ReplayStream:
        """Take hold of the stream of the fit that is set up, and return it.

        Args:
            trainer: The Trainer.
            reason: What the callback does with it.
            several: Whether it must have more than one task.
            sequence: An example of one that would do.

        Raises:
            MisconfigurationException: If there is none, or it has too few tasks.
        """
        if not self.find_stream(trainer) or (several and len(self.stream.tasks) < 2):
            found = "no stream of several" if several else "no tasks"
            raise MisconfigurationException(
                f"{self.name} {reason}, and this fit has {found}. Wrap your DataModule in a task sequence, such as"
                f" `{sequence}`."
            )
        return self.stream

    def check_indexed(self, tasks: Iterable[Task], advice: str = "") -> None:
        """Refuse tasks whose training data can only be iterated.

        Args:
            tasks: Those whose samples are read.
            advice: What to do instead.
        """
        for task in tasks:
            if self.stream.samples_of(task.index) is None:
                raise MisconfigurationException(
                    f"{self.name} needs data sets that can be indexed, and the data of task {task.index} ({task.name})"
                    f" can only be iterated. {advice}".rstrip()
                )

    def check_labels(self, condition: str = "", advice: str = "") -> None:
        """Refuse tasks whose targets are no class labels, as far as their first samples tell.

        Args:
            condition: When labels are needed.
            advice: What to do instead.
        """
        try:
            for task in self.stream.tasks:
                self.stream.check_labels(task.index)
        except ValueError as error:
            who = f"{self.name} {condition}".rstrip()
            raise MisconfigurationException(f"{who} needs class labels. {error} {advice}".rstrip()) from None

    def find_layer(self, pl_module: LightningModule, head: str | None) -> str:
        """Return the name of the classification layer.

        Args:
            pl_module: The module.
            head: The name that the user gave; found by its number of outputs if ``None``.
        """
        try:
            return find_head(pl_module, self.stream.num_classes, head)
        except ValueError as error:
            raise MisconfigurationException(f"{self.name}: {error}") from None

    def forget(self) -> None:
        """Let go of what belongs to one fit; what was learnt in it stays."""
        self._stream = self._clock = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.forget()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.forget()
