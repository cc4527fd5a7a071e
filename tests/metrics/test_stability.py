import math

import numpy as np
import pytest
import torch

from lightning_cl.metrics import stability

NAN = math.nan
ORACLE = [0.9, 0.5, 0.6, 0.7, 0.3, 0.6]


def _random_curve(seed):
    """A curve with unseen tasks, and on some seeds a skipped task, later first tasks and evaluations with holes."""
    rng = np.random.default_rng(seed)
    num_tasks = int(rng.integers(1, 7))
    tasks = [task for task in range(num_tasks) if rng.random() < 0.8] or [num_tasks - 1]
    trained = [task for task in tasks for _ in range(rng.integers(1, 9))]
    curve = np.full((len(trained), num_tasks), NAN)
    for n, current in enumerate(trained):
        for task in tasks:
            if task <= current:
                curve[n, task] = rng.integers(0, 11) / 10 if seed % 2 else rng.random()
    if seed % 3 == 0:
        curve[rng.random(curve.shape) < 0.2] = NAN
    return curve, trained


def _mean(values):
    return sum(values) / len(values) if values else NAN


def _measured(curve, task, wanted):
    return [float(row[task]) for n, row in enumerate(curve) if wanted(n) and not math.isnan(row[task])]


def _reference_minima(curve, trained):
    minima = {}
    for task in range(trained[-1]):
        later = _measured(curve, task, lambda n, task=task: trained[n] > task)
        if later:
            minima[task] = min(later)
    return minima


def _reference_min_accuracy(curve, trained):
    return _mean(list(_reference_minima(curve, trained).values()))


def _reference_worst_case_accuracy(curve, trained):
    newest = trained[-1]
    own = _measured(curve, newest, lambda n: trained[n] == newest)
    if not own:
        return NAN
    k = 1 + len(_reference_minima(curve, trained))
    return own[-1] if k == 1 else own[-1] / k + (1 - 1 / k) * _reference_min_accuracy(curve, trained)


def _reference_task_minimum_accuracy(curve, trained):
    newest = trained[-1]
    during = [_measured(curve, task, lambda n: trained[n] == newest) for task in range(newest)]
    return _mean([min(values) for values in during if values])


def _reference_windowed(curve, window, sign):
    changes = []
    for task in range(curve.shape[1]):
        series = [float(value) for value in curve[:, task]]
        if all(math.isnan(value) for value in series):
            continue
        largest = 0.0
        for n in range(len(series)):
            for m in range(n):
                if n - m <= window - 1 and not math.isnan(series[m]) and not math.isnan(series[n]):
                    largest = max(largest, sign * (series[m] - series[n]))
        changes.append(largest)
    return _mean(changes)


def _reference_gaps(curve, trained):
    gaps = {}
    for newest in sorted(set(trained)):
        for task in range(newest):
            before = _measured(curve, task, lambda n, newest=newest: trained[n] < newest)
            during = _measured(curve, task, lambda n, newest=newest: trained[n] == newest)
            if before and during:
                gaps[newest, task] = (before[-1], min(during), during[-1])
    return gaps


def _reference_of_gaps(curve, trained, figure):
    by_task = {}
    for (newest, _), gap in _reference_gaps(curve, trained).items():
        value = figure(*gap)
        if value is not None:
            by_task.setdefault(newest, []).append(value)
    return _mean([_mean(values) for values in by_task.values()])


GAP_FIGURES = {
    stability.stability_gap: lambda last, low, final: last - low,
    stability.normalized_stability_gap: lambda last, low, final: (last - low) / last if last else None,
    stability.recovery: lambda last, low, final: final - low,
    stability.normalized_recovery: lambda last, low, final: (final - low) / last if last else None,
}
MINIMA = {
    stability.min_accuracy: _reference_min_accuracy,
    stability.worst_case_accuracy: _reference_worst_case_accuracy,
    stability.task_minimum_accuracy: _reference_task_minimum_accuracy,
}


def _tensors(curve, trained):
    return torch.from_numpy(curve), torch.tensor(trained)


@pytest.mark.parametrize("seed", range(90))
def test_every_figure_equals_its_slow_reference_on_random_curves(seed):
    curve, trained = _random_curve(seed)
    tensors = _tensors(curve, trained)
    pairs = [(figure(*tensors), reference(curve, trained)) for figure, reference in MINIMA.items()]
    pairs += [
        (figure(*tensors), _reference_of_gaps(curve, trained, reference)) for figure, reference in GAP_FIGURES.items()
    ]
    for window in (2, 3, 5, 100):
        pairs.append((stability.windowed_forgetting(tensors[0], window), _reference_windowed(curve, window, 1)))
        pairs.append((stability.windowed_plasticity(tensors[0], window), _reference_windowed(curve, window, -1)))
    for got, expected in pairs:
        assert got.shape == ()
        assert float(got) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(30))
def test_the_gap_matrices_equal_their_slow_reference(seed):
    curve, trained = _random_curve(seed)
    expected = torch.full((3, curve.shape[1], curve.shape[1]), NAN, dtype=torch.float64)
    for (newest, task), gap in _reference_gaps(curve, trained).items():
        expected[:, newest, task] = torch.tensor(gap, dtype=torch.float64)
    torch.testing.assert_close(
        torch.stack(stability.stability_gaps(*_tensors(curve, trained))), expected, equal_nan=True
    )


@pytest.mark.parametrize(("window", "fall"), [(2, 0.4), (3, 0.4), (6, 0.6)])
def test_the_windowed_figures_of_a_hand_computed_series(window, fall):
    curve = torch.tensor(ORACLE).unsqueeze(1)
    assert stability.windowed_forgetting(curve, window).item() == pytest.approx(fall)
    assert stability.windowed_plasticity(curve, window).item() == pytest.approx(0.3)


def test_a_rise_after_a_deep_fall_is_plasticity():
    assert stability.windowed_plasticity(torch.tensor([[0.9], [0.1], [0.5]]), 3).item() == pytest.approx(0.4)


def test_the_minimum_and_the_worst_case_of_a_hand_computed_curve():
    curve = torch.tensor([[1.0, NAN], *([accuracy, 0.7] for accuracy in ORACLE)])
    trained = torch.tensor([0, 1, 1, 1, 1, 1, 1])
    assert stability.min_accuracy(curve, trained).item() == pytest.approx(0.3)
    assert stability.worst_case_accuracy(curve, trained).item() == pytest.approx(0.5)


def test_the_gap_and_the_recovery_of_a_hand_computed_curve():
    curve, trained = torch.tensor([[0.1, NAN], [0.8, NAN], [0.3, 0.2], [0.6, 0.9]]), torch.tensor([0, 0, 1, 1])
    assert stability.stability_gap(curve, trained).item() == pytest.approx(0.5)
    assert stability.normalized_stability_gap(curve, trained).item() == pytest.approx(0.625)
    assert stability.recovery(curve, trained).item() == pytest.approx(0.3)
    assert stability.normalized_recovery(curve, trained).item() == pytest.approx(0.375)


def test_a_gap_is_averaged_over_old_tasks_first_and_over_tasks_then():
    curve = torch.tensor([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.4, 0.2, 0.9]])
    gap = stability.stability_gap(curve, torch.tensor([0, 1, 2]))
    assert gap.item() == pytest.approx((0.4 + (0.1 + 0.6) / 2) / 2)


def test_the_papers_two_minima_differ_after_an_early_fall():
    curve, trained = torch.tensor([[0.9, NAN, NAN], [0.2, 0.8, NAN], [0.5, 0.3, 0.9]]), torch.tensor([0, 1, 2])
    assert stability.min_accuracy(curve, trained).item() == pytest.approx((0.2 + 0.3) / 2)
    assert stability.task_minimum_accuracy(curve, trained).item() == pytest.approx((0.5 + 0.3) / 2)


def test_a_low_accuracy_before_the_end_of_a_tasks_own_training_is_no_minimum():
    curve = torch.tensor([[0.1, NAN], [0.9, NAN], [0.7, 0.8]])
    assert stability.min_accuracy(curve, torch.tensor([0, 0, 1])).item() == pytest.approx(0.7)


def test_a_skipped_task_does_not_count():
    curve, trained = torch.tensor([[0.9, NAN, NAN], [0.3, NAN, 0.7]]), torch.tensor([0, 2])
    assert stability.worst_case_accuracy(curve, trained).item() == pytest.approx((0.7 + 0.3) / 2)
    assert stability.stability_gap(curve, trained).item() == pytest.approx(0.6)


def test_a_first_task_has_a_worst_case_and_nothing_old():
    curve, trained = torch.tensor([[0.2], [0.6]]), torch.tensor([0, 0])
    assert stability.worst_case_accuracy(curve, trained).item() == pytest.approx(0.6)
    for figure in (stability.min_accuracy, stability.task_minimum_accuracy, *GAP_FIGURES):
        assert figure(curve, trained).isnan()


def test_a_task_measured_once_counts_as_never_having_fallen():
    curve = torch.tensor([[0.9, NAN, NAN], [0.5, 0.8, NAN]])
    assert stability.windowed_forgetting(curve).item() == pytest.approx((0.4 + 0.0) / 2)


def test_a_task_without_accuracy_has_no_share_to_lose():
    curve, trained = torch.tensor([[0.0, NAN, NAN], [0.0, 0.8, NAN], [0.2, 0.4, 0.9]]), torch.tensor([0, 1, 2])
    assert stability.normalized_stability_gap(curve, trained).item() == pytest.approx(0.5)
    assert stability.normalized_recovery(curve, trained).item() == pytest.approx(0.0)


def test_a_task_that_was_not_measured_before_a_gap_is_left_out_of_it():
    curve, trained = torch.tensor([[0.9, NAN, NAN], [0.4, NAN, NAN], [0.3, 0.5, 0.8]]), torch.tensor([0, 1, 2])
    gaps = stability.stability_gaps(curve, trained)
    assert all(matrix[2, 1].isnan() and not matrix[2, 0].isnan() for matrix in gaps)
    assert stability.recovery(torch.tensor([[NAN, NAN], [0.2, NAN], [0.6, 0.1]]), torch.tensor([0, 1, 1])).isnan()


def test_no_evaluations_give_nan():
    curve, trained = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert all(figure(curve, trained).isnan() for figure in (*MINIMA, *GAP_FIGURES))
    assert stability.windowed_forgetting(curve).isnan()
    assert stability.windowed_plasticity(curve).isnan()


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("figure", [stability.windowed_forgetting, stability.windowed_plasticity])
def test_a_wider_window_sees_no_less(seed, figure):
    curve, _ = _random_curve(seed)
    values = [figure(torch.from_numpy(curve), window).item() for window in range(2, 12)]
    assert values == sorted(values) or all(map(math.isnan, values))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("figure", [stability.windowed_forgetting, stability.windowed_plasticity])
def test_a_windowed_figure_of_the_same_tasks_never_gets_smaller(seed, figure):
    curve = torch.from_numpy(np.random.default_rng(seed).random((25, 3)))
    values = [figure(curve[:n], 4).item() for n in range(1, 26)]
    assert values == sorted(values)


@pytest.mark.parametrize("seed", [seed for seed in range(60) if seed % 3])
def test_the_worst_case_is_no_better_than_the_average_accuracy(seed):
    curve, trained = _tensors(*_random_curve(seed))
    average = curve[-1].nanmean()
    assert stability.worst_case_accuracy(curve, trained) <= average + 1e-12


def test_the_input_is_left_as_it_was():
    curve, trained = _tensors(*_random_curve(4))
    before = curve.clone()
    for figure in (*MINIMA, *GAP_FIGURES):
        figure(curve, trained)
    stability.windowed_plasticity(curve)
    torch.testing.assert_close(curve, before, rtol=0, atol=0, equal_nan=True)


def test_the_recency_bias_weighs_every_old_task_the_same():
    predicted = torch.tensor([2, 0, 1, 0, 2, 2, 2, 2])
    evaluated = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3])
    assert stability.task_recency_bias(predicted, evaluated, current=2).item() == pytest.approx((0.25 + 1.0) / 2)


def test_the_recency_bias_needs_samples_of_old_tasks():
    assert stability.task_recency_bias(torch.tensor([1, 1]), torch.tensor([1, 1]), current=1).isnan()
    assert stability.task_recency_bias(torch.tensor([0]), torch.tensor([0]), current=0).isnan()
    assert stability.task_recency_bias(torch.tensor([2, 0]), torch.tensor([1, 1]), current=2).item() == 0.5


@pytest.mark.parametrize("figure", [stability.windowed_forgetting, stability.windowed_plasticity])
@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_without_a_pair_is_refused(figure, window):
    with pytest.raises(ValueError, match=rf"`window` must be 2 evaluations or more, got {window}\."):
        figure(torch.zeros(3, 2), window)


@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, 2, 1)])
def test_a_curve_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"`curve` must have the shape \(evaluations, tasks\), got \(3,"):
        stability.min_accuracy(torch.zeros(shape), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`curve` must have the shape"):
        stability.windowed_forgetting(torch.zeros(shape))


@pytest.mark.parametrize("curve", [[[0.9]], torch.zeros(1, 2, dtype=torch.long)])
def test_a_curve_that_is_no_floating_point_tensor_is_refused(curve):
    with pytest.raises(TypeError, match="`curve` must be a tensor of a floating point type, got"):
        stability.recovery(curve, torch.tensor([0]))


@pytest.mark.parametrize("trained", [[0], torch.tensor([0.0]), torch.tensor([True])])
def test_tasks_that_are_no_integers_are_refused(trained):
    with pytest.raises(TypeError, match="`trained` must be a tensor of an integer type, got"):
        stability.stability_gap(torch.zeros(1, 2), trained)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (torch.tensor([0, 1]), r"`trained` has shape \(2,\); .* shape \(3,\)"),
        (torch.tensor([[0, 1, 1]]), r"`trained` has shape \(1, 3\); .* shape \(3,\)"),
        (torch.tensor([0, 1, 2]), r"`trained` must hold tasks from 0 to 1, got \[0, 1, 2\]"),
        (torch.tensor([-1, 0, 1]), r"`trained` must hold tasks from 0 to 1, got \[-1, 0, 1\]"),
        (torch.tensor([0, 1, 0]), r"`trained` must not decrease, got task 0 after task 1 at evaluation 2"),
        (torch.tensor([0, 1, 0], dtype=torch.uint8), r"`trained` must not decrease"),
    ],
)
def test_tasks_that_do_not_fit_the_curve_are_refused(trained, message):
    with pytest.raises(ValueError, match=message):
        stability.worst_case_accuracy(torch.zeros(3, 2), trained)


def test_samples_that_do_not_fit_are_refused():
    tasks = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"`predicted_task` has shape \(2,\) and `evaluated_task` \(1,\)"):
        stability.task_recency_bias(tasks, tasks[:1], current=1)
    with pytest.raises(ValueError, match=r"`current` must be the index of a task, 0 or more, got -1"):
        stability.task_recency_bias(tasks, tasks, current=-1)
    with pytest.raises(ValueError, match=r"`evaluated_task` must hold tasks from 0 on, got -1"):
        stability.task_recency_bias(tasks, tasks - 1, current=1)
    with pytest.raises(TypeError, match="`predicted_task` must be a tensor of an integer type, got a tensor of"):
        stability.task_recency_bias(tasks.float(), tasks, current=1)
