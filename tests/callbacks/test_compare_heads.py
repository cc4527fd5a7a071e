"""`ContinualMetrics(compare_heads=True)` measures the classification layer beside the head that stands in for it."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from nearest_means import NoisyNet
from numbered_streams import Judge, fit_stream, same, same_weights
from rich import get_console

from lightning_cl.callbacks import ContinualMetrics, NearestMeanClassifier, Replay
from lightning_cl.reporting import stream_averages
from tests.modules import CLASSIFIERS, DigitsData, Plain


def _fit(metrics=None, head=True, module=Plain, data=None, others=(), **settings):
    metrics = metrics or ContinualMetrics(compare_heads=head, print_table=False)
    heads = [NearestMeanClassifier()] if head else []
    callbacks = [Replay(20), *heads, metrics, *others]
    trainer, module = fit_stream(callbacks, module, data or DigitsData(), **settings)
    return metrics, trainer, module


def _only(head, **options):
    """Metrics of a run with the head, or without it, that compares nothing."""
    metrics, _, _ = _fit(ContinualMetrics(print_table=False, **options), head)
    return metrics


@pytest.mark.parametrize("options", [{}, {"split": "test"}, {"tasks": "all"}], ids=str)
def test_both_matrices_are_those_of_a_run_with_and_one_without_the_head(options):
    both, _, _ = _fit(ContinualMetrics(compare_heads=True, print_table=False, **options))
    nearest, linear = _only(True, **options), _only(False, **options)
    assert same(both.matrix, nearest.matrix)
    assert same(both.task_aware_matrix, nearest.task_aware_matrix)
    assert same(both.linear_matrix, linear.matrix)
    assert not same(both.matrix, both.linear_matrix)
    assert both.averages == nearest.averages


@pytest.mark.parametrize(("module", "data"), CLASSIFIERS, ids=lambda part: part.__name__)
def test_the_layers_matrix_is_that_of_a_run_without_the_head_for_every_kind_of_module(module, data):
    both, _, _ = _fit(None, True, module, data())
    linear, _, _ = _fit(ContinualMetrics(print_table=False), False, module, data())
    assert same(both.linear_matrix, linear.matrix)
    assert not same(both.matrix, linear.matrix)


def test_comparing_does_not_change_the_run():
    compared, not_compared = (
        _fit(ContinualMetrics(compare_heads=compare, print_table=False), True, NoisyNet, max_epochs=2)
        for compare in (True, False)
    )
    assert same_weights(compared[2], not_compared[2])
    assert same(compared[1].optimizers[0].state_dict(), not_compared[1].optimizers[0].state_dict())


@pytest.mark.parametrize(("split", "prefix"), [("val", "linear_acc"), ("test", "linear_test_acc")])
def test_the_layers_figures_are_logged_under_a_name_of_their_own(split, prefix):
    metrics, trainer, _ = _fit(ContinualMetrics(split=split, compare_heads=True, print_table=False))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix + "/")}
    expected = {f"{prefix}/task_{task}": float(value) for task, value in enumerate(metrics.linear_matrix[-1])}
    expected.update({f"{prefix}/{name}": value for name, value in stream_averages(metrics.linear_matrix).items()})
    assert logged == pytest.approx(expected)
    of_head = trainer.callback_metrics[f"{prefix.removeprefix('linear_')}/average_accuracy"]
    assert float(of_head) == pytest.approx(metrics.averages["average_accuracy"])


def test_nothing_of_the_layer_is_logged_where_heads_are_not_compared(tmp_path):
    logger = CSVLogger(tmp_path, version=0)
    _, trainer, _ = _fit(ContinualMetrics(print_table=False), logger=logger)
    assert not any(name.startswith("linear") for name in trainer.callback_metrics)
    assert not any(name.startswith("linear") for name in json.loads(_results(logger)))


def _results(logger):
    with open(f"{logger.log_dir}/results.json") as file:
        return file.read()


def test_the_results_hold_both_matrices_and_both_averages(tmp_path):
    logger = CSVLogger(tmp_path, version=0)
    metrics, _, _ = _fit(logger=logger)
    results = json.loads(_results(logger))
    for name, matrix in (("accuracy_matrix", metrics.matrix), ("linear_accuracy_matrix", metrics.linear_matrix)):
        rows = [[torch.nan if value is None else value for value in row] for row in results[name]]
        torch.testing.assert_close(torch.tensor(rows), matrix, equal_nan=True)
    assert results["linear_averages"] == pytest.approx(stream_averages(metrics.linear_matrix))
    assert results["averages"]["average_accuracy"] == pytest.approx(metrics.averages["average_accuracy"])


def test_both_heads_are_printed_side_by_side():
    with get_console().capture() as capture:
        metrics, _, _ = _fit(ContinualMetrics(compare_heads=True))
    lines = capture.get().splitlines()
    header = next(index for index, line in enumerate(lines) if "NearestMeanClassifier" in line)
    assert lines[header].split() == ["at", "the", "end", "NearestMeanClassifier", "classification", "layer"]
    cells = [line.split()[-2:] for line in lines[header + 2 : header + 6]]
    rows = zip(metrics.matrix[-1].tolist(), metrics.linear_matrix[-1].tolist(), strict=True)
    assert cells[:3] == [[f"{nearest:.2f}", f"{linear:.2f}"] for nearest, linear in rows]
    assert cells[3] == [f"{float(matrix[-1].mean()):.2f}" for matrix in (metrics.matrix, metrics.linear_matrix)]


@pytest.mark.parametrize("options", [{"print_table": False, "compare_heads": True}, {"compare_heads": False}], ids=str)
def test_no_comparison_is_printed_where_there_is_none_to_print(options):
    with get_console().capture() as capture:
        _fit(ContinualMetrics(**options))
    assert "classification layer" not in capture.get()


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_keeps_both(epoch, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    metrics, trainer, _ = _fit(others=[checkpoint], enable_checkpointing=True)
    resumed, again, _ = _fit(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert not metrics.linear_matrix[:, 0].isnan().any()
    assert same(resumed.state_dict(), metrics.state_dict())
    first, second = trainer.callback_metrics, again.callback_metrics
    assert same({name: second[name] for name in first}, dict(first))


def test_a_rejected_task_is_measured_with_both_as_it_was_put_back():
    metrics, _, _ = _fit(others=[Judge(1)])
    linear, _, _ = _fit(ContinualMetrics(print_table=False), False, others=[Judge(1)])
    assert same(metrics.linear_matrix, linear.matrix)


def test_the_state_holds_no_slice_and_loads_without_running_code(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    metrics, _, _ = _fit(others=[checkpoint], enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][metrics.state_key]
    assert same(state["linear_matrix"], metrics.linear_matrix)
    state["linear_matrix"].zero_()
    assert metrics.linear_matrix[-1].sum() > 0
