import doctest
import math

import pytest
import torch
from rich.console import Console

from lightning_cl.reporting import accuracy_table, averages_table, tables

NAN = math.nan


def _lines(table, width=80, **console):
    output = Console(width=width, **console)
    with output.capture() as capture:
        output.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def _stream(num_tasks, diagonal=1.0):
    matrix = torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(0)) * 0.9
    matrix.fill_diagonal_(diagonal)
    return matrix.masked_fill(torch.ones_like(matrix, dtype=torch.bool).triu(1), NAN)


MATRIX = torch.tensor([[0.98, NAN, NAN], [0.5, 0.94, NAN], [0.25, 0.5, 1.0]])


def test_a_row_holds_the_accuracies_on_the_tasks_seen_and_their_average():
    assert _lines(accuracy_table(MATRIX, title="Accuracy")) == [
        "Accuracy",
        "after     1     2     3  average",
        "────────────────────────────────",
        "    1  0.98                 0.98",
        "    2  0.50  0.94           0.72",
        "    3  0.25  0.50  1.00     0.58",
    ]


def test_short_names_head_rows_and_columns():
    lines = _lines(accuracy_table(MATRIX, task_names=["cats", "dogs", "birds"]))
    assert lines[0] == "after  cats  dogs  birds  average"
    assert lines[2].split() == ["cats", "0.98", "0.98"]


def test_names_too_wide_for_the_line_give_way_to_numbers():
    names = [f"a task with the number {task}" for task in range(3)]
    assert _lines(accuracy_table(MATRIX, task_names=names))[0].split() == ["after", "1", "2", "3", "average"]


def test_the_diagonal_is_bold():
    lines = _lines(accuracy_table(MATRIX), force_terminal=True, color_system="standard", no_color=False)
    row = next(line for line in lines if "0.94" in line)
    assert "\x1b[1m0.94\x1b[0m" in row
    assert "\x1b[1m0.50" not in row


def test_tasks_measured_ahead_of_their_training_stay_blank():
    matrix = torch.tensor([[0.9, 0.1], [0.8, 0.7]])
    assert "0.10" not in "\n".join(_lines(accuracy_table(matrix)))


@pytest.mark.parametrize("num_tasks", range(1, 18))
def test_up_to_seventeen_tasks_fit_into_eighty_columns(num_tasks):
    # A line more than the head and the rows would be a break, an ellipsis a cell that was cut.
    lines = _lines(accuracy_table(_stream(num_tasks), task_names=[f"task_{task}" for task in range(num_tasks)]))
    assert len(lines) == num_tasks + 2
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)


def test_twenty_tasks_without_full_marks_fit_into_eighty_columns():
    lines = _lines(accuracy_table(_stream(20, diagonal=0.97)))
    assert "…" not in "\n".join(lines)
    assert lines[2].split() == ["1", "97", "97"]
    assert lines[0].endswith("mean %")


def test_a_skipped_task_says_so_and_keeps_its_row():
    matrix = MATRIX.clone()
    matrix[1] = NAN
    lines = _lines(accuracy_table(matrix))
    assert lines[3].split() == ["2", "skipped"]
    assert lines[4].split() == ["3", "0.25", "0.50", "1.00", "0.58"]


def test_tasks_to_come_have_a_column_and_no_row():
    matrix = torch.full((4, 4), NAN)
    matrix[:2, :2] = MATRIX[:2, :2]
    lines = _lines(accuracy_table(matrix))
    assert lines[0].split() == ["after", "1", "2", "3", "4", "average"]
    assert len(lines) == 4


def test_figures_that_are_no_fractions_are_shown_as_they_are():
    assert _lines(accuracy_table(torch.tensor([[12.345]])))[2].split() == ["1", "12.35", "12.35"]


def test_an_average_that_does_not_exist_is_a_dash():
    lines = _lines(averages_table({"average_accuracy": torch.tensor(0.5), "forgetting": NAN}, title="Averages"))
    assert lines[0] == "Averages"
    assert lines[1].split() == ["average", "accuracy", "0.5000"]
    assert lines[2].split() == ["forgetting", "-"]


def test_names_that_do_not_fit_to_the_matrix_are_refused():
    with pytest.raises(ValueError, match="`task_names` has 2 names; `matrix` has 3 tasks"):
        accuracy_table(MATRIX, task_names=["a", "b"])


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"`matrix` must have the shape \(tasks, tasks\), got \(2, 3\)"):
        accuracy_table(torch.zeros(2, 3))


def test_the_examples_in_the_docstrings_print_what_they_say():
    assert doctest.testmod(tables).failed == 0
