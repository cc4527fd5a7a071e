import copy

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from lightning_cl.metrics import AccuracyMatrix

NUM_TASKS = 5
TASK_CLASSES = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def _digits_stream():
    """Batches of (logits, labels, trained, evaluated): matched templates, noisier the longer ago the task was."""
    images, labels = load_digits(return_X_y=True)
    templates = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
    rng = np.random.default_rng(0)
    for trained in range(NUM_TASKS):
        for evaluated in range(trained + 1):
            rows = np.isin(labels, TASK_CLASSES[evaluated])
            noise = rng.normal(scale=300 * (trained - evaluated + 0.5), size=(rows.sum(), 10))
            logits = images[rows] @ templates.T - 0.5 * (templates**2).sum(axis=1) + noise
            for part in np.array_split(np.arange(rows.sum()), 3):
                yield logits[part], labels[rows][part], trained, evaluated


def _reference_accuracy_matrix(stream, task_classes=None):
    hits = {}
    for logits, labels, trained, evaluated in stream:
        for row, label in zip(logits, labels, strict=True):
            allowed = range(len(row)) if task_classes is None else task_classes[evaluated]
            predicted = max(allowed, key=lambda index: row[index])
            hits.setdefault((trained, evaluated), []).append(predicted == label)
    matrix = np.full((NUM_TASKS, NUM_TASKS), np.nan)
    for cell, outcome in hits.items():
        matrix[cell] = np.mean(outcome)
    return matrix


def _update(metric, stream):
    for logits, labels, trained, evaluated in stream:
        metric.update(torch.from_numpy(logits), torch.from_numpy(labels), trained, evaluated)
    return metric


@pytest.mark.parametrize("task_classes", [None, TASK_CLASSES], ids=["task-agnostic", "task-aware"])
def test_the_matrix_equals_its_numpy_reference_on_digits(task_classes):
    metric = _update(AccuracyMatrix(NUM_TASKS, task_classes), _digits_stream())
    expected = _reference_accuracy_matrix(_digits_stream(), task_classes)
    np.testing.assert_allclose(metric.compute().numpy(), expected, rtol=1e-6)


def test_knowing_the_task_never_hurts():
    agnostic = _update(AccuracyMatrix(NUM_TASKS), _digits_stream()).compute()
    aware = _update(AccuracyMatrix(NUM_TASKS, TASK_CLASSES), _digits_stream()).compute()
    seen = ~agnostic.isnan()
    assert (aware[seen] >= agnostic[seen]).all()
    assert (aware[seen] > agnostic[seen]).any()


def test_labels_and_the_logits_they_come_from_give_the_same_matrix():
    from_logits = _update(AccuracyMatrix(NUM_TASKS), _digits_stream()).compute()
    labels = ((logits.argmax(1), *rest) for logits, *rest in _digits_stream())
    assert torch.equal(_update(AccuracyMatrix(NUM_TASKS), labels).compute().nan_to_num(-1), from_logits.nan_to_num(-1))


def test_two_processes_shares_of_a_stream_add_up_to_the_whole():
    stream = list(_digits_stream())
    whole = _update(AccuracyMatrix(NUM_TASKS), stream)
    # Uneven shares, as the last batch of an epoch makes them.
    shares = [_update(AccuracyMatrix(NUM_TASKS), stream[:11]), _update(AccuracyMatrix(NUM_TASKS), stream[11:])]
    shares[0].merge_state(shares[1])
    for state in ("correct", "total", "initial_correct", "initial_total"):
        assert torch.equal(getattr(shares[0], state), getattr(whole, state))
    assert torch.equal(shares[0].compute().nan_to_num(-1), whole.compute().nan_to_num(-1))


def test_the_size_of_the_batches_does_not_matter():
    logits, labels = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
    whole, parts = AccuracyMatrix(1), AccuracyMatrix(1)
    whole.update(logits, labels, 0, 0)
    for start, stop in ((0, 1), (1, 50), (50, 64)):
        parts.update(logits[start:stop], labels[start:stop], 0, 0)
    assert torch.equal(whole.compute(), parts.compute())


def test_what_was_not_measured_is_nan_and_what_was_never_right_is_zero():
    metric = AccuracyMatrix(2)
    metric.update(torch.tensor([1, 1]), torch.tensor([0, 0]), trained=1, evaluated=0)
    assert metric.compute()[1, 0] == 0
    assert metric.compute().isnan().sum() == 3


def test_the_untrained_model_fills_the_baseline_and_no_cell():
    metric = AccuracyMatrix(2)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]), trained=-1, evaluated=1)
    assert metric.compute().isnan().all()
    assert metric.baseline()[0].isnan()
    assert metric.baseline()[1] == 0.5


def test_reset_forgets_everything():
    metric = _update(AccuracyMatrix(NUM_TASKS), _digits_stream())
    metric.reset()
    for state in (metric.correct, metric.total, metric.initial_correct, metric.initial_total):
        assert state.sum() == 0


def test_forward_gives_the_accuracy_of_the_batch_and_keeps_the_counts_of_all():
    metric = AccuracyMatrix(1)
    metric.update(torch.tensor([0, 0]), torch.tensor([1, 1]), 0, 0)
    assert metric(torch.tensor([1, 1]), torch.tensor([1, 1]), 0, 0).item() == 1.0
    assert metric.compute().item() == 0.5


def test_a_copy_counts_on_its_own():
    metric = AccuracyMatrix(1)
    twin = copy.deepcopy(metric)
    twin.update(torch.tensor([1]), torch.tensor([1]), 0, 0)
    assert metric.total.sum() == 0


def test_plot_writes_a_number_into_each_measured_cell():
    figure = Figure()
    metric = AccuracyMatrix(2)
    metric.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]), 0, 0)
    got, ax = metric.plot(ax=figure.add_subplot())
    assert got is figure
    assert [text.get_text() for text in ax.texts] == ["0.75"]


def test_plot_makes_a_figure_where_none_is_given():
    figure, ax = AccuracyMatrix(2).plot(torch.eye(2))
    assert ax.get_figure() is figure
    assert len(ax.texts) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, "`num_tasks` must be 1 or more, got 0"),
        ({"num_tasks": 3, "task_classes": [[0], [1]]}, "`task_classes` has classes for 2 tasks; .* 3 tasks"),
        ({"num_tasks": 2, "task_classes": [[0], []]}, "`task_classes` must name at least one class per task"),
    ],
)
def test_a_wrong_constructor_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix(**arguments)


@pytest.mark.parametrize(
    ("preds", "trained", "evaluated", "message"),
    [
        (torch.zeros(4, 10), 2, 0, "`trained` is task 2; the stream has tasks 0 to 1"),
        (torch.zeros(4, 10), -2, 0, "`trained` is task -2"),
        (torch.zeros(4, 10), 0, 2, "`evaluated` is task 2; the stream has tasks 0 to 1"),
        (torch.zeros(4, 10), 0, -1, "`evaluated` is task -1"),
        (torch.zeros(3, 10), 0, 0, r"`preds` has shape \(3, 10\) and `target` \(4,\)"),
        (torch.zeros(4, 10, 2), 0, 0, r"`preds` has shape \(4, 10, 2\)"),
        (torch.zeros(4), 0, 0, r"`preds` holds labels \(batch,\); .* must hold logits"),
        (torch.zeros(4, 3), 0, 1, r"gives task 1 the classes \[2, 3\]; `preds` has logits for the classes 0 to 2"),
    ],
)
def test_a_wrong_batch_is_refused(preds, trained, evaluated, message):
    metric = AccuracyMatrix(2, task_classes=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=message):
        metric.update(preds, torch.zeros(4, dtype=torch.long), trained, evaluated)
