"""A stream's accuracies as figures for a paper, drawn without a display and without pyplot's global state."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_cl.metrics.heatmap import draw_accuracy_matrix
from lightning_cl.reporting.results import write_atomically

MATRIX_NAME = "accuracy_matrix.png"
PER_TASK_NAME = "accuracy_per_task.png"

_DOTS_PER_INCH = 200
_MARKERS = "osD^vP*X<>"


def write_plots(
    directory: str | Path, matrix: Tensor, task_names: Sequence[str] | None = None, label: str = "accuracy"
) -> list[Path]:
    """Write the heat map of a matrix and the course of each task as PNG files.

    Args:
        directory: Where to write ``accuracy_matrix.png`` and ``accuracy_per_task.png``; made if it is not there.
        matrix: Figures of shape ``(tasks, tasks)``, NaN where nothing was measured.
        task_names: One name per task; ``None`` for their numbers, from 1.
        label: What the figures are, for the axes.

    Returns:
        The paths of the files written.
    """
    if task_names is not None and len(task_names) != len(matrix):
        raise ValueError(f"`task_names` has {len(task_names)} names; `matrix` has {len(matrix)} tasks.")
    figures = {
        MATRIX_NAME: matrix_figure(matrix, task_names, label),
        PER_TASK_NAME: per_task_figure(matrix, task_names, label),
    }
    return [write_atomically(Path(directory) / name, png_of(figure)) for name, figure in figures.items()]


def matrix_figure(matrix: Tensor, task_names: Sequence[str] | None = None, label: str = "accuracy") -> Figure:
    """Draw a matrix as a heat map: a row per task trained on, a column per task evaluated on.

    Args:
        matrix: Figures of shape ``(tasks, tasks)``, NaN where nothing was measured.
        task_names: One name per task; ``None`` for their numbers, from 1.
        label: What the figures are, for the colour bar.

    Returns:
        A figure that no window shows.
    """
    side = max(3.0, 1.4 + 0.36 * len(matrix))
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    draw_accuracy_matrix(matrix, figure.add_subplot(), task_names, label)
    return figure


def per_task_figure(matrix: Tensor, task_names: Sequence[str] | None = None, label: str = "accuracy") -> Figure:
    """Draw the course of each task over the stream as a line, and the average over the tasks seen.

    Args:
        matrix: Figures of shape ``(tasks, tasks)``, NaN where nothing was measured.
        task_names: One name per task; ``None`` for their numbers, from 1.
        label: What the figures are, for the vertical axis.

    Returns:
        A figure that no window shows.
    """
    values = matrix.detach().float().cpu().numpy()
    num_tasks = len(values)
    names = list(task_names) if task_names is not None else [f"task {task}" for task in range(1, num_tasks + 1)]
    seen = np.where(np.tri(num_tasks, dtype=bool), values, np.nan)
    figure = Figure(figsize=(max(5.2, 3.4 + 0.24 * num_tasks), 3.2), layout="constrained")
    ax = figure.add_subplot()
    # The tasks have an order, and so have viridis' colours; its pale end is left out for white paper.
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, num_tasks))
    steps = np.arange(1, num_tasks + 1)
    for task in range(num_tasks):
        _draw_course(ax, steps, seen[:, task], names[task], color=colors[task], marker=_MARKERS[task % len(_MARKERS)])
    counts = (~np.isnan(seen)).sum(axis=1)
    average = np.where(counts > 0, np.nansum(seen, axis=1) / np.maximum(counts, 1), np.nan)
    known = ~np.isnan(average)
    ax.plot(steps[known], average[known], color="black", linewidth=2.2, linestyle="--", label="average", zorder=5)
    _finish(ax, seen, num_tasks, label)
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG file, with little margin."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.05)
    return buffer.getvalue()


def _draw_course(ax: Axes, steps: np.ndarray, values: np.ndarray, name: str, color: np.ndarray, marker: str) -> None:
    known = ~np.isnan(values)
    ax.plot(steps[known], values[known], color=color, marker=marker, markersize=4, linewidth=1.2, label=name)


def _finish(ax: Axes, values: np.ndarray, num_tasks: int, label: str) -> None:
    measured = values[~np.isnan(values)]
    if not measured.size or (measured.min() >= 0 and measured.max() <= 1):
        ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(0.7, num_tasks + 0.3)
    ax.set_xticks(range(1, num_tasks + 1))
    ax.set_xlabel("tasks trained")
    ax.set_ylabel(label)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        ncols=1 + num_tasks // 11,
        handlelength=1.8,
    )
