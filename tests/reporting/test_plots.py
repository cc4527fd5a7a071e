import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lightning_cl.reporting import matrix_figure, per_task_figure, write_plots

NAN = math.nan
MATRIX = torch.tensor([[0.9, NAN, NAN], [0.6, 0.8, NAN], [0.7, 0.5, 1.0]])


def _stream(num_tasks):
    matrix = torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(0))
    return matrix.masked_fill(torch.ones_like(matrix, dtype=torch.bool).triu(1), NAN)


@pytest.mark.parametrize("num_tasks", [1, 2, 20])
def test_both_plots_are_written_as_images_with_ink_on_them(tmp_path, num_tasks):
    paths = write_plots(tmp_path, _stream(num_tasks))
    assert [path.name for path in paths] == ["accuracy_matrix.png", "accuracy_per_task.png"]
    assert sorted(os.listdir(tmp_path)) == ["accuracy_matrix.png", "accuracy_per_task.png"]
    for path in paths:
        image = imread(path)
        assert min(image.shape[:2]) > 300
        assert np.unique(image[..., 0]).size > 10


def test_the_heat_map_has_a_number_in_each_measured_cell():
    (ax, _) = matrix_figure(MATRIX, ["a", "b", "c"], label="top-1").axes
    assert [text.get_text() for text in ax.texts] == ["0.90", "0.60", "0.80", "0.70", "0.50", "1.00"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]


def test_the_heat_map_of_many_tasks_is_in_percent():
    ax, bar = matrix_figure(torch.full((13, 13), 0.25)).axes
    assert {text.get_text() for text in ax.texts} == {"25"}
    assert bar.get_ylabel() == "accuracy (%)"


def test_each_task_is_a_line_from_its_training_on_and_the_average_is_one_more():
    (ax,) = per_task_figure(MATRIX).axes
    lines = {line.get_label(): (list(line.get_xdata()), line.get_ydata()) for line in ax.lines}
    assert list(lines) == ["task 1", "task 2", "task 3", "average"]
    assert lines["task 2"][0] == [2, 3]
    assert lines["task 2"][1] == pytest.approx([0.8, 0.5])
    assert lines["average"][1] == pytest.approx([0.9, 0.7, 2.2 / 3])


def test_a_skipped_task_leaves_a_gap_in_no_other_line():
    matrix = MATRIX.clone()
    matrix[1] = NAN
    (ax,) = per_task_figure(matrix).axes
    lines = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert lines["task 1"] == [1, 3]
    assert lines["task 2"] == [3]
    assert lines["average"] == [1, 3]


def test_a_matrix_without_a_figure_can_be_drawn(tmp_path):
    assert len(write_plots(tmp_path, torch.full((2, 2), NAN))) == 2


def test_an_error_that_is_no_fraction_is_drawn_on_its_own_scale():
    (ax,) = per_task_figure(torch.tensor([[12.0, NAN], [40.0, 20.0]]), label="val_mae").axes
    assert ax.get_ylim()[1] >= 40
    assert ax.get_ylabel() == "val_mae"


def test_names_that_do_not_fit_to_the_matrix_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`task_names` has 2 names; `matrix` has 3 tasks"):
        write_plots(tmp_path, MATRIX, ["a", "b"])


def test_plotting_leaves_matplotlib_as_the_user_set_it_up(tmp_path):
    script = (
        "import sys, matplotlib, torch\n"
        "from matplotlib import pyplot\n"
        "matplotlib.use('svg')\n"
        "before = dict(matplotlib.rcParams)\n"
        "from lightning_cl.reporting import write_plots\n"
        "write_plots(sys.argv[1], torch.eye(2))\n"
        "assert pyplot.get_fignums() == []\n"
        "assert matplotlib.get_backend() == 'svg'\n"
        "assert dict(matplotlib.rcParams) == before\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script, str(tmp_path)], check=True)
