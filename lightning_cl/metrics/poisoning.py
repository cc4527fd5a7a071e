"""What tells a poisoned task from a clean one (arXiv 2507.04106): angles, thresholds, and how good a detector is."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Statistic = Literal["angle", "slope"]
Aggregate = Literal["p90", "max", "p75", "max+iqr", "max-iqr"]

STATISTICS = ("angle", "slope")
AGGREGATES = ("p90", "max", "p75", "max+iqr", "max-iqr")


def shift_slope(shifts: Tensor) -> Tensor:
    r"""Compute how steeply the cumulative shift rises over the layers.

    With :math:`c_l = v_1 + \dots + v_l` that is :math:`(c_L - c_1) / (L - 1)`, the mean shift of all layers but the
    first.

    Args:
        shifts: How far each layer moved, in the order of the layers, ``(layers,)``.

    Raises:
        ValueError: If there are less than two layers.

    Example::

        >>> shift_slope(torch.tensor([9.0, 0.25, 0.75]))
        tensor(0.5000)
    """
    if shifts.ndim != 1 or len(shifts) < 2:
        raise ValueError(f"`shifts` must have the shape (layers,) with two layers at least, got {tuple(shifts.shape)}.")
    return shifts[1:].mean()


def shift_angle(shifts: Tensor) -> Tensor:
    """Compute the angle of the cumulative shift over the layers, in degrees from 0 to 90; see `shift_slope`.

    Args:
        shifts: How far each layer moved, in the order of the layers, ``(layers,)``.

    Example::

        >>> shift_angle(torch.ones(3))
        tensor(45.)
    """
    return shift_slope(shifts).atan().rad2deg()


def aggregate_runs(values: Tensor, aggregate: Aggregate) -> Tensor:
    """Compute a threshold from what several clean trainings gave.

    Percentiles are interpolated linearly; "iqr" is the difference of the third and the first quartile.

    Args:
        values: Statistics of the runs, ``(runs,)``.
        aggregate: How they become one.

    Example::

        >>> aggregate_runs(torch.tensor([10.0, 12.0, 14.0, 16.0, 30.0]), "p90")
        tensor(24.4000)
    """
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"`values` must have the shape (runs,) with one run at least, got {tuple(values.shape)}.")
    if aggregate in ("p90", "p75"):
        return values.quantile(int(aggregate[1:]) / 100)
    if aggregate not in AGGREGATES:
        raise ValueError(f"`aggregate` must be one of {', '.join(map(repr, AGGREGATES))}, got {aggregate!r}.")
    spread = values.quantile(0.75) - values.quantile(0.25)
    return values.max() + {"max": 0, "max+iqr": 1, "max-iqr": -1}[aggregate] * spread


def clean_limit(
    values: Sequence[float], statistic: Statistic, aggregate: Aggregate, margin: float = 1.0
) -> float | None:
    """Compute what a clean task stays at or under, from what clean trainings gave.

    Args:
        values: Angles in degrees or slopes of the trainings; those that are not finite are left out.
        statistic: Which of the two they are.
        aggregate: How they become one; see `aggregate_runs`.
        margin: What the limit is multiplied by: its tangent, for an angle.

    Returns:
        The limit, ``None`` where there is no finite value.

    Example::

        >>> clean_limit([0.5, 1.5], "slope", "max", margin=2)
        3.0
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    limit = float(aggregate_runs(torch.tensor(finite, dtype=torch.float64), aggregate))
    if statistic == "slope":
        return limit * margin
    if margin == 1 or limit >= 90:  # an interquartile range may lead beyond any angle
        return limit
    return math.degrees(math.atan(math.tan(math.radians(limit)) * margin))


class DetectionScores(NamedTuple):
    """How good a detector is.

    Args:
        accuracy: Share of all tasks that were judged rightly.
        true_negative_rate: Share of the clean tasks that were not flagged.
        true_positive_rate: Share of the poisoned tasks that were flagged.
        f1: Harmonic mean of the last and of the share of the flagged tasks that were poisoned.
    """

    accuracy: float
    true_negative_rate: float
    true_positive_rate: float
    f1: float


def detection_scores(flagged: Tensor, poisoned: Tensor) -> DetectionScores:
    """Compute how good a detector is; NaN where there is no task to tell it from.

    Args:
        flagged: Which tasks were taken for poisoned, ``(tasks,)``.
        poisoned: Which tasks were, ``(tasks,)``.

    Example::

        >>> scores = detection_scores(torch.tensor([True, False, True]), torch.tensor([True, False, False]))
        >>> round(scores.accuracy, 2), scores.true_negative_rate, scores.true_positive_rate, round(scores.f1, 2)
        (0.67, 0.5, 1.0, 0.67)
    """
    flagged, poisoned = flagged.bool(), poisoned.bool()
    if flagged.shape != poisoned.shape:
        raise ValueError(
            f"`flagged` and `poisoned` must have one entry a task, got {tuple(flagged.shape)} and"
            f" {tuple(poisoned.shape)}."
        )
    hits, alarms = int((flagged & poisoned).sum()), int((flagged & ~poisoned).sum())
    misses, clean = int((~flagged & poisoned).sum()), int((~flagged & ~poisoned).sum())
    return DetectionScores(
        accuracy=_share(hits + clean, len(flagged)),
        true_negative_rate=_share(clean, clean + alarms),
        true_positive_rate=_share(hits, hits + misses),
        f1=_share(2 * hits, 2 * hits + alarms + misses),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
