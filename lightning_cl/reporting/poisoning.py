"""What a poison detector saw of each task: one line on the console, a file and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from rich import get_console

from lightning_cl.reporting.plots import png_of
from lightning_cl.reporting.results import json_of, write_atomically

REPORT_NAME = "poison_report.json"
PICTURE_NAME = "poison_shift.png"

_COLORS = {"poisoned": "tab:red", "calibration": "tab:blue"}


def describe_value(value: float, statistic: str) -> str:
    """Return an angle or a slope as people read it."""
    return f"{value:.1f}°" if statistic == "angle" else f"{value:.3g}"


def print_verdict(trainer: Trainer, text: str) -> None:
    """Say on the console what the detector saw and did; on the first rank only."""
    if trainer.is_global_zero:
        get_console().print(f"PoisonDetector: {text}", markup=False, highlight=False, soft_wrap=True)


def write_poison_report(directory: Path, record: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """Write ``poison_report.json``.

    Args:
        directory: Where to write; made if it is not there.
        record: What was seen of each task: its ``task``, ``name``, ``verdict``, ``angle`` and ``shifts`` by layer.
        settings: Those of the detector, with the threshold in force.

    Returns:
        The path of the file.
    """
    report = json_of({"settings": dict(settings), "tasks": list(record)})
    return write_atomically(directory / REPORT_NAME, report.encode())


def write_shift_picture(directory: Path, record: Sequence[Mapping[str, Any]], relative: bool) -> Path:
    """Write ``poison_shift.png``.

    Args:
        directory: Where to write; made if it is not there.
        record: See `write_poison_report`.
        relative: Whether shifts are divided by that of the first layer, as they were judged.

    Returns:
        The path of the file.
    """
    return write_atomically(directory / PICTURE_NAME, png_of(shift_figure(record, relative)))


def shift_figure(record: Sequence[Mapping[str, Any]], relative: bool = False) -> Figure:
    """Draw the cumulative shift over the layers, a line for each task: the steeper, the more suspicious.

    Args:
        record: See `write_poison_report`.
        relative: Whether shifts are divided by that of the first layer.

    Returns:
        A figure that no window shows.
    """
    layers = list(dict.fromkeys(layer for entry in record for layer in entry["shifts"]))  # a task may bring new ones
    places = np.arange(1, len(layers) + 1)
    figure = Figure(figsize=(max(5.6, 2.6 + 0.22 * len(layers)), 3.8), layout="constrained")
    ax = figure.subplots()
    for entry in record:
        shifts = np.array(list(entry["shifts"].values()), dtype=float)
        if relative:
            shifts = shifts / shifts[0]
        verdict = entry["verdict"]
        ax.plot(
            [places[layers.index(layer)] for layer in entry["shifts"]],
            np.cumsum(shifts),
            color=_COLORS.get(verdict, "0.55"),
            linewidth=1.8 if verdict == "poisoned" else 1.0,
            marker="o",
            markersize=3,
            label=f"{entry['name']}: {entry['angle']:.1f}°, {verdict}",
        )
    ax.set_xticks(places, layers, rotation=90 if len(layers) > 4 else 0, fontsize=7)
    ax.set_xlabel("layer")
    ax.set_ylabel("cumulative shift" + (" / shift of the first layer" if relative else ""))
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
