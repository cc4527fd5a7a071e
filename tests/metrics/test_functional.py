import doctest
import importlib
import math
import pkgutil

import numpy as np
import pytest
import torch

import lightning_cl.metrics
from lightning_cl.metrics import functional

NAN = math.nan


def _measured(values):
    return [float(value) for value in values if not np.isnan(value)]


def _mean(values):
    return sum(values) / len(values) if values else NAN


def _reference_row_averages(matrix):
    return [_mean(_measured(matrix[i, : i + 1])) for i in range(len(matrix))]


def _last_row(matrix):
    return max((i for i, average in enumerate(_reference_row_averages(matrix)) if not np.isnan(average)), default=0)


def _reference_average_accuracy(matrix):
    return _reference_row_averages(matrix)[_last_row(matrix)]


def _reference_average_incremental_accuracy(matrix):
    return _mean(_measured(_reference_row_averages(matrix)))


def _reference_forgetting(matrix, mode="max"):
    best = {"max": max, "min": min}[mode]
    last, drops = _last_row(matrix), []
    for task in range(last):
        earlier = _measured(matrix[:last, task])
        if earlier and not np.isnan(matrix[last, task]):
            drop = best(earlier) - matrix[last, task]
            drops.append(drop if mode == "max" else -drop)
    return _mean(drops)


def _reference_backward_transfer(matrix, mode="max"):
    last = _last_row(matrix)
    gains = _measured(matrix[last, task] - matrix[task, task] for task in range(last))
    return _mean(gains) * (1 if mode == "max" else -1)


def _reference_forward_transfer(matrix, baseline, mode="max"):
    gains = _measured(matrix[task - 1, task] - baseline[task] for task in range(1, len(matrix)))
    return _mean(gains) * (1 if mode == "max" else -1)


def _random_matrix(seed):
    """A matrix with a random size, unmeasured cells, sometimes a skipped task and an unfinished end."""
    rng = np.random.default_rng(seed)
    num_tasks = int(rng.integers(1, 8))
    matrix = rng.random((num_tasks, num_tasks))
    if rng.random() < 0.5:
        matrix[np.triu_indices(num_tasks, 1)] = np.nan
    if rng.random() < 0.5:
        matrix[rng.random(matrix.shape) < 0.15] = np.nan
    if rng.random() < 0.5:
        matrix[rng.integers(num_tasks)] = np.nan
    if rng.random() < 0.3:
        matrix[rng.integers(num_tasks) :] = np.nan
    return matrix


@pytest.mark.parametrize("seed", range(60))
def test_every_figure_equals_its_numpy_reference_on_random_matrices(seed):
    matrix = _random_matrix(seed)
    baseline = np.random.default_rng(1000 + seed).random(len(matrix))
    tensor, baseline_tensor = torch.from_numpy(matrix), torch.from_numpy(baseline)
    pairs = [
        (functional.average_accuracy(tensor), _reference_average_accuracy(matrix)),
        (functional.average_incremental_accuracy(tensor), _reference_average_incremental_accuracy(matrix)),
    ]
    for mode in ("max", "min"):
        pairs += [
            (functional.forgetting(tensor, mode), _reference_forgetting(matrix, mode)),
            (functional.backward_transfer(tensor, mode), _reference_backward_transfer(matrix, mode)),
            (
                functional.forward_transfer(tensor, baseline_tensor, mode),
                _reference_forward_transfer(matrix, baseline, mode),
            ),
        ]
    for got, expected in pairs:
        assert got.shape == ()
        assert float(got) == pytest.approx(expected, abs=1e-12, nan_ok=True)


ORACLE = torch.tensor([[0.9, 0.2, 0.0], [0.6, 0.8, 0.3], [0.7, 0.5, 1.0]])


def test_the_figures_of_a_hand_computed_matrix():
    assert functional.average_accuracy(ORACLE).item() == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert functional.average_incremental_accuracy(ORACLE).item() == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)
    assert functional.forgetting(ORACLE).item() == pytest.approx((0.2 + 0.3) / 2)
    assert functional.backward_transfer(ORACLE).item() == pytest.approx((-0.2 - 0.3) / 2)
    transfer = functional.forward_transfer(ORACLE, torch.tensor([0.5, 0.1, 0.2]))
    assert transfer.item() == pytest.approx((0.1 + 0.1) / 2)


def test_forgetting_is_measured_from_the_best_earlier_row_not_from_the_diagonal():
    matrix = torch.tensor([[0.5, NAN, NAN], [0.9, 0.8, NAN], [0.6, 0.8, 1.0]])
    assert functional.forgetting(matrix).item() == pytest.approx((0.3 + 0.0) / 2)
    assert functional.backward_transfer(matrix).item() == pytest.approx((0.1 + 0.0) / 2)


def test_an_old_task_that_got_better_counts_as_negative_forgetting():
    assert functional.forgetting(torch.tensor([[0.5, NAN], [0.7, 0.9]])).item() == pytest.approx(-0.2)


def test_a_growing_error_is_forgetting_where_low_is_good():
    errors = torch.tensor([[1.0, NAN, NAN], [0.5, 2.0, NAN], [3.0, 2.5, 1.0]])
    assert functional.forgetting(errors, mode="min").item() == pytest.approx((2.5 + 0.5) / 2)
    assert functional.backward_transfer(errors, mode="min").item() == pytest.approx((-2.0 - 0.5) / 2)


def test_a_skipped_task_has_no_row_and_does_not_spoil_the_figures():
    matrix = torch.tensor([[0.9, NAN, NAN], [NAN, NAN, NAN], [0.6, 0.4, 0.8]])
    assert functional.average_accuracy(matrix).item() == pytest.approx(1.8 / 3)
    assert functional.average_incremental_accuracy(matrix).item() == pytest.approx((0.9 + 0.6) / 2)
    assert functional.forgetting(matrix).item() == pytest.approx(0.3)
    assert functional.backward_transfer(matrix).item() == pytest.approx(-0.3)


def test_a_stream_that_is_still_running_is_judged_by_its_last_measured_row():
    running = torch.full((5, 5), NAN)
    running[:3, :3] = ORACLE
    for figure in (
        functional.average_accuracy,
        functional.average_incremental_accuracy,
        functional.forgetting,
        functional.backward_transfer,
    ):
        assert figure(running).item() == pytest.approx(figure(ORACLE).item())


def test_tasks_measured_ahead_of_their_training_do_not_enter_the_averages():
    assert functional.average_accuracy(torch.tensor([[0.9, 0.1], [NAN, NAN]])).item() == pytest.approx(0.9)


def test_one_task_forgets_nothing_that_could_be_measured():
    matrix = torch.tensor([[0.9]])
    assert functional.average_accuracy(matrix).item() == pytest.approx(0.9)
    assert functional.forgetting(matrix).isnan()
    assert functional.backward_transfer(matrix).isnan()
    assert functional.forward_transfer(matrix, torch.tensor([0.1])).isnan()


def test_an_empty_matrix_gives_nan():
    empty = torch.full((3, 3), NAN)
    assert functional.average_accuracy(empty).isnan()
    assert functional.average_incremental_accuracy(empty).isnan()
    assert functional.forgetting(empty).isnan()


def test_the_input_is_left_as_it_was():
    matrix = ORACLE.clone()
    functional.average_incremental_accuracy(matrix)
    functional.forgetting(matrix, mode="min")
    assert torch.equal(matrix, ORACLE)


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"`matrix` must have the shape \(tasks, tasks\), got \(2, 3\)"):
        functional.average_accuracy(torch.zeros(2, 3))


@pytest.mark.parametrize("matrix", [[[0.9]], torch.zeros(2, 2, dtype=torch.long)])
def test_a_matrix_that_is_no_floating_point_tensor_is_refused(matrix):
    with pytest.raises(TypeError, match="`matrix` must be a tensor of a floating point type"):
        functional.forgetting(matrix)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match='`mode` must be "max" or "min", got \'best\''):
        functional.forgetting(ORACLE, mode="best")


def test_a_baseline_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"`baseline` has shape \(2,\); .* shape \(3,\)"):
        functional.forward_transfer(ORACLE, torch.zeros(2))


MODULES = [module.name for module in pkgutil.iter_modules(lightning_cl.metrics.__path__, "lightning_cl.metrics.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_metric_has_an_example():
    found = doctest.DocTestFinder(recurse=False)
    for name in lightning_cl.metrics.__all__:
        assert any(test.examples for test in found.find(getattr(lightning_cl.metrics, name), name)), name
