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

GRID_POINTS = 101


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


class ExitSummary(NamedTuple):
    """What the figures of a network with exits need to know of some samples, however many these are.

    Attributes:
        thresholds: 101 from 0 to 1, ascending, and after them the one that was asked for, if it is none of these.
        shares: Share of the samples that leave at each exit, of shape ``(thresholds, exits)``.
        accuracies: Share of the samples that are right where they leave, of shape ``(thresholds,)``.
        exit_accuracies: Accuracy of each exit on all samples, of shape ``(exits,)``.
        overthinking: Share of the samples that the last head has wrong and an earlier exit had right.
    """

    thresholds: Tensor
    shares: Tensor
    accuracies: Tensor
    exit_accuracies: Tensor
    overthinking: Tensor

    def curve(self, costs: Tensor) -> ExitCurve:
        """Compute mean cost and accuracy for the thresholds from 0 to 1.

        Args:
            costs: What a sample costs that leaves at each exit, of shape ``(exits,)``.
        """
        shares = self.shares[:GRID_POINTS]
        return ExitCurve(self.thresholds[:GRID_POINTS], _mean_costs(shares, costs), self.accuracies[:GRID_POINTS])

    def at(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Look up the shares of samples that leave at each exit, and the accuracy, at one of the thresholds.

        Args:
            threshold: One of those that were measured; the same in single precision, as the rule reads it, is enough.

        Returns:
            Of shape ``(exits,)`` and ``()``; NaN if nothing was measured at this threshold.
        """
        found = (self.thresholds == threshold).nonzero().flatten()
        if not len(found):
            return torch.full_like(self.shares[0], torch.nan), torch.full_like(self.accuracies[0], torch.nan)
        return self.shares[found[0]], self.accuracies[found[0]]


def exit_summary(scores: ExitScores, threshold: float | None = None) -> ExitSummary:
    """Sum up what each exit says of some samples; cost and accuracy for each threshold follow from it.

    Args:
        scores: What each exit says of the samples.
        threshold: One to be measured beside the 101 from 0 to 1.

    Example::

        >>> scores = ExitScores(torch.tensor([[0.9, 0.9], [0.4, 0.8]]), torch.tensor([[True, True], [False, True]]))
        >>> summary = exit_summary(scores, threshold=0.405)
        >>> summary.at(0.405)
        (tensor([0.5000, 0.5000]), tensor(1.))
        >>> summary.curve(torch.tensor([0.5, 1.0])).costs[[0, 50, 100]]
        tensor([0.5000, 0.7500, 1.0000])
    """
    confidences, correct = scores
    _check(confidences, correct)
    thresholds = _grid(GRID_POINTS)
    if threshold is not None and not (thresholds == threshold).any():
        thresholds = torch.cat([thresholds, thresholds.new_tensor([threshold])])
    shares, accuracies = _leaving(confidences, correct, thresholds)
    return ExitSummary(thresholds, shares, accuracies, correct.float().mean(0), overthinking(correct))


def exit_curve(
    confidences: Tensor, correct: Tensor, costs: Tensor, thresholds: Tensor | int = GRID_POINTS
) -> ExitCurve:
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
        thresholds = _grid(thresholds)
    shares, accuracies = _leaving(confidences, correct, thresholds)
    return ExitCurve(thresholds, _mean_costs(shares, costs), accuracies)


def _grid(points: int) -> Tensor:
    # in single precision some would lie beside the 0.3 that a user types
    return torch.linspace(0, 1, points, dtype=torch.float64).float()


def _leaving(confidences: Tensor, correct: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each threshold the share of samples that leave at each exit, and of those that are right there."""
    shares, accuracies = [], []
    for threshold in thresholds.tolist():
        taken = first_confident(confidences, threshold)
        shares.append(taken.bincount(minlength=confidences.shape[1]) / len(taken))
        accuracies.append(correct.gather(1, taken[:, None]).float().mean())
    return torch.stack(shares), torch.stack(accuracies)


def _mean_costs(shares: Tensor, costs: Tensor) -> Tensor:
    return (shares * costs.float()).sum(-1)


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
    # a mean that is the budget itself comes out a rounding above it at times
    within = (curve.costs <= budget + 1e-6).nonzero().flatten()
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


def _check(confidences: Tensor, correct: Tensor, costs: Tensor | None = None) -> None:
    exits = confidences.shape[1:] if costs is None else costs.shape
    if confidences.dim() != 2 or confidences.shape != correct.shape or exits != confidences.shape[1:]:
        shapes = [tuple(part.shape) for part in (confidences, correct, costs) if part is not None]
        raise ValueError(
            "`confidences` and `correct` must have the shape (samples, exits) and `costs` (exits,), got"
            f" {', '.join(map(str, shapes))}."
        )
