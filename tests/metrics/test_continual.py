import inspect

import pytest
import torch
from matplotlib.figure import Figure
from torchmetrics import MetricCollection

from lightning_cl import metrics
from lightning_cl.metrics import functional

NUM_TASKS = 4
FIGURES = {
    metrics.AverageAccuracy: functional.average_accuracy,
    metrics.AverageIncrementalAccuracy: functional.average_incremental_accuracy,
    metrics.Forgetting: functional.forgetting,
    metrics.BackwardTransfer: functional.backward_transfer,
}


def _batches(seed=0):
    """Random predictions of unequal batches, measured on all tasks after each, the untrained model included."""
    generator = torch.Generator().manual_seed(seed)
    for trained in range(-1, NUM_TASKS):
        for evaluated in range(NUM_TASKS):
            size = int(torch.randint(5, 40, (), generator=generator))
            target = 2 * evaluated + torch.randint(0, 2, (size,), generator=generator)
            yield torch.randn(size, 2 * NUM_TASKS, generator=generator), target, trained, evaluated


def _fed(metric, batches=None):
    for batch in batches or _batches():
        metric.update(*batch)
    return metric


@pytest.mark.parametrize("metric", FIGURES)
@pytest.mark.parametrize("task_classes", [None, [[0, 1], [2, 3], [4, 5], [6, 7]]], ids=["agnostic", "aware"])
def test_a_metric_is_its_functional_twin_of_the_accuracy_matrix(metric, task_classes):
    matrix = _fed(metrics.AccuracyMatrix(NUM_TASKS, task_classes)).compute()
    assert torch.equal(_fed(metric(NUM_TASKS, task_classes)).compute(), FIGURES[metric](matrix))


def test_forward_transfer_takes_its_baseline_from_the_untrained_model():
    counts = _fed(metrics.AccuracyMatrix(NUM_TASKS))
    expected = functional.forward_transfer(counts.compute(), counts.baseline())
    assert torch.equal(_fed(metrics.ForwardTransfer(NUM_TASKS)).compute(), expected)


def test_forward_transfer_without_a_baseline_is_nan():
    trained = [batch for batch in _batches() if batch[2] >= 0]
    assert _fed(metrics.ForwardTransfer(NUM_TASKS), trained).compute().isnan()


@pytest.mark.parametrize("metric", [*FIGURES, metrics.ForwardTransfer])
def test_two_processes_shares_give_the_figure_of_the_whole(metric):
    batches = list(_batches())
    share, other = _fed(metric(NUM_TASKS), batches[:7]), _fed(metric(NUM_TASKS), batches[7:])
    share.merge_state(other)
    assert torch.equal(share.compute(), _fed(metric(NUM_TASKS), batches).compute())


def test_a_collection_counts_once_for_all():
    collection = MetricCollection([metric(NUM_TASKS) for metric in (*FIGURES, metrics.ForwardTransfer)])
    _fed(collection)
    assert len(collection.compute_groups) == 1
    for name, value in collection.compute().items():
        assert torch.equal(value, _fed(getattr(metrics, name)(NUM_TASKS)).compute())


@pytest.mark.parametrize(
    ("metric", "higher_is_better"),
    [
        (metrics.AccuracyMatrix, True),
        (metrics.AverageAccuracy, True),
        (metrics.AverageIncrementalAccuracy, True),
        (metrics.Forgetting, False),
        (metrics.BackwardTransfer, True),
        (metrics.ForwardTransfer, True),
    ],
)
def test_a_metric_says_which_way_is_better(metric, higher_is_better):
    assert metric.higher_is_better is higher_is_better
    assert metric.full_state_update is False
    assert metric.is_differentiable is False


@pytest.mark.parametrize("metric", [*FIGURES, metrics.ForwardTransfer])
def test_plot_draws_one_value_and_the_course_of_several(metric):
    fed = _fed(metric(NUM_TASKS))
    figure, ax = fed.plot()
    assert ax.get_figure() is figure
    assert ax.lines[0].get_ydata()[0] == pytest.approx(fed.compute().item())
    own = Figure().add_subplot()
    _, same = fed.plot([torch.tensor(0.1), torch.tensor(0.3)], ax=own)
    assert same is own
    assert [float(value) for value in own.lines[0].get_ydata()] == pytest.approx([0.1, 0.3])


def test_every_metric_takes_only_arguments_that_a_config_can_hold():
    for metric in (metrics.AccuracyMatrix, *FIGURES, metrics.ForwardTransfer):
        parameters = inspect.signature(metric.__init__).parameters
        assert list(parameters) == ["self", "num_tasks", "task_classes", "kwargs"]
