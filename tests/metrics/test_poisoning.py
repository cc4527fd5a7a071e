"""The figures of poison detection against the paper's oracles (arXiv 2507.04106)."""

import math

import pytest
import torch

from lightning_cl.metrics.poisoning import (
    aggregate_runs,
    clean_limit,
    detection_scores,
    shift_angle,
    shift_slope,
)


@pytest.mark.parametrize(
    ("shifts", "degrees"),
    [
        ([1.0, 1.0, 1.0], 45.0),
        ([0.5, 0.25, 0.75], 26.565),
        ([9.0, 0.25, 0.75], 26.565),
        ([0.0, 0.0, 0.0], 0.0),
    ],
)
def test_angle_of_known_shifts(shifts: list[float], degrees: float) -> None:
    assert float(shift_angle(torch.tensor(shifts))) == pytest.approx(degrees, abs=1e-3)


def test_scaling_all_layers_but_the_first_scales_the_tangent() -> None:
    shifts = torch.tensor([3.0, 0.2, 0.9, 0.4], dtype=torch.float64)
    scaled = torch.cat([shifts[:1], 7 * shifts[1:]])
    ratio = shift_angle(scaled).deg2rad().tan() / shift_angle(shifts).deg2rad().tan()
    assert float(ratio) == pytest.approx(7)
    assert float(shift_angle(1e6 * shifts)) < 90


def test_slope_is_the_tangent_of_the_angle() -> None:
    shifts = torch.tensor([3.0, 0.2, 0.9, 0.4], dtype=torch.float64)
    assert float(shift_slope(shifts)) == pytest.approx(math.tan(math.radians(float(shift_angle(shifts)))))


def test_one_layer_has_no_angle() -> None:
    with pytest.raises(ValueError, match=r"`shifts` .*two layers"):
        shift_angle(torch.ones(1))


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("max", 30), ("max+iqr", 34), ("max-iqr", 26), ("p90", 24.4), ("p75", 16)]
)
def test_aggregates_of_known_runs(aggregate: str, expected: float) -> None:
    values = torch.tensor([10.0, 12.0, 14.0, 16.0, 30.0], dtype=torch.float64)
    assert float(aggregate_runs(values, aggregate)) == pytest.approx(expected)  # type: ignore[arg-type]


def test_unknown_aggregates_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"`aggregate` must be one of 'p90', .* got 'p50'"):
        aggregate_runs(torch.ones(2), "p50")  # type: ignore[arg-type]


def test_no_runs_have_no_aggregate() -> None:
    with pytest.raises(ValueError, match="`values`"):
        aggregate_runs(torch.empty(0), "max")


def test_runs_that_are_not_finite_are_left_out_of_the_limit() -> None:
    assert clean_limit([40.0, math.nan, 50.0, math.inf], "angle", "max") == 50
    assert clean_limit([math.nan], "angle", "max") is None


def test_margin_multiplies_the_tangent_of_an_angle() -> None:
    assert clean_limit([45.0], "angle", "max", margin=2) == pytest.approx(math.degrees(math.atan(2)))
    assert clean_limit([1.0], "slope", "max", margin=2) == 2


def test_a_limit_beyond_all_angles_stays_there() -> None:
    assert clean_limit([0.0, 85.0, 86.0], "angle", "max+iqr", margin=3) == pytest.approx(86 + 43)


def test_scores_of_the_published_counts() -> None:
    poisoned = torch.tensor([True] * 20 + [False] * 45)
    flagged = torch.tensor([True] * 17 + [False] * 3 + [True] + [False] * 44)
    scores = detection_scores(flagged, poisoned)
    assert scores.accuracy == pytest.approx(0.938, abs=5e-4)
    assert scores.true_negative_rate == pytest.approx(0.978, abs=5e-4)
    assert scores.true_positive_rate == pytest.approx(0.85)
    assert scores.f1 == pytest.approx(0.895, abs=5e-4)


def test_scores_are_unknown_without_tasks_to_tell_them_from() -> None:
    scores = detection_scores(torch.tensor([False]), torch.tensor([False]))
    assert math.isnan(scores.true_positive_rate)
    assert math.isnan(scores.f1)


def test_scores_need_one_entry_a_task() -> None:
    with pytest.raises(ValueError, match="`flagged` and `poisoned`"):
        detection_scores(torch.ones(2), torch.ones(3))
