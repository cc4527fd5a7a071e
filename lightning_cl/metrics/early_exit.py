"""Figures of a network with several exits, as functions of what each exit says of each sample.

``correct`` and ``confidences`` of shape ``(samples, exits)`` hold, for each sample and exit, whether the exit is right
and how sure it is; ``costs`` of shape ``(exits,)`` what a sample costs that leaves there, as a share of a network
without exits. Exits stand in the order in which a sample meets them, the network's own head last.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cl.heads.exit_rules import first_confident


class ExitScores(NamedTuple):
    """What each exit says of some samples.

    Attributes:
        confidences: How sure each is, of shape ``(samples, exits)``.
        correct: Whether each is right, of the same shape.
    """

    confidences: Tensor
    correct: Tensor


class ExitCurve(NamedTuple):
    """Mean cost and accuracy for each threshold, of shape ``(thresholds,)`` each.

    Attributes:
        thresholds: Ascending.
        costs: Mean over the samples; never falls as the threshold rises.
        accuracies: Share of samples that are right where they leave.
    """

    thresholds: Tensor
    costs: Tensor
    accuracies: Tensor


def exit_curve(confidences: Tensor, correct: Tensor, costs: Tensor, thresholds: Tensor | int = 101) -> ExitCurve:
    """Compute what a network costs and how often it is right, for each threshold.

    Args:
        confidences: Of shape ``(samples, exits)``.
        correct: Of shape ``(samples, exits)``.
        costs: Of shape ``(exits,)``.
        thresholds: The thresholds, or how many from 0 to 1.

    Example::

        >>> confidences = torch.tensor([[0.9, 0.9], [0.4, 0.8]])
        >>> correct = torch.tensor([[True, True], [False, True]])
        >>> exit_curve(confidences, correct, torch.tensor([0.5, 1.0]), torch.tensor([0.0, 0.5, 1.0]))
        ExitCurve(thresholds=tensor([0.0000, 0.5000, 1.0000]), costs=tensor([0.5000, 0.7500, 1.0000]), accuracies=tensor([0.5000, 1.0000, 1.0000]))
    """  # noqa: E501
    _check(confidences, correct, costs)
    if isinstance(thresholds, int):
        thresholds = torch.linspace(0, 1, thresholds)
    points = []
    for threshold in thresholds.tolist():
        taken = first_confident(confidences, threshold)
        right = correct.gather(1, taken[:, None]).float().mean()
        points.append(torch.stack([costs.float()[taken].mean(), right]))
    mean_costs, accuracies = torch.stack(points).unbind(1)
    return ExitCurve(thresholds, mean_costs, accuracies)


def mean_curve(curves: Sequence[ExitCurve]) -> ExitCurve:
    """Average the curves of several tasks, threshold by threshold.

    Args:
        curves: Their curves at the same thresholds.

    Example::

        >>> thresholds = torch.tensor([0.0, 1.0])
        >>> first = ExitCurve(thresholds, torch.tensor([0.5, 1.0]), torch.tensor([0.6, 0.8]))
        >>> second = ExitCurve(thresholds, torch.tensor([0.5, 1.0]), torch.tensor([0.4, 1.0]))
        >>> mean_curve([first, second]).accuracies
        tensor([0.5000, 0.9000])
    """
    costs, accuracies = (
        torch.stack([getattr(curve, name) for curve in curves]).mean(0) for name in ExitCurve._fields[1:]
    )
    return ExitCurve(curves[0].thresholds, costs, accuracies)


def accuracy_at_budget(curve: ExitCurve, budget: float) -> Tensor:
    """Find the accuracy at the highest threshold whose mean cost is within a budget; NaN if none is.

    Args:
        curve: Cost and accuracy by threshold.
        budget: As a share of the network without exits.

    Example::

        >>> curve = ExitCurve(torch.tensor([0.0, 0.5]), torch.tensor([0.4, 0.8]), torch.tensor([0.6, 0.7]))
        >>> accuracy_at_budget(curve, 0.5), accuracy_at_budget(curve, 0.25)
        (tensor(0.6000), tensor(nan))
    """
    within = (curve.costs <= budget).nonzero().flatten()
    return curve.accuracies[within[-1]] if len(within) else curve.accuracies.new_tensor(torch.nan)


def area_under_exit_curve(curve: ExitCurve) -> Tensor:
    """Compute the mean accuracy over the costs between the cheapest and the dearest point, by the trapezoid rule.

    Args:
        curve: Cost and accuracy by threshold.

    Example::

        >>> curve = ExitCurve(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.6, 0.8]))
        >>> area_under_exit_curve(curve)
        tensor(0.7000)
    """
    span = curve.costs[-1] - curve.costs[0]
    if float(span) <= 0:
        return curve.accuracies[-1]
    return torch.trapezoid(curve.accuracies, curve.costs) / span


def overthinking(correct: Tensor) -> Tensor:
    """Compute the share of samples that the last head has wrong and an earlier exit had right (arXiv 1810.07052).

    Args:
        correct: Of shape ``(samples, exits)``.

    Example::

        >>> overthinking(torch.tensor([[True, False], [True, True], [False, True], [False, False]]))
        tensor(0.2500)
    """
    return correct.any(1).float().mean() - correct[:, -1].float().mean()


def cheapest_threshold(curve: ExitCurve, points: float) -> float:
    """Find the threshold of least cost whose accuracy is at most so far below that of the last threshold.

    Args:
        curve: Cost and accuracy by threshold.
        points: Percentage points that may be lost.

    Example::

        >>> accuracies = torch.tensor([0.6, 0.795, 0.8])
        >>> cheapest_threshold(ExitCurve(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.2, 0.4, 1.0]), accuracies), 1.0)
        0.5
    """
    # accuracies are counts of samples, and a point lost exactly is no point too many
    enough = curve.accuracies >= curve.accuracies[-1] - points / 100 - 1e-6
    costs = curve.costs.where(enough, torch.inf)
    return float(curve.thresholds[costs.argmin()])


def _check(confidences: Tensor, correct: Tensor, costs: Tensor) -> None:
    if confidences.dim() != 2 or confidences.shape != correct.shape or costs.shape != confidences.shape[1:]:
        raise ValueError(
            "`confidences` and `correct` must have the shape (samples, exits) and `costs` (exits,), got"
            f" {tuple(confidences.shape)}, {tuple(correct.shape)} and {tuple(costs.shape)}."
        )
