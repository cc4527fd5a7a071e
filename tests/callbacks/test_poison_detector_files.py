"""What a detector saw goes to the console, the logger, a file and a picture."""

import csv
import json
import math

import pytest
from lightning.pytorch.loggers import CSVLogger
from nearest_means import NoisyNet
from numbered_streams import same_weights
from poison_streams import Moves, fit_watched, moving, watching

from lightning_cl.callbacks import PoisonDetector
from lightning_cl.reporting.poisoning import (
    describe_value,
    print_verdict,
    shift_figure,
    write_poison_report,
    write_shift_picture,
)
from lightning_cl.tasks import ContinualCallback
from tests.modules import quiet_trainer

FILES = {"poison_report.json", "poison_shift.png"}
PNG = b"\x89PNG\r\n\x1a\n"


def _logged(tmp_path, detector, module=None, **settings):
    """Fit with a logger of Lightning's, and return its folder."""
    logger = CSVLogger(tmp_path, name="", version="run")
    fit_watched(detector, module or moving(0.1, 0.2, 2.0), logger=logger, **settings)
    return tmp_path / "run"


def _files(folder):
    return {path.name for path in folder.rglob("*") if path.name.startswith("poison")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run with two calibrations and a poisoned task, and its detector."""
    detector = PoisonDetector(calibration_runs=2, aggregate="max")
    return _logged(tmp_path_factory.mktemp("log"), detector), detector


def test_the_report_has_settings_and_what_was_seen_of_each_task(run):
    folder, _ = run
    report = json.loads((folder / "poison_report.json").read_text())
    degrees = math.degrees(math.atan(0.2 * 6**0.5))
    assert report["settings"]["threshold"] == pytest.approx(degrees, abs=1e-4)
    assert report["settings"]["action"] == "rollback"
    assert report["settings"]["detect_from"] == 2
    assert report["settings"]["aggregate"] == "max"
    first, second = report["tasks"]
    assert (first["task"], first["name"], first["verdict"]) == (1, "classes 2, 3", "calibration")
    assert first["runs"] == pytest.approx([degrees, degrees], abs=1e-4)
    assert (second["task"], second["verdict"], second["kept"]) == (2, "poisoned", False)
    assert second["shifts"] == pytest.approx({"net.0": 0.0, "net.4": 2 * 6**0.5}, abs=1e-4)
    assert second["angle"] == pytest.approx(math.degrees(math.atan(2 * 6**0.5)), abs=1e-4)


def test_a_picture_is_written_beside_it(run):
    assert (run[0] / "poison_shift.png").read_bytes().startswith(PNG)
    assert _files(run[0]) == FILES


class FilesAtTasksEnds(ContinualCallback):
    """Keeps which files there were at the end of each task."""

    observer = True

    def __init__(self, folder):
        self.folder, self.files = folder, []

    def on_task_end(self, trainer, pl_module, task):
        self.files.append(_files(self.folder))


def test_a_picture_is_drawn_when_poison_is_found_and_when_the_fit_ends(tmp_path):
    found = FilesAtTasksEnds(tmp_path)
    _logged(tmp_path, watching(threshold=30), moving(0.1, 2.0, 0.1), others=[found])
    assert found.files == [{"poison_report.json"}, FILES, FILES]
    clean = FilesAtTasksEnds(tmp_path / "clean")
    _logged(tmp_path / "clean", watching(), moving(0.1, 0.2, 0.3), others=[clean])
    assert clean.files == [{"poison_report.json"}] * 3
    assert _files(tmp_path / "clean") == FILES


def test_a_task_that_stops_the_fit_is_in_the_report(tmp_path):
    folder = _logged(tmp_path, PoisonDetector(threshold=30, action="stop"), moving(0.1, 2, 0.1))
    [entry] = json.loads((folder / "poison_report.json").read_text())["tasks"]
    assert (entry["task"], entry["verdict"]) == (1, "poisoned")


def test_a_report_of_outputs_that_are_no_numbers_is_written(tmp_path):
    folder = _logged(tmp_path, PoisonDetector(threshold=30), moving(0.1, math.nan, 0.1))
    first, _ = json.loads((folder / "poison_report.json").read_text())["tasks"]
    assert (first["verdict"], first["angle"], first["shifts"]["net.4"]) == ("poisoned", None, None)
    assert _files(folder) == FILES


def test_a_report_of_relative_shifts_is_written(tmp_path):
    assert _files(_logged(tmp_path, watching(relative=True), NoisyNet)) == FILES


def test_without_a_logger_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_watched(PoisonDetector(threshold=30), moving(0.1, 0.2, 2.0))
    assert _files(tmp_path) == set()


def test_a_dry_run_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_watched(watching(), Moves, fast_dev_run=True)
    assert _files(tmp_path) == set()


def test_files_do_not_change_the_run(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    modules = [fit_watched(PoisonDetector(calibration_runs=2), **settings)[1] for settings in ({}, {"logger": logger})]
    assert same_weights(*modules)


# ------------------------------------------------------------------ the logger


def _metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_angles_thresholds_and_shifts_are_logged_at_each_tasks_end(run):
    rows = [row for row in _metrics(run[0]) if "poison/angle" in row]
    slopes = [0.2 * 6**0.5] * 3 + [2 * 6**0.5]  # the second task three times
    assert [math.tan(math.radians(row["poison/angle"])) for row in rows] == pytest.approx(slopes, abs=1e-3)
    assert [row["poison/shift/net.4"] for row in rows] == pytest.approx(slopes, abs=1e-3)
    assert ["poison/threshold" in row for row in rows] == [False, False, True, True]


def test_slopes_are_logged_where_they_are_compared(tmp_path):
    folder = _logged(tmp_path, PoisonDetector(threshold=1, statistic="slope", detect_from=2))
    [row] = [row for row in _metrics(folder) if "poison/slope" in row]
    assert row["poison/slope"] == pytest.approx(2 * 6**0.5, abs=1e-4)
    assert row["poison/threshold"] == 1


def test_what_is_no_number_is_not_logged(tmp_path):
    folder = _logged(tmp_path, PoisonDetector(threshold=30), moving(0.1, math.nan, 0.1))
    rows = [row for row in _metrics(folder) if "poison/threshold" in row]
    assert ["poison/angle" in row for row in rows] == [False, True]


# ------------------------------------------------------------------ the console


def _said(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "PoisonDetector" in line]


def test_calibration_and_verdict_are_one_line_each(capsys):
    fit_watched(PoisonDetector(calibration_runs=2), moving(0.1, 0.2, 2.0))
    assert _said(capsys) == [
        "PoisonDetector: task 1 (classes 2, 3) calibrated in 2 runs; the threshold is 26.1°.",
        "PoisonDetector: task 2 (classes 4, 5) looks poisoned: 78.5° against a threshold of 26.1°. Undone and skipped.",
    ]


def test_names_of_tasks_are_no_markup(capsys):
    print_verdict(quiet_trainer(), "task 1 (a [/x] [red]b) looks poisoned")
    assert _said(capsys) == ["PoisonDetector: task 1 (a [/x] [red]b) looks poisoned"]


def test_that_the_fit_ends_is_said(capsys):
    fit_watched(PoisonDetector(threshold=2, statistic="slope", action="stop"), moving(0.1, 2.0, 0.1))
    assert _said(capsys) == [
        "PoisonDetector: task 1 (classes 2, 3) looks poisoned: 4.9 against a threshold of 2. Undone, and the fit ends"
        " here."
    ]


@pytest.mark.parametrize(
    ("value", "statistic", "text"),
    [(24.44, "angle", "24.4°"), (0.45678, "slope", "0.457"), (math.nan, "angle", "nan°")],
)
def test_values_as_people_read_them(value, statistic, text):
    assert describe_value(value, statistic) == text


# ------------------------------------------------------------------ the picture


def _entry(task, shifts, verdict="clean"):
    return {"task": task, "name": f"task {task}", "verdict": verdict, "angle": 10.0, "shifts": shifts}


def test_each_task_is_a_line_of_cumulative_shifts():
    record = [_entry(1, {"a": 1.0, "b": 2.0, "c": 4.0}), _entry(2, {"a": 2.0, "b": 0.0, "c": 1.0}, "poisoned")]
    figure = shift_figure(record)
    [axes] = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 3, 7], [2, 2, 3]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "task 1: 10.0°, clean",
        "task 2: 10.0°, poisoned",
    ]


def test_relative_shifts_begin_at_one():
    [axes] = shift_figure([_entry(1, {"a": 2.0, "b": 3.0})], relative=True).axes
    assert list(axes.lines[0].get_ydata()) == [1.0, 2.5]


def test_a_task_may_have_more_layers_than_the_one_before():
    record = [_entry(1, {"a": 1.0, "head.0": 1.0}), _entry(2, {"a": 1.0, "head.0": 1.0, "head.1": 1.0})]
    [axes] = shift_figure(record).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 2, 3]]


def test_report_and_picture_are_written_where_there_is_no_folder_yet(tmp_path):
    record = [_entry(1, {"a": 1.0, "b": 1.0})]
    paths = write_poison_report(tmp_path / "one", record, {}), write_shift_picture(tmp_path / "two", record, False)
    assert {path.name for path in paths} == FILES == _files(tmp_path)
