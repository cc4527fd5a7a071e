"""A run's accuracies step by step: the figures that sum them up, as files and as a picture for a paper."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_cl.metrics import stability
from lightning_cl.metrics.curve import AccuracyCurve
from lightning_cl.reporting.plots import png_of
from lightning_cl.reporting.results import json_of, plain_number, write_atomically

CSV_NAME = "stability_gap.csv"
JSON_NAME = "stability_gap.json"
PNG_NAME = "stability_gap.png"

PREFIXES = ("", "linear_")  # of a head that stands in for the classification layer, and of that layer
_VISIBLE = 0.03  # a smaller fall has no room for an arrow


def stability_figures(curve: AccuracyCurve, window: int, prefixes: Sequence[str] = PREFIXES) -> dict[str, float]:
    """Compute the figures of a curve, by name.

    Args:
        curve: The accuracies of a run.
        window: Evaluations that WF^w and WP^w look back.
        prefixes: What the names of each head's figures begin with.
    """
    figures: dict[str, float] = {}
    if curve.length == 0:
        return figures
    trained, ends = curve.trained, curve.epoch_ends
    # tasks that are still to come have no part in the figures
    seen = torch.arange(curve.accuracies.shape[2]) <= trained[:, None, None]
    for prefix, accuracies, recency in zip(
        prefixes,
        curve.accuracies.where(seen, torch.nan).unbind(dim=1),
        curve.recency.unbind(dim=1),
        strict=False,
    ):
        found = {
            "average_accuracy": accuracies[-1][: int(trained[-1]) + 1].nanmean(),
            "min_acc": stability.min_accuracy(accuracies, trained),
            "wc_acc": stability.worst_case_accuracy(accuracies, trained),
            f"wf_{window}": stability.windowed_forgetting(accuracies, window),
            f"wp_{window}": stability.windowed_plasticity(accuracies, window),
            "gap": stability.stability_gap(accuracies, trained),
            "gap_norm": stability.normalized_stability_gap(accuracies, trained),
            "recovery": stability.recovery(accuracies, trained),
            "recovery_norm": stability.normalized_recovery(accuracies, trained),
            "task_recency_bias": recency.nanmean(),
            "final_task_recency_bias": recency[-1],
        }
        if bool(ends.any()):
            found["task_min_acc"] = stability.task_minimum_accuracy(accuracies[ends], trained[ends])
        figures.update({prefix + name: plain_number(value) for name, value in found.items()})
    return figures


def write_stability(
    directory: Path,
    curve: AccuracyCurve,
    task_names: Sequence[str],
    head_names: Sequence[str],
    window: int,
    prefixes: Sequence[str] = PREFIXES,
) -> list[Path]:
    """Write the curve as CSV, its figures as JSON and both as a picture.

    Args:
        directory: Where to write; made if it is not there.
        curve: The accuracies of a run.
        task_names: One name per task.
        head_names: One name per head.
        window: Evaluations that WF^w and WP^w look back.
        prefixes: What the names of each head's figures and columns begin with.

    Returns:
        The paths of the files written.
    """
    figures = stability_figures(curve, window, prefixes)
    texts = {CSV_NAME: _csv_text(curve, prefixes), JSON_NAME: json_of(figures)}
    paths = [write_atomically(directory / name, text.encode()) for name, text in texts.items()]
    return [*paths, write_atomically(directory / PNG_NAME, png_of(stability_figure(curve, task_names, head_names)))]


def stability_figure(curve: AccuracyCurve, task_names: Sequence[str], head_names: Sequence[str]) -> Figure:
    """Draw the accuracy on each task over the steps, with task switches, and the deepest gap of each and its recovery.

    Args:
        curve: The accuracies of a run.
        task_names: One name per task.
        head_names: One name per head, each of which has a row.

    Returns:
        A figure that no window shows.
    """
    heads = curve.accuracies.shape[1]
    figure = Figure(figsize=(8.0, 3.2 * heads), layout="constrained")
    rows = figure.subplots(heads, 1, sharex=True, squeeze=False)[:, 0]
    for ax, accuracies, title in zip(rows, curve.accuracies.unbind(dim=1), head_names, strict=True):
        _draw_courses(ax, curve, accuracies, task_names)
        ax.set_title(title, fontsize=9, pad=24)
    rows[-1].set_xlabel("optimizer steps")
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, ncols=1 + len(labels) // 16)
    return figure


def _draw_courses(ax: Axes, curve: AccuracyCurve, accuracies: Tensor, task_names: Sequence[str]) -> None:
    steps, values = curve.steps.numpy(), accuracies.numpy()
    # the tasks have an order, and so have viridis' colours; its pale end is left out for white paper
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, values.shape[1]))
    _mark_gaps(ax, curve, accuracies, colors)
    for task, name in enumerate(task_names):
        known = ~np.isnan(values[:, task])
        if known.any():
            ax.plot(steps[known], values[known, task], color=colors[task], linewidth=1.0, label=name)
    for step in _switches(curve):
        ax.axvline(step, color="0.75", linewidth=0.8, linestyle="--", zorder=0)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(0, int(steps[-1]) * 1.01 + 1)
    ax.set_ylabel("accuracy on probes")
    ax.grid(axis="y", color="0.93", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _mark_gaps(ax: Axes, curve: AccuracyCurve, accuracies: Tensor, colors: np.ndarray) -> None:
    """Write above each task's part how far the old tasks fell on average and came back; mark the deepest fall."""
    gaps = stability.stability_gaps(accuracies, curve.trained)
    for trained in sorted(set(curve.trained.tolist())):
        depths, returns = gaps.last[trained] - gaps.minimum[trained], gaps.final[trained] - gaps.minimum[trained]
        if bool(depths.isnan().all()):
            continue
        inside = curve.trained == trained
        steps = curve.steps[inside]
        middle = (float(steps[0]) + float(steps[-1])) / 2
        text = f"gap {float(depths.nanmean()):.2f}\nrecovery {float(returns.nanmean()):.2f}"
        ax.text(middle, 1.045, text, fontsize=7, ha="center", va="bottom", color="0.25")
        task = int(depths.nan_to_num(-torch.inf).argmax())
        if float(depths[task]) < _VISIBLE:
            continue
        lowest = int(accuracies[inside, task].nan_to_num(torch.inf).argmin())
        at, low, last = float(steps[lowest]), float(gaps.minimum[trained, task]), float(gaps.last[trained, task])
        arrow = {"arrowstyle": "->", "color": colors[task], "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (at, low), (at, last), arrowprops=arrow)


def _switches(curve: AccuracyCurve) -> Iterator[float]:
    """Yield where one task follows another."""
    steps, trained = curve.steps.tolist(), curve.trained.tolist()
    for before, after, task, following in zip(steps, steps[1:], trained, trained[1:], strict=False):
        if task != following:
            yield (before + after) / 2


def _csv_text(curve: AccuracyCurve, prefixes: Sequence[str]) -> str:
    heads, tasks = curve.accuracies.shape[1:]
    columns = ["step", "task", "epoch_end"]
    for prefix in prefixes[:heads]:
        columns += [f"{prefix}acc_task_{task}" for task in range(tasks)] + [f"{prefix}task_recency_bias"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    figures = torch.cat([curve.accuracies, curve.recency[:, :, None]], dim=2).flatten(1)
    for step, task, end, row in zip(
        curve.steps.tolist(), curve.trained.tolist(), curve.epoch_ends.tolist(), figures.tolist(), strict=True
    ):
        writer.writerow([step, task, int(end), *("" if value != value else f"{value:.6g}" for value in row)])
    return text.getvalue()
