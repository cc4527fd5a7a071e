"""What a task is."""

from collections.abc import Sequence
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


def classes_apart(tasks: Sequence[Task]) -> list[tuple[int, ...]]:
    """Return the classes of each task; nothing where some are unknown or come in several tasks.

    Example::

        >>> classes_apart([Task(0, "first", (0, 1)), Task(1, "second", (2,))])
        [(0, 1), (2,)]
        >>> classes_apart([Task(0, "first", (0, 1)), Task(1, "second", (1,))])
        []
    """
    classes = [tuple(task.classes or ()) for task in tasks]
    labels = [label for own in classes for label in own]
    return classes if all(classes) and len(set(labels)) == len(labels) else []
