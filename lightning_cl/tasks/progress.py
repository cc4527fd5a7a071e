"""Where a stream stands."""

from dataclasses import dataclass, field


@dataclass
class TaskProgress:
    """Where a stream stands, in plain numbers.

    Args:
        task: Index of the current task.
        attempt: Which training of the task this is; its data order depends on it.
        begun: How many attempts of the stream were begun before this one.
        started: Whether ``on_task_start`` was sent.
        committed: Whether the task is over, kept or skipped.
        epochs: Epochs of this attempt that are done.
        first_epoch: The fit's epoch count when the attempt began.
        first_step: The fit's optimizer steps when the attempt began.
        rejected: Tasks that were undone and skipped.
    """

    task: int = 0
    attempt: int = 0
    begun: int = 0
    started: bool = False
    committed: bool = False
    epochs: int = 0
    first_epoch: int = 0
    first_step: int = 0
    rejected: list[int] = field(default_factory=list)

    def begin_attempt(self, attempt: int) -> None:
        """Stand before the first batch of an attempt."""
        self.attempt = attempt
        self.begun += 1
        self.started = self.committed = False
        self.epochs = 0
