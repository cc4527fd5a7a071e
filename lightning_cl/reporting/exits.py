"""What a network with exits costs and how often it is right: figures, a table, a file and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich import box, get_console
from rich.table import Table
from torch import Tensor

from lightning_cl.metrics.early_exit import (
    ExitCurve,
    ExitSummary,
    accuracy_at_budget,
    area_under_exit_curve,
    mean_curve,
)
from lightning_cl.metrics.functional import forgetting
from lightning_cl.reporting.plots import png_of
from lightning_cl.reporting.results import json_of, plain_number, write_atomically

JSON_NAME = "exits.json"
PNG_NAME = "exits.png"
BUDGETS = (0.25, 0.5, 0.75, 1.0)


def exit_figures(
    summaries: Mapping[int, ExitSummary], costs: Tensor, threshold: float | None, accuracies: Tensor
) -> dict[str, Any]:
    """Compute the figures of a network with exits.

    Args:
        summaries: What was measured of each task's samples.
        costs: What a sample costs that leaves at each exit, as a share of the network without exits.
        threshold: The one in use, ``None`` if nobody leaves. Accuracy, cost and use of the exits are NaN if the samples
            were not measured with it.
        accuracies: Accuracy of each exit on each task after each task, ``(tasks, tasks, exits)``.

    Returns:
        The figures by name; every task weighs the same.
    """
    mean = mean_curve([part.curve(costs) for part in summaries.values()])
    shares, right = zip(*(part.at(1.0 if threshold is None else threshold) for part in summaries.values()), strict=True)
    accuracy = torch.stack(right).mean()
    if accuracy.isnan():
        rank_zero_warn(
            f"The exits were not measured with `threshold={threshold}`, so accuracy and cost at it are not known. They"
            " are measured at the end of each task: train one with it, or take a multiple of 0.01."
        )
    return {
        "threshold": threshold,
        "accuracy": plain_number(accuracy),
        # without a threshold the heads say nothing and the network answers alone
        "cost": 1.0 if threshold is None else plain_number((torch.stack(shares) * costs).sum(1).mean()),
        "accuracy_at_budget": {str(budget): plain_number(accuracy_at_budget(mean, budget)) for budget in BUDGETS},
        "area_under_curve": plain_number(area_under_exit_curve(mean)),
        "overthinking": plain_number(torch.stack([part.overthinking for part in summaries.values()]).mean()),
        "forgetting": [plain_number(forgetting(matrix)) for matrix in accuracies.unbind(2)],
        "exit_costs": costs,
        "exit_accuracies": torch.stack([part.exit_accuracies for part in summaries.values()]).mean(0),
        "exit_shares": {str(task): part for task, part in zip(summaries, shares, strict=True)},
        "accuracy_matrices": accuracies.permute(2, 0, 1),
        "curve": mean._asdict(),
    }


def exit_table(figures: Mapping[str, Any]) -> Table:
    """Lay out cost, accuracy, forgetting and use of each exit, and the accuracy at each budget under it.

    Args:
        figures: Those of `exit_figures`.

    Returns:
        A table for `rich.console.Console.print`.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("exit", "cost", "accuracy", "forgetting", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    shares = torch.stack([torch.as_tensor(part) for part in figures["exit_shares"].values()]).mean(0)
    last = len(figures["exit_costs"]) - 1
    for exit_, (cost, accuracy) in enumerate(zip(figures["exit_costs"], figures["exit_accuracies"], strict=True)):
        lost = figures["forgetting"][exit_]
        name = "end" if exit_ == last else str(exit_ + 1)
        lost_cell = "-" if lost is None or lost != lost else f"{lost:.2f}"
        table.add_row(name, f"{float(cost):.2f}", f"{float(accuracy):.2f}", lost_cell, f"{float(shares[exit_]):.0%}")
    table.add_section()
    table.add_row("used", f"{figures['cost']:.2f}", f"{figures['accuracy']:.2f}", "", "")
    for budget, reached in figures["accuracy_at_budget"].items():
        cell = "-" if reached is None or reached != reached else f"{reached:.2f}"
        table.add_row("within", f"{float(budget):.2f}", cell, "", "")
    return table


def print_exits(figures: Mapping[str, Any]) -> None:
    """Print the table of a network's exits."""
    get_console().print(exit_table(figures))


def write_exits(
    directory: Path, figures: Mapping[str, Any], summaries: Mapping[int, ExitSummary], task_names: Sequence[str]
) -> list[Path]:
    """Write ``exits.json`` and ``exits.png``.

    Args:
        directory: Where to write; made if it is not there.
        figures: Those of `exit_figures`.
        summaries: What was measured of each task's samples.
        task_names: One name per task.

    Returns:
        The paths of the files written.
    """
    curves = {task_names[task]: part.curve(figures["exit_costs"]) for task, part in summaries.items()}
    picture = exit_curves_figure(
        curves, figures["cost"], figures["accuracy"], figures["exit_costs"], figures["exit_accuracies"]
    )
    return [
        write_atomically(directory / JSON_NAME, json_of(figures).encode()),
        write_atomically(directory / PNG_NAME, png_of(picture)),
    ]


def exit_curves_figure(
    curves: Mapping[str, ExitCurve], cost: float, accuracy: float, exit_costs: Tensor, exit_accuracies: Tensor
) -> Figure:
    """Draw accuracy over cost for each task and on average, with the exits taken alone and the threshold in use.

    Args:
        curves: Cost and accuracy by threshold, by task.
        cost: Mean cost at the threshold in use.
        accuracy: Mean accuracy there.
        exit_costs: What a sample costs that leaves at each exit.
        exit_accuracies: Accuracy of each exit on all samples.

    Returns:
        A figure that no window shows.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = figure.subplots()
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, len(curves)))
    for (name, curve), color in zip(curves.items(), colors, strict=True):
        ax.plot(curve.costs.numpy(), curve.accuracies.numpy(), color=color, linewidth=0.9, label=name)
    mean = mean_curve(list(curves.values()))
    ax.plot(mean.costs.numpy(), mean.accuracies.numpy(), color="black", linewidth=1.8, label="mean")
    ax.plot(
        exit_costs.numpy(),
        exit_accuracies.numpy(),
        "o",
        color="black",
        markersize=4,
        fillstyle="none",
        label="one exit for all",
    )
    ax.plot([cost], [accuracy], "D", color="tab:red", markersize=5, label="threshold in use")
    ax.set_xlabel("FLOPs of a sample, network without exits = 1")
    ax.set_ylabel("accuracy")
    ax.set_ylim(-0.03, 1.03)
    ax.grid(color="0.93", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
