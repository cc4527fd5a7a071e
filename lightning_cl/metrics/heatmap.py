"""The drawing of an accuracy matrix, shared by `AccuracyMatrix.plot` and the result files."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from torch import Tensor


def draw_accuracy_matrix(
    matrix: Tensor, ax: Axes, task_names: Sequence[str] | None = None, label: str = "accuracy"
) -> None:
    """Draw a matrix as a heat map with a number in each measured cell.

    Args:
        matrix: Figures of shape ``(tasks, tasks)``, NaN where nothing was measured.
        ax: The axes to draw into.
        task_names: One name per task; ``None`` for their numbers, from 1.
        label: The name of the figure, for the colour bar.
    """
    values = matrix.detach().float().cpu().numpy()
    num_tasks = len(values)
    names = list(task_names) if task_names is not None else [str(task) for task in range(1, num_tasks + 1)]
    measured = values[values == values]
    is_fraction = not measured.size or bool(measured.min() >= 0 and measured.max() <= 1)
    low, high = (0.0, 1.0) if is_fraction else (float(measured.min()), float(measured.max()))
    # Many tasks leave no room for a leading zero and a point.
    in_percent = is_fraction and num_tasks > 12
    if in_percent:
        values, high, label = 100 * values, 100.0, f"{label} (%)"

    # cividis looks the same to readers with and without colour vision deficiency and turns into an even grey in print.
    image = ax.imshow(values, cmap="cividis", vmin=low, vmax=high)
    ax.set_facecolor("white")
    for row, column in zip(*(~(values != values)).nonzero(), strict=True):
        value = values[row, column]
        ax.text(
            column,
            row,
            f"{value:.0f}" if in_percent else f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if row == column else "normal",
            color="white" if (value - low) < 0.5 * ((high - low) or 1.0) else "black",
        )
    long_names = max(map(len, names)) > 3
    ax.set_xticks(range(num_tasks), names, rotation=45 if long_names else 0, ha="right" if long_names else "center")
    ax.set_yticks(range(num_tasks), names)
    ax.tick_params(length=0)
    ax.set_xlabel("evaluated on task")
    ax.set_ylabel("after training on task")
    for spine in ax.spines.values():
        spine.set_visible(False)
    figure = ax.get_figure()
    if figure is not None:
        bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
        bar.set_label(label)
        bar.outline.set_visible(False)
