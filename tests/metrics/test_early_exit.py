"""Cost and accuracy of a network with exits, by hand and by property."""

import pytest
import torch

from lightning_cl.metrics.early_exit import (
    ExitCurve,
    ExitScores,
    accuracy_at_budget,
    area_under_exit_curve,
    cheapest_threshold,
    exit_curve,
    exit_summary,
    mean_curve,
    overthinking,
)

COSTS = torch.tensor([0.25, 0.6, 1.0])
# three samples at three heads: the first is sure at once, the second at the second head, the third never
CONFIDENCES = torch.tensor([[0.8, 0.9, 0.9], [0.4, 0.75, 0.9], [0.3, 0.5, 0.6]])
CORRECT = torch.tensor([[True, True, True], [False, True, True], [True, False, True]])


@pytest.mark.parametrize(
    ("threshold", "cost", "accuracy"),
    [(0.0, 0.25, 2 / 3), (0.35, (0.25 + 0.25 + 0.6) / 3, 1 / 3), (0.7, (0.25 + 0.6 + 1) / 3, 1.0), (1.0, 1.0, 1.0)],
)
def test_by_hand(threshold, cost, accuracy):
    curve = exit_curve(CONFIDENCES, CORRECT, COSTS, torch.tensor([threshold]))
    assert float(curve.costs) == pytest.approx(cost)
    assert float(curve.accuracies) == pytest.approx(accuracy)


def test_cost_never_falls_and_runs_from_the_first_exit_to_the_last():
    curve = exit_curve(torch.rand(500, 3), torch.rand(500, 3) > 0.5, COSTS)
    assert len(curve.thresholds) == 101
    assert (curve.costs.diff() >= 0).all()
    assert (float(curve.costs[0]), float(curve.costs[-1])) == (0.25, 1.0)


def test_at_the_ends_the_accuracy_is_that_of_the_first_exit_and_of_the_last_head():
    correct = torch.rand(500, 3) > 0.5
    curve = exit_curve(torch.rand(500, 3), correct, COSTS)
    assert float(curve.accuracies[0]) == pytest.approx(float(correct[:, 0].float().mean()))
    assert float(curve.accuracies[-1]) == pytest.approx(float(correct[:, 2].float().mean()))


@pytest.mark.parametrize(("budget", "accuracy"), [(0.2, None), (0.25, 0.5), (0.6, 0.7), (0.99, 0.7), (1.0, 0.65)])
def test_the_accuracy_at_a_budget_is_that_of_the_highest_threshold_within_it(budget, accuracy):
    curve = ExitCurve(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.25, 0.6, 1.0]), torch.tensor([0.5, 0.7, 0.65]))
    found = float(accuracy_at_budget(curve, budget))
    assert found != found if accuracy is None else found == pytest.approx(accuracy)


def test_a_mean_cost_that_is_the_budget_itself_is_within_it():
    """Two tasks, of which one takes 0.1 and the other 0.3 to 0.9 of the network."""
    thresholds = torch.tensor([0.0, 1.0])
    for tenths in range(3, 10):
        flat = [ExitCurve(thresholds, torch.full((2,), share), torch.ones(2)) for share in (0.1, tenths / 10)]
        assert float(accuracy_at_budget(mean_curve(flat), (tenths + 1) / 20)) == 1


def test_a_summary_has_the_curve_of_the_samples():
    scores = ExitScores(torch.rand(200, 3), torch.rand(200, 3) > 0.5)
    for threshold in (None, 0.3, 0.905):
        curve = exit_summary(scores, threshold).curve(COSTS)
        for found, expected in zip(curve, exit_curve(*scores, COSTS), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_summary_knows_each_exit_and_what_was_overthought():
    summary = exit_summary(ExitScores(CONFIDENCES, CORRECT[:, [1, 2, 0]]))
    assert summary.exit_accuracies.tolist() == pytest.approx([2 / 3, 1.0, 2 / 3])
    assert float(summary.overthinking) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("threshold", "thresholds"), [(None, 101), (0.3, 101), (0.84, 101), (0.755, 102), (1.0, 101)])
def test_a_threshold_beside_the_others_is_measured_exactly(threshold, thresholds):
    confidences = torch.tensor([[0.752, 0.9], [0.757, 0.9], [0.3, 0.9]])
    correct = torch.tensor([[True, False], [True, False], [True, False]])
    summary = exit_summary(ExitScores(confidences, correct), threshold)
    assert len(summary.thresholds) == len(summary.shares) == len(summary.accuracies) == thresholds
    shares, accuracy = summary.at(1.0 if threshold is None else threshold)
    early = int((confidences[:, 0] > (1.0 if threshold is None else threshold)).sum())
    assert shares.tolist() == pytest.approx([early / 3, 1 - early / 3])
    assert float(accuracy) == pytest.approx(early / 3)


def test_nothing_is_known_of_a_threshold_that_was_not_measured():
    shares, accuracy = exit_summary(ExitScores(CONFIDENCES, CORRECT), 0.905).at(0.906)
    assert shares.isnan().all()
    assert accuracy.isnan()


def test_the_area_is_the_mean_height():
    flat = ExitCurve(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.2, 0.3, 1.0]), torch.full((3,), 0.7))
    assert float(area_under_exit_curve(flat)) == pytest.approx(0.7)
    point = ExitCurve(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.4, 0.6]))
    assert float(area_under_exit_curve(point)) == pytest.approx(0.6)


def test_overthinking_is_what_an_oracle_has_over_the_last_head():
    correct = torch.rand(300, 4) > 0.6
    lost = sum(bool(row.any()) and not bool(row[-1]) for row in correct)
    assert float(overthinking(correct)) == pytest.approx(lost / 300)
    assert float(overthinking(correct[:, -1:])) == 0


@pytest.mark.parametrize(("points", "threshold"), [(0.0, 1.0), (0.5, 0.5), (10.0, 0.25), (100.0, 0.0)])
def test_the_cheapest_threshold_loses_no_more_points_than_allowed(points, threshold):
    thresholds = torch.tensor([0.0, 0.25, 0.5, 1.0])
    curve = ExitCurve(thresholds, torch.tensor([0.2, 0.4, 0.7, 1.0]), torch.tensor([0.5, 0.75, 0.795, 0.8]))
    assert cheapest_threshold(curve, points) == threshold


@pytest.mark.parametrize("shapes", [((3, 3), (3, 2), (3,)), ((3, 3), (3, 3), (2,)), ((3,), (3,), (3,))], ids=str)
def test_shapes_that_do_not_go_together(shapes):
    with pytest.raises(ValueError, match=r"`confidences` and `correct` must have the shape \(samples, exits\)"):
        exit_curve(*(torch.zeros(shape) for shape in shapes))


def test_shapes_of_scores_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"`confidences` and `correct` must .* got \(3, 3\), \(3, 2\)"):
        exit_summary(ExitScores(torch.zeros(3, 3), torch.zeros(3, 2).bool()))
