"""Which samples of a task are suspicious: a table of all, and a picture of the first, for a person to look at."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from lightning_cl.reporting.contact_sheet import draw_image
from lightning_cl.reporting.plots import png_of
from lightning_cl.reporting.results import write_atomically

_CELL = 0.95  # inches
_COLUMNS = 8
_GAP = 0.35  # between the two groups, in images


class ScreenedSample(NamedTuple):
    """A sample as a screen saw it.

    Args:
        position: Its index in the data of the task.
        label: Its class.
        score: How far it moved, compared with others of its class.
        poisoned: Whether it is poisoned; ``None`` if nobody knows.
    """

    position: int
    label: int
    score: float
    poisoned: bool | None


def write_ranking(path: Path, samples: Sequence[ScreenedSample]) -> Path:
    """Write a table of samples, most suspicious first; the last column is empty where the poison is not known.

    Args:
        path: The CSV file; its directory is made if it is not there.
        samples: In the order of their ranks.

    Returns:
        The path.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "index", "label", "score", "poisoned"])
    for rank, sample in enumerate(samples, 1):
        known = "" if sample.poisoned is None else int(sample.poisoned)
        writer.writerow([rank, sample.position, sample.label, f"{sample.score:.6g}", known])
    return write_atomically(path, text.getvalue().encode())


def write_suspects(
    path: Path, suspects: Sequence[ScreenedSample], usual: Sequence[ScreenedSample], images: Tensor, title: str
) -> Path:
    """Write a contact sheet as a PNG file: the most suspicious samples, and the least suspicious to compare them with.

    Args:
        path: The file; its directory is made if it is not there.
        suspects: In the order of their ranks.
        usual: The others.
        images: Those of the suspects, then of the others, ``(images, channels, height, width)``, uint8 or floats of
            any range, which is stretched for all of them alike.
        title: What stands above it.

    Returns:
        The path.
    """
    return write_atomically(path, png_of(suspects_figure(suspects, usual, images, title)))


def suspects_figure(
    suspects: Sequence[ScreenedSample], usual: Sequence[ScreenedSample], images: Tensor, title: str
) -> Figure:
    """Draw the contact sheet; see `write_suspects`.

    Returns:
        A figure that no window shows.
    """
    groups = [group for group in (suspects, usual) if group]
    heights = [1.3] * math.ceil(len(suspects) / _COLUMNS)
    first = len(heights) + 1
    if usual:
        heights += [_GAP, *[1.3] * math.ceil(len(usual) / _COLUMNS)]
    figure = Figure(figsize=(_CELL * _COLUMNS, _CELL * sum(heights)))
    # the texts stand outside, where `png_of` makes room for them
    outside = {"left": 0.0, "right": 1.0, "bottom": 0.0, "top": 1.0}
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights, wspace=0.08, hspace=0.3, **outside)
    shown = _as_pixels(images)
    number = 0
    for row, group in zip((0, first), groups, strict=False):
        for place, sample in enumerate(group):
            ax = figure.add_subplot(grid[row + place // _COLUMNS, place % _COLUMNS])
            draw_image(ax, shown[number])
            ax.spines[:].set_color("tab:red" if sample.poisoned else "0.7")
            ax.spines[:].set_linewidth(2.0 if sample.poisoned else 0.5)
            text = f"{sample.position} · class {sample.label}\n{sample.score:.3g}"
            ax.set_title(text, fontsize=6, pad=2, color="tab:red" if sample.poisoned else "black")
            if place == 0 and row:
                ax.set_ylabel("least\nsuspicious", fontsize=7)
            number += 1
    figure.suptitle(title, fontsize=9, y=1 + 0.25 / figure.get_figheight(), va="bottom")
    return figure


def _as_pixels(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        return images
    # normalised images: each channel by its own range, over all images alike, so that a pale one stays pale
    low, high = (extreme((0, 2, 3), keepdim=True) for extreme in (images.float().amin, images.float().amax))
    return ((images.float() - low) / (high - low).clamp(min=1e-12)).mul(255).round().byte()
