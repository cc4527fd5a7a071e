"""Tables, plots and result files of a run."""

from lightning_cl.reporting.console import print_comparison, print_summary
from lightning_cl.reporting.plots import matrix_figure, per_task_figure, write_plots
from lightning_cl.reporting.results import stream_averages, write_results
from lightning_cl.reporting.tables import accuracy_table, averages_table, comparison_table

__all__ = [
    "accuracy_table",
    "averages_table",
    "comparison_table",
    "matrix_figure",
    "per_task_figure",
    "print_comparison",
    "print_summary",
    "stream_averages",
    "write_plots",
    "write_results",
]
