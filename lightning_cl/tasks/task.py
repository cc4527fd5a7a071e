"""What a task is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Args:
        index: Position in the stream, from 0.
        name: What tables, plots and progress bars call it.
        classes: Its labels as the data has them (labels are never renumbered); ``None`` where the stream
            does not know them, as in regression.
    """

    index: int
    name: str
    classes: tuple[int, ...] | None = None
