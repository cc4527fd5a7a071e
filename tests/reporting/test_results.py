import csv
import doctest
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_cl.reporting import results, stream_averages, write_results

NAN = math.nan
MATRIX = torch.tensor([[0.93, NAN], [0.5, 0.8]])


def test_the_json_file_holds_plain_values_in_the_given_order(tmp_path):
    given = {
        "zeta": 1,
        "accuracy_matrix": MATRIX,
        "alpha": {"tensor": torch.tensor(0.1), "array": np.arange(2), "number": np.float64(0.25), "path": Path("a")},
        "flag": True,
        "nothing": None,
    }
    write_results(tmp_path, given)
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert list(loaded) == list(given)
    assert loaded["accuracy_matrix"] == [[0.93, None], [0.5, 0.8]]
    assert loaded["alpha"] == {"tensor": 0.1, "array": [0, 1], "number": 0.25, "path": "a"}
    assert loaded["flag"] is True
    assert loaded["nothing"] is None


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, torch.tensor(NAN), np.float32(NAN)])
def test_what_json_cannot_say_becomes_null(tmp_path, value):
    write_results(tmp_path, {"forgetting": value})
    assert json.loads((tmp_path / "results.json").read_text()) == {"forgetting": None}


def test_a_row_of_the_matrix_is_a_line_of_the_file(tmp_path):
    write_results(tmp_path, {"accuracy_matrix": MATRIX})
    assert "    [0.93, null],\n" in (tmp_path / "results.json").read_text()


def test_strings_with_brackets_and_line_breaks_survive(tmp_path):
    text = "[\n  1,\n  2\n]"
    write_results(tmp_path, {"text": text, "list": [text, "[ 1 ]"]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"text": text, "list": [text, "[ 1 ]"]}


def test_the_csv_file_has_a_header_and_empty_cells_where_nothing_was_measured(tmp_path):
    paths = write_results(tmp_path, {"accuracy_matrix": MATRIX, "task_names": ["0, 1", "2, 3"]})
    assert paths == [tmp_path / "results.json", tmp_path / "accuracy_matrix.csv"]
    rows = list(csv.reader(paths[1].open(newline="")))
    assert rows == [["after_task", "0, 1", "2, 3"], ["0, 1", "0.93", ""], ["2, 3", "0.5", "0.8"]]


def test_tasks_without_names_are_numbered_from_one(tmp_path):
    write_results(tmp_path, {"accuracy_matrix": MATRIX})
    assert (tmp_path / "accuracy_matrix.csv").read_text().splitlines()[0] == "after_task,task_1,task_2"


def test_without_a_matrix_there_is_no_csv_file(tmp_path):
    assert write_results(tmp_path / "new" / "directory", {"a": 1}) == [tmp_path / "new" / "directory" / "results.json"]
    assert os.listdir(tmp_path / "new" / "directory") == ["results.json"]


def test_a_write_that_fails_leaves_the_file_of_before_and_no_other(tmp_path, monkeypatch):
    write_results(tmp_path, {"run": 1})

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_results(tmp_path, {"run": 2})
    assert json.loads((tmp_path / "results.json").read_text()) == {"run": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_value_without_a_form_in_json_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"`results\['a'\]\[1\]` is a object; results hold numbers"):
        write_results(tmp_path, {"a": [1, object()]})
    assert os.listdir(tmp_path) == []


def test_names_that_do_not_fit_to_the_matrix_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`results` has 1 task names"):
        write_results(tmp_path, {"accuracy_matrix": MATRIX, "task_names": ["a"]})
    assert os.listdir(tmp_path) == []


def test_the_averages_sum_up_both_matrices():
    averages = stream_averages(MATRIX, task_aware=torch.tensor([[1.0, NAN], [0.9, 0.7]]))
    assert list(averages) == [
        "average_accuracy",
        "average_incremental_accuracy",
        "forgetting",
        "backward_transfer",
        "task_aware_average_accuracy",
    ]
    expected = [0.65, (0.93 + 0.65) / 2, 0.43, -0.43, 0.8]
    assert list(averages.values()) == pytest.approx(expected)
    assert all(type(value) is float for value in averages.values())


def test_the_averages_of_an_error_count_its_growth_as_forgetting():
    averages = stream_averages(torch.tensor([[1.0, NAN], [3.0, 2.0]]), mode="min")
    assert averages["forgetting"] == 2.0
    assert averages["backward_transfer"] == -2.0


def test_the_examples_in_the_docstrings_print_what_they_say():
    assert doctest.testmod(results).failed == 0
