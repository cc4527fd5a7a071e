"""Whether a checkpoint is from the stream that it is resumed with."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.tasks import Task


def describe_stream(tasks: Sequence[Task], samples: Sequence[int | None]) -> list[dict[str, Any]]:
    """Describe each task in plain Python, for a checkpoint.

    Args:
        tasks: The tasks.
        samples: Training samples of each, ``None`` where data can only be iterated.
    """
    return [
        {"name": task.name, "classes": None if task.classes is None else list(task.classes), "samples": count}
        for task, count in zip(tasks, samples, strict=True)
    ]


def check_same_stream(
    tasks: Sequence[Task], samples: Sequence[int | None], saved: Sequence[dict[str, Any]], resumes: bool
) -> None:
    """Check that the tasks of a checkpoint are the first tasks of a stream.

    Args:
        tasks: The tasks.
        samples: Training samples of each.
        saved: What `describe_stream` returned for the checkpoint.
        resumes: Whether training goes on; a test may run with other tasks or data.

    Raises:
        MisconfigurationException: If classes differ or, for training, tasks are missing or have other data.
    """
    if resumes and len(saved) > len(tasks):
        raise MisconfigurationException(
            f"The checkpoint is from a sequence of {len(saved)} tasks, this one has {len(tasks)}. A stream can be"
            " continued with more tasks, not with fewer."
        )
    for index, (now, before) in enumerate(zip(describe_stream(tasks, samples), saved, strict=False)):
        if now["classes"] != before["classes"]:
            raise MisconfigurationException(
                f"The checkpoint is from another sequence: task {index} had the classes {before['classes']}, here it"
                f" has {now['classes']}. Use the same `class_order` and class counts."
            )
        if resumes and now["samples"] != before["samples"]:
            raise MisconfigurationException(
                f"The checkpoint is from other data: task {index} had {before['samples']} training samples, here it has"
                f" {now['samples']}."
            )
