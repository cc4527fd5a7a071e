"""A run's figures on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import get_console
from torch import Tensor

from lightning_cl.reporting.tables import accuracy_table, averages_table, comparison_table


def print_summary(
    matrix: Tensor,
    averages: Mapping[str, float | Tensor],
    task_names: Sequence[str] | None = None,
    title: str | None = None,
    paths: Iterable[Path] = (),
) -> None:
    """Print a matrix, the averages under it, and where the files of a run are.

    Args:
        matrix: Figures of shape ``(tasks, tasks)``, NaN where nothing was measured.
        averages: Figures by name, such as `stream_averages` gives them.
        task_names: One name per task; ``None`` for their numbers, from 1.
        title: What stands above the matrix.
        paths: The files; those below the working directory are shown relative to it.
    """
    console = get_console()
    console.print(accuracy_table(matrix, task_names, title))
    console.print(averages_table(averages))
    here = Path.cwd()
    for path in paths:
        shown = path.relative_to(here) if path.is_relative_to(here) else path
        console.print(f"  {shown}", soft_wrap=True, highlight=False)


def print_comparison(matrices: Mapping[str, Tensor], task_names: Sequence[str] | None = None) -> None:
    """Print what several heads reached at the end of one run, side by side.

    Args:
        matrices: Accuracy matrices of shape ``(tasks, tasks)`` by head.
        task_names: One name per task; ``None`` for their numbers, from 1.
    """
    get_console().print(comparison_table(matrices, task_names))
