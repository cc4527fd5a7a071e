"""What a tracked run leaves in its logger's directory: every accuracy, the figures that sum them up, and a picture.

Named after the files, as `tests/metrics` has a `test_stability.py` already.
"""

import csv
import json
import math
import struct
from pathlib import Path

import matplotlib
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_cl.callbacks import NearestMeanClassifier, Replay, StabilityGapTracker
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.metrics.curve import AccuracyCurve
from lightning_cl.reporting.stability import stability_figure, stability_figures, write_stability
from tests.modules import DigitsData, Plain, quiet_trainer

nan = torch.nan
NAMES = ["zero and one", "two and three", "four and five"]
# two evaluations a task: task 0 falls from 0.9 to 0.3 in task 1 and to 0.2 in task 2, task 1 from 0.8 to 0.6
ACCURACIES = [
    [0.5, nan, nan],
    [0.9, nan, nan],
    [0.3, 0.4, nan],
    [0.7, 0.8, nan],
    [0.2, 0.6, 0.5],
    [0.4, 0.7, 1.0],
]


def _curve(heads=1):
    curve = AccuracyCurve(3, heads)
    for row, values in enumerate(ACCURACIES):
        accuracies = torch.stack([torch.tensor(values) / (head + 1) for head in range(heads)])
        recency = torch.full((heads,), nan if row < 2 else 0.1 * (row - 1))
        curve.append(5 * row + 5, row // 2, row % 2 == 1, accuracies, recency)
    return curve


# ------------------------------------------------------------------ figures


def test_figures_of_a_curve_known_by_heart():
    figures = stability_figures(_curve(), window=2)
    expected = {
        "average_accuracy": 0.7,
        "min_acc": (0.2 + 0.6) / 2,
        "wc_acc": 1.0 / 3 + 2 / 3 * 0.4,
        "wf_2": (0.6 + 0.2 + 0.0) / 3,
        "wp_2": (0.4 + 0.4 + 0.5) / 3,
        "gap": (0.6 + (0.5 + 0.2) / 2) / 2,
        "gap_norm": (0.6 / 0.9 + (0.5 / 0.7 + 0.2 / 0.8) / 2) / 2,
        "recovery": (0.4 + (0.2 + 0.1) / 2) / 2,
        "recovery_norm": (0.4 / 0.9 + (0.2 / 0.7 + 0.1 / 0.8) / 2) / 2,
        "task_recency_bias": 0.25,
        "final_task_recency_bias": 0.4,
        "task_min_acc": (0.4 + 0.7) / 2,  # at the ends of epochs
    }
    assert figures == pytest.approx(expected, abs=1e-6)


def test_figures_of_a_second_head_begin_with_linear():
    figures = stability_figures(_curve(2), window=2)
    first = stability_figures(_curve(), window=2)
    assert list(figures) == [*first, *(f"linear_{name}" for name in first)]
    assert figures["linear_gap"] == pytest.approx(first["gap"] / 2)


def test_the_paper_figure_at_epoch_ends_is_left_out_where_no_epoch_ended():
    curve = AccuracyCurve(2)
    curve.append(1, 0, False, torch.tensor([[0.5, nan]]), torch.tensor([nan]))
    assert "task_min_acc" not in stability_figures(curve, window=10)


# ------------------------------------------------------------------ files


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_table_has_a_row_for_each_evaluation_and_blanks_for_what_was_not_measured(heads, tmp_path):
    write_stability(tmp_path / "new" / "folder", _curve(heads), NAMES, ["a", "b"][:heads], 2)
    rows = _rows(tmp_path / "new" / "folder" / "stability_gap.csv")
    columns = ["acc_task_0", "acc_task_1", "acc_task_2", "task_recency_bias"]
    assert list(rows[0]) == [
        "step",
        "task",
        "epoch_end",
        *columns,
        *[f"linear_{c}" for c in columns][: 4 * (heads - 1)],
    ]
    assert [row["step"] for row in rows] == ["5", "10", "15", "20", "25", "30"]
    assert [row["task"] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert [row["epoch_end"] for row in rows] == ["0", "1"] * 3
    for row, values in zip(rows, ACCURACIES, strict=True):
        assert [row[column] for column in columns[:3]] == ["" if math.isnan(v) else f"{v:g}" for v in values]
    assert [row["task_recency_bias"] for row in rows] == ["", "", "0.1", "0.2", "0.3", "0.4"]
    if heads == 2:
        assert [row["linear_acc_task_0"] for row in rows] == ["0.25", "0.45", "0.15", "0.35", "0.1", "0.2"]


def test_the_figures_are_json_with_null_for_what_is_not_known(tmp_path):
    curve = AccuracyCurve(2)
    curve.append(1, 0, True, torch.tensor([[0.5, nan]]), torch.tensor([nan]))
    write_stability(tmp_path, curve, NAMES[:2], ["head"], 10)
    figures = json.loads((tmp_path / "stability_gap.json").read_text())
    assert figures["average_accuracy"] == 0.5
    assert figures["gap"] is None
    write_stability(tmp_path, _curve(), NAMES, ["head"], 2)
    assert json.loads((tmp_path / "stability_gap.json").read_text()) == pytest.approx(stability_figures(_curve(), 2))


def test_the_picture_is_a_png_and_the_paths_are_returned(tmp_path):
    paths = write_stability(tmp_path, _curve(2), NAMES, ["nearest", "linear"], 2)
    assert sorted(path.name for path in paths) == ["stability_gap.csv", "stability_gap.json", "stability_gap.png"]
    assert all(path.parent == tmp_path for path in paths)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    content = (tmp_path / "stability_gap.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600
    assert height > 400


# ------------------------------------------------------------------ picture


@pytest.mark.parametrize("heads", [["nearest"], ["nearest", "linear"]])
def test_the_picture_has_one_row_of_axes_for_each_head_with_a_line_for_each_task(heads):
    figure = stability_figure(_curve(len(heads)), NAMES, heads)
    assert [ax.get_title() for ax in figure.axes] == heads
    for row, ax in enumerate(figure.axes):
        lines = {line.get_label(): line for line in ax.lines if line.get_label() in NAMES}
        assert set(lines) == set(NAMES)
        assert lines[NAMES[1]].get_xdata().tolist() == [15, 20, 25, 30]  # from where it was measured on
        assert lines[NAMES[0]].get_ydata().tolist() == pytest.approx([v[0] / (row + 1) for v in ACCURACIES])
        switches = [line.get_xdata()[0] for line in ax.lines if line.get_label() not in NAMES]
        assert switches == [12.5, 22.5]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == NAMES


def test_gap_and_recovery_of_each_task_are_written_into_the_picture():
    (ax,) = stability_figure(_curve(), NAMES, ["head"]).axes
    texts = [(text.get_position()[0], text.get_text()) for text in ax.texts if text.get_text()]
    # task 0 fell by 0.6 and came back by 0.4; then 0.5 and 0.2 of it, and 0.2 and 0.1 of task 1
    assert texts == [(17.5, "gap 0.60\nrecovery 0.40"), (27.5, "gap 0.35\nrecovery 0.15")]


def test_an_arrow_goes_down_the_deepest_fall_of_each_task():
    (ax,) = stability_figure(_curve(), NAMES, ["head"]).axes
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    ends = [(*map(float, arrow.xy), float(arrow.xyann[1])) for arrow in arrows]
    assert ends == [pytest.approx((15, 0.3, 0.9)), pytest.approx((25, 0.2, 0.7))]


def test_a_stream_of_one_task_has_a_picture_without_gaps():
    curve = AccuracyCurve(1)
    curve.append(3, 0, True, torch.tensor([[0.5]]), torch.tensor([nan]))
    (ax,) = stability_figure(curve, ["only"], ["head"]).axes
    assert not [text for text in ax.texts if text.get_text()]


def test_no_window_is_opened():
    from matplotlib import pyplot

    before, backend = pyplot.get_fignums(), matplotlib.get_backend()
    stability_figure(_curve(2), NAMES, ["a", "b"])
    assert pyplot.get_fignums() == before
    assert matplotlib.get_backend() == backend


# ------------------------------------------------------------------ after a fit


def _fit(heads=False, options=None, **settings):
    seed_everything(1, verbose=False)
    tracker = StabilityGapTracker(**{"probe_size": 10, "compare_heads": heads, **(options or {})})
    callbacks = [Replay(20), *([NearestMeanClassifier()] if heads else []), tracker]
    trainer = quiet_trainer(callbacks=callbacks, **{"max_epochs": 2, "limit_val_batches": 0, **settings})
    trainer.fit(Plain(), datamodule=ClassIncremental(DigitsData(), num_tasks=3))
    return tracker, trainer


@pytest.mark.parametrize("heads", [False, True], ids=["linear", "both"])
@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_a_fit_leaves_its_files_in_the_loggers_directory(logger, heads, tmp_path):
    if logger is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    tracker, trainer = _fit(heads, logger=logger(tmp_path, name="run", version=0))
    folder = Path(trainer.log_dir)
    rows = _rows(folder / "stability_gap.csv")
    assert len(rows) == 18
    assert [int(row["step"]) for row in rows] == tracker.curve.steps.tolist()
    for head, prefix in enumerate(["", "linear_"][: 1 + heads]):
        column = [float(row[f"{prefix}acc_task_0"]) for row in rows]
        assert column == pytest.approx(tracker.curve.accuracies[:, head, 0].tolist())
    figures = json.loads((folder / "stability_gap.json").read_text())
    assert figures == pytest.approx(tracker.figures)
    assert (folder / "stability_gap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("settings", [{"logger": False}, {"fast_dev_run": True}], ids=str)
def test_a_fit_without_a_logger_or_of_one_batch_leaves_no_files(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker, _ = _fit(**settings)
    assert tracker.curve.length > 0
    assert list(tmp_path.rglob("stability*")) == []


@pytest.mark.parametrize("heads", [False, True], ids=["linear", "both"])
@pytest.mark.parametrize("every", [1, 4])
def test_loggers_get_the_accuracies_step_by_step(every, heads, tmp_path):
    logger = CSVLogger(tmp_path, version=0)
    tracker, _ = _fit(heads, {"every_n_steps": every}, logger=logger, log_every_n_steps=50)
    rows = _rows(Path(logger.log_dir) / "metrics.csv")
    for head, prefix in enumerate(["probe_acc", "linear_probe_acc"][: 1 + heads]):
        for task in range(3):
            logged = {
                int(row["step"]): float(row[f"{prefix}/task_{task}"]) for row in rows if row[f"{prefix}/task_{task}"]
            }
            accuracies = tracker.curve.accuracies[:, head, task]
            known = ~accuracies.isnan()
            steps = (tracker.curve.steps[known] - 1).tolist()  # Lightning logs the first step as 0
            expected = dict(zip(steps, accuracies[known].tolist(), strict=True))
            assert logged == pytest.approx(expected)
    assert ("linear_probe_acc/task_0" in rows[0]) == heads


def test_the_figures_reach_the_logger_at_the_end_of_each_task(tmp_path):
    logger = CSVLogger(tmp_path, version=0)
    tracker, _ = _fit(logger=logger)
    rows = [row for row in _rows(Path(logger.log_dir) / "metrics.csv") if row["stability/average_accuracy"]]
    assert len(rows) == 3
    assert float(rows[-1]["stability/gap"]) == pytest.approx(tracker.figures["gap"])


class TwoOptimizers(Plain):
    """Each batch is a step of two optimizers."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[4])]


@pytest.mark.parametrize("module", [Plain, TwoOptimizers])
def test_accuracies_stand_in_the_log_where_the_loss_of_the_step_stands(module, tmp_path):
    class Logs(module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if loss is not None:
                self.log("loss", loss)
            return loss

    logger = CSVLogger(tmp_path, version=0)
    tracker = StabilityGapTracker(probe_size=10)
    trainer = quiet_trainer(callbacks=[tracker], max_epochs=1, logger=logger, log_every_n_steps=1)
    trainer.fit(Logs(), datamodule=ClassIncremental(DigitsData(), num_tasks=3))
    rows = _rows(Path(logger.log_dir) / "metrics.csv")
    steps = [[row["step"] for row in rows if row[name]] for name in ("loss", "probe_acc/task_0")]
    assert steps[0] == steps[1] == [str(step) for step in range(9)]
