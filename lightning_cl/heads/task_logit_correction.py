"""Task-wise logits correction: what a recent task's logits have over those of old ones (arXiv 2403.07404)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TaskLogitCorrection(NamedTuple):
    """A constant for the logits of each task, which grows with the task's age: ``slope * age + offset``.

    The newest task has none. Within a task all classes have the same, so predictions among its classes do not change.

    Args:
        slope: For each task since.
        offset: For every old task.

    Example::

        >>> logits = torch.tensor([[1.0, 0.0, 3.0, 1.0]])
        >>> TaskLogitCorrection(0.0, 0.5).apply(logits, [[0, 1], [2, 3]])
        tensor([[1.5000, 0.5000, 3.0000, 1.0000]])
    """

    slope: float
    offset: float

    def apply(self, logits: Tensor, classes: Sequence[Sequence[int]]) -> Tensor:
        """Add the constants.

        Args:
            logits: Of shape ``(..., classes)``.
            classes: The classes of each task seen, oldest first; others stay as they are.
        """
        added = torch.zeros(logits.shape[-1])
        for age, own in _old_tasks(classes):
            added[list(own)] = self.slope * age + self.offset
        return logits + added.to(logits)


def fit_task_logit_correction(logits: Tensor, classes: Sequence[Sequence[int]]) -> TaskLogitCorrection:
    """Fit the constants to training samples of the newest task alone.

    Of each sample and exit the winning logit is left out; then each task's largest should be the same, however old the
    task is and whatever the exit. The mean squared difference from their mean is a quadratic in slope and offset, so
    its minimum is found directly; where it has many, as with two tasks, the one of least norm.

    Args:
        logits: Of samples of the newest task, of shape ``(samples, exits, classes)``.
        classes: The classes of each task seen, oldest first.

    Example::

        >>> logits = torch.tensor([[[1.0, 0.0, 3.0, 2.0]]])
        >>> correction = fit_task_logit_correction(logits, [[0, 1], [2, 3]])
        >>> correction.apply(logits, [[0, 1], [2, 3]])
        tensor([[[2., 1., 3., 2.]]])
    """
    if len(classes) < 2 or logits.shape[0] == 0:
        return TaskLogitCorrection(0.0, 0.0)
    values = logits.detach().double().cpu()
    rest = values.scatter(-1, values.argmax(-1, keepdim=True), -torch.inf)
    largest = torch.stack([rest[..., list(own)].amax(-1) for own in classes], dim=-1)  # (samples, exits, tasks)
    features = torch.zeros(len(classes), 2, dtype=torch.float64)
    for task, (age, _) in enumerate(_old_tasks(classes)):
        features[task] = torch.tensor([age, 1.0])
    # a task whose only class won has no other logit, and no part
    known = largest.isfinite()
    shares = known / known.sum((1, 2), keepdim=True).clamp(min=1)
    largest = largest.where(known, 0)
    targets = largest - (shares * largest).sum((1, 2), keepdim=True)
    design = features - (shares[..., None] * features).sum((1, 2), keepdim=True)
    weights = shares.sqrt()
    solution = torch.linalg.lstsq(
        (design * weights[..., None]).flatten(0, 2), -(targets * weights).flatten()[:, None], driver="gelsd"
    ).solution
    slope, offset = solution.flatten().tolist()
    return TaskLogitCorrection(slope, offset)


def correction_error(logits: Tensor, classes: Sequence[Sequence[int]], correction: TaskLogitCorrection) -> Tensor:
    """Compute what the fit makes small: the mean squared difference of the tasks' largest other logits.

    Args:
        logits: Of shape ``(samples, exits, classes)``.
        classes: The classes of each task seen, oldest first.
        correction: The constants.

    Example::

        >>> logits = torch.tensor([[[1.0, 0.0, 3.0, 1.0]]])
        >>> correction_error(logits, [[0, 1], [2, 3]], TaskLogitCorrection(1.0, 0.0))
        tensor(0.2500)
    """
    rest = correction.apply(logits, classes).scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf)
    largest = torch.stack([rest[..., list(own)].amax(-1) for own in classes], dim=-1)
    largest = largest.masked_fill(largest.isinf(), torch.nan).flatten(1)
    return (largest - largest.nanmean(1, keepdim=True)).square().nanmean(1).mean()


def _old_tasks(classes: Sequence[Sequence[int]]) -> list[tuple[int, Sequence[int]]]:
    """Return age and classes of every task but the newest."""
    return [(len(classes) - 1 - task, own) for task, own in enumerate(classes[:-1])]
