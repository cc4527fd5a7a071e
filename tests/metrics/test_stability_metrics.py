import copy
import inspect
import math

import pytest
import torch
from matplotlib.figure import Figure
from torchmetrics import MetricCollection

from lightning_cl import metrics
from lightning_cl.metrics import stability

NAN = math.nan
FIGURES = {
    metrics.MinAccuracy: stability.min_accuracy,
    metrics.WorstCaseAccuracy: stability.worst_case_accuracy,
    metrics.TaskMinimumAccuracy: stability.task_minimum_accuracy,
    metrics.StabilityGap: stability.stability_gap,
    metrics.NormalizedStabilityGap: stability.normalized_stability_gap,
    metrics.Recovery: stability.recovery,
    metrics.NormalizedRecovery: stability.normalized_recovery,
}
WINDOWED = {
    metrics.WindowedForgetting: stability.windowed_forgetting,
    metrics.WindowedPlasticity: stability.windowed_plasticity,
}
CURVE_METRICS = [*FIGURES, *WINDOWED]
ALL_METRICS = [*CURVE_METRICS, metrics.TaskRecencyBias]


def _random_curve(seed):
    """A curve of four tasks with unseen ones, and on some seeds a skipped task and holes."""
    generator = torch.Generator().manual_seed(seed)
    tasks = [0, 1, 2, 3] if seed % 2 else [0, 2, 3]
    lengths = torch.randint(1, 6, (len(tasks),), generator=generator).tolist()
    trained = torch.tensor(tasks).repeat_interleave(torch.tensor(lengths))
    seen = (torch.arange(4) <= trained.unsqueeze(1)) & torch.isin(torch.arange(4), torch.tensor(tasks))
    curve = torch.rand(len(trained), 4, generator=generator).masked_fill(~seen, NAN)
    if seed % 3 == 0:
        curve[torch.rand(curve.shape, generator=generator) < 0.2] = NAN
    return curve, trained


def _fed(metric, curve, trained):
    for accuracies, task in zip(curve, trained.tolist(), strict=True):
        metric.update(accuracies, task)
    return metric


def _assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("metric", FIGURES)
def test_a_metric_is_its_function_at_every_evaluation(metric, seed):
    curve, trained = _random_curve(seed)
    running = metric(4)
    for n in range(len(curve)):
        running.update(curve[n], int(trained[n]))
        _assert_same(running.compute(), FIGURES[metric](curve[: n + 1], trained[: n + 1]))


@pytest.mark.parametrize("window", [2, 3, 10, 50])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("metric", WINDOWED)
def test_a_windowed_metric_is_its_function_at_every_evaluation(metric, seed, window):
    curve, trained = _random_curve(seed)
    running = metric(4, window)
    for n in range(len(curve)):
        running.update(curve[n], int(trained[n]))
        _assert_same(running.compute(), WINDOWED[metric](curve[: n + 1], window))


@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_a_metric_resumed_in_the_middle_gives_the_same_value(metric):
    curve, trained = _random_curve(1)
    for middle in range(1, len(curve)):
        first = _fed(metric(4), curve[:middle], trained[:middle])
        first.persistent(True)
        resumed = metric(4)
        resumed.persistent(True)
        resumed.load_state_dict(first.state_dict())
        _assert_same(
            _fed(resumed, curve[middle:], trained[middle:]).compute(), _fed(metric(4), curve, trained).compute()
        )


@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_going_on_leaves_the_loaded_state_as_it_was(metric):
    curve, trained = _random_curve(1)
    first = _fed(metric(4), curve[:5], trained[:5])
    first.persistent(True)
    state = first.state_dict()
    saved = copy.deepcopy(state)
    resumed = metric(4)
    resumed.load_state_dict(state)
    _fed(resumed, curve[5:], trained[5:])
    for name, value in saved.items():
        _assert_same(state[name], value)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_processes_with_equal_values_sync_to_the_value_of_one(metric, processes):
    curve, trained = _random_curve(1)
    synced = metric(
        4,
        dist_sync_fn=lambda value, group: [value.clone() for _ in range(processes)],
        distributed_available_fn=lambda: True,
    )
    expected = metric(4)
    for n in range(len(curve)):
        synced.update(curve[n], int(trained[n]))
        expected.update(curve[n], int(trained[n]))
        _assert_same(synced.compute(), expected.compute())


@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_forward_counts_as_an_update(metric):
    curve, trained = _random_curve(3)
    forwarded = metric(4)
    for accuracies, task in zip(curve, trained.tolist(), strict=True):
        forwarded(accuracies, task)
    _assert_same(forwarded.compute(), _fed(metric(4), curve, trained).compute())


@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_the_states_do_not_grow_with_the_evaluations(metric):
    running = metric(4)
    sizes = {name: value.shape for name, value in running.metric_state.items()}
    _fed(running, torch.rand(50, 4), torch.zeros(50, dtype=torch.long))
    assert {name: value.shape for name, value in running.metric_state.items()} == sizes


@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_a_metric_starts_anew_after_reset(metric):
    curve, trained = _random_curve(1)
    running = _fed(metric(4), curve, trained)
    running.reset()
    _assert_same(_fed(running, curve[:4], trained[:4]).compute(), _fed(metric(4), curve[:4], trained[:4]).compute())


def test_a_collection_gives_every_metric_its_own_value():
    curve, trained = _random_curve(1)
    collection = _fed(MetricCollection([metric(4) for metric in CURVE_METRICS]), curve, trained)
    for name, value in collection.compute().items():
        _assert_same(value, _fed(getattr(metrics, name)(4), curve, trained).compute())


def _samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 4, (200,), generator=generator) for _ in range(2))


@pytest.mark.parametrize("current", range(4))
def test_the_recency_bias_of_batches_is_that_of_all_samples(current):
    predicted, evaluated = _samples()
    metric = metrics.TaskRecencyBias(4)
    for batch in torch.arange(200).split([7, 100, 0, 93]):
        metric.update(predicted[batch], evaluated[batch], current)
    _assert_same(metric.compute(), stability.task_recency_bias(predicted, evaluated, current))


def test_two_processes_shares_give_the_recency_bias_of_the_whole():
    predicted, evaluated = _samples()
    share, other = metrics.TaskRecencyBias(4), metrics.TaskRecencyBias(4)
    share.update(predicted[:50], evaluated[:50], 3)
    other.update(predicted[50:], evaluated[50:], 3)
    share.merge_state(other)
    _assert_same(share.compute(), stability.task_recency_bias(predicted, evaluated, 3))


def test_the_recency_bias_is_that_of_the_last_newest_task():
    metric = metrics.TaskRecencyBias(4)
    for current in (1, 2):
        metric.update(*_samples(current), current)
    _assert_same(metric.compute(), stability.task_recency_bias(*_samples(2), 2))


def test_a_resumed_recency_bias_is_that_of_all_samples():
    predicted, evaluated = _samples()
    first, resumed = metrics.TaskRecencyBias(4), metrics.TaskRecencyBias(4)
    first.persistent(True)
    first.update(predicted[:50], evaluated[:50], 3)
    state = first.state_dict()
    resumed.load_state_dict(state)
    resumed.update(predicted[50:], evaluated[50:], 3)
    _assert_same(resumed.compute(), stability.task_recency_bias(predicted, evaluated, 3))
    assert torch.equal(state["total"], first.total)


@pytest.mark.parametrize(
    ("metric", "higher_is_better"),
    [
        (metrics.MinAccuracy, True),
        (metrics.WorstCaseAccuracy, True),
        (metrics.TaskMinimumAccuracy, True),
        (metrics.WindowedForgetting, False),
        (metrics.WindowedPlasticity, True),
        (metrics.StabilityGap, False),
        (metrics.NormalizedStabilityGap, False),
        (metrics.Recovery, None),
        (metrics.NormalizedRecovery, None),
        (metrics.TaskRecencyBias, False),
    ],
)
def test_a_metric_says_which_way_is_better(metric, higher_is_better):
    assert metric.higher_is_better is higher_is_better
    assert metric.is_differentiable is False


@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_plot_draws_one_value_and_the_course_of_several(metric):
    fed = _fed(metric(4), *_random_curve(1))
    figure, ax = fed.plot()
    assert ax.get_figure() is figure
    assert ax.lines[0].get_ydata()[0] == pytest.approx(fed.compute().item())
    own = Figure().add_subplot()
    _, same = fed.plot([torch.tensor(0.1), torch.tensor(0.3)], ax=own)
    assert same is own
    assert [float(value) for value in own.lines[0].get_ydata()] == pytest.approx([0.1, 0.3])


def test_every_metric_takes_only_arguments_that_a_config_can_hold():
    for metric in ALL_METRICS:
        parameters = list(inspect.signature(metric.__init__).parameters)
        assert parameters == ["self", "num_tasks", *(["window"] if metric in WINDOWED else []), "kwargs"]


@pytest.mark.parametrize("metric", ALL_METRICS)
def test_a_stream_without_tasks_is_refused(metric):
    with pytest.raises(ValueError, match="`num_tasks` must be 1 or more, got 0"):
        metric(0)


@pytest.mark.parametrize("metric", WINDOWED)
def test_a_window_without_a_pair_is_refused(metric):
    with pytest.raises(ValueError, match="`window` must be 2 evaluations or more, got 1"):
        metric(4, window=1)


@pytest.mark.parametrize("metric", CURVE_METRICS)
def test_an_evaluation_that_does_not_fit_is_refused(metric):
    fed = _fed(metric(4), torch.rand(1, 4), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"`accuracies` has shape \(3,\); .* shape \(4,\)"):
        fed.update(torch.rand(3), 2)
    with pytest.raises(TypeError, match="`accuracies` must be a tensor of a floating point type, got list"):
        fed.update([0.1] * 4, 2)
    with pytest.raises(ValueError, match="`trained` is task 4; the stream has tasks 0 to 3"):
        fed.update(torch.rand(4), 4)
    with pytest.raises(ValueError, match="`trained` must not decrease, got task 1 after task 2"):
        fed.update(torch.rand(4), 1)


def test_samples_that_do_not_fit_are_refused():
    metric, tasks = metrics.TaskRecencyBias(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"`predicted_task` has shape \(1,\) and `evaluated_task` \(2,\)"):
        metric.update(tasks[:1], tasks, 1)
    with pytest.raises(ValueError, match="`current` is task 2; the stream has tasks 0 to 1"):
        metric.update(tasks, tasks, 2)
    with pytest.raises(ValueError, match="`evaluated_task` holds task 2; the stream has tasks 0 to 1"):
        metric.update(tasks, tasks + 1, 1)
