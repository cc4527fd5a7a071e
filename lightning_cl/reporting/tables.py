"""A stream's figures as Rich tables."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

# The terminal that a table must fit into.
_LINE = 80
# With more tasks than these the cells are whole percents, for want of room.
_MOST_WITH_DECIMALS = 10


def accuracy_table(matrix: Tensor, task_names: Sequence[str] | None = None, title: str | None = None) -> Table:
    """Lay out an accuracy matrix: a row per task trained on, a column per task evaluated on, and the average.

    The diagonal is bold, and tasks not yet trained on stay blank. Ten tasks fit into 80 columns; with more of them
    accuracies are shown in percent. Names that are too wide for a column give way to the tasks' numbers, from 1.

    Args:
        matrix: Figures of shape ``(tasks, tasks)``, NaN where nothing was measured. Rows after the last
            measured one are left out.
        task_names: One name per task; ``None`` for their numbers.
        title: What stands above the table.

    Returns:
        A table for `rich.console.Console.print`.

    Example::

        >>> import torch
        >>> from rich.console import Console
        >>> matrix = torch.tensor([[0.98, torch.nan], [0.50, 0.94]])
        >>> Console(width=80).print(accuracy_table(matrix))
        after     1     2  average
        ──────────────────────────
            1  0.98           0.98
            2  0.50  0.94     0.72
    """
    rows = _rows(matrix)
    num_tasks = matrix.shape[1]
    measured = [value for row in rows for value in row if not math.isnan(value)]
    in_percent = num_tasks > _MOST_WITH_DECIMALS and all(0 <= value <= 1 for value in measured)
    cells = [[_cell(value, in_percent) for value in row] for row in rows]

    numbers = [str(task) for task in range(1, num_tasks + 1)]
    names = numbers if task_names is None else _checked_names(task_names, num_tasks)
    cell_width = max((len(cell) for row in cells for cell in row), default=4)
    gap = 0 if in_percent else 1
    first, last = "after", "mean %" if in_percent else "average"
    widths = [max(len(first), *map(len, names)), *(max(len(name), cell_width) for name in names), len(last)]
    headers = names if sum(width + gap + 1 for width in widths) <= _LINE else numbers

    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap, 0, 0),
    )
    for header in (first, *headers, last):
        table.add_column(header, justify="right", no_wrap=True)
    for index, row in enumerate(cells):
        seen = [value for value in rows[index][: index + 1] if not math.isnan(value)]
        average = _cell(sum(seen) / len(seen), in_percent) if seen else "skipped"
        shown = [Text(cell, style="bold" if task == index else "") for task, cell in enumerate(row[: index + 1])]
        table.add_row(headers[index], *shown, *[""] * (num_tasks - index - 1), average)
    return table


def averages_table(averages: Mapping[str, float | Tensor], title: str | None = None) -> Table:
    """Lay out named figures, one a line.

    Args:
        averages: The figures by name, such as `stream_averages` gives them; underscores in names become spaces, and
            NaN a dash.
        title: What stands above the table.

    Returns:
        A table for `rich.console.Console.print`.

    Example::

        >>> from rich.console import Console
        >>> Console(width=80).print(averages_table({"average_accuracy": 0.72, "forgetting": float("nan")}))
        average accuracy  0.7200
        forgetting             -
    """
    table = Table(title=title, box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, value in averages.items():
        figure = float(value)
        table.add_row(name.replace("_", " "), "-" if math.isnan(figure) else f"{figure:.4f}")
    return table


def comparison_table(matrices: Mapping[str, Tensor], task_names: Sequence[str] | None = None) -> Table:
    """Lay out what several heads reached at the end of one run, side by side: a row per task, and the average.

    Args:
        matrices: Accuracy matrices of shape ``(tasks, tasks)`` by head, NaN where nothing was measured.
        task_names: One name per task; ``None`` for their numbers, from 1.

    Returns:
        A table for `rich.console.Console.print`.

    Example::

        >>> import torch
        >>> from rich.console import Console
        >>> matrix = torch.tensor([[0.98, torch.nan], [0.50, 0.94]])
        >>> Console(width=80).print(comparison_table({"nearest mean": matrix + 0.01, "linear": matrix}))
        at the end  nearest mean  linear
        ────────────────────────────────
                 1          0.51    0.50
                 2          0.95    0.94
           average          0.73    0.72
    """
    ends = [_rows(matrix)[-1:] for matrix in matrices.values()]
    num_tasks = len(next(iter(matrices.values())))
    numbers = [str(task) for task in range(1, num_tasks + 1)]
    names = numbers if task_names is None else _checked_names(task_names, num_tasks)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("at the end", *matrices):
        table.add_column(header, justify="right", no_wrap=True)
    for task, name in enumerate(names):
        cells = [_cell(row[task], False) for rows in ends for row in rows]
        if any(cells):
            table.add_row(name, *cells)
    averages = [[value for value in row if not math.isnan(value)] for rows in ends for row in rows]
    table.add_row("average", *(_cell(sum(row) / len(row), False) for row in averages))
    return table


def _rows(matrix: Tensor) -> list[list[float]]:
    """Take the rows of a matrix up to the last one in which a seen task was measured."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`matrix` must have the shape (tasks, tasks), got {tuple(matrix.shape)}.")
    rows: list[list[float]] = matrix.tolist()
    while rows and all(math.isnan(value) for value in rows[-1][: len(rows)]):
        rows.pop()
    return rows


def _checked_names(task_names: Sequence[str], num_tasks: int) -> list[str]:
    if len(task_names) != num_tasks:
        raise ValueError(f"`task_names` has {len(task_names)} names; `matrix` has {num_tasks} tasks.")
    return list(task_names)


def _cell(value: float, in_percent: bool) -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:.0f}" if in_percent else f"{value:.2f}"
