"""Images as they were beside what became of them, for the eye to check."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_cl.reporting.plots import png_of
from lightning_cl.reporting.results import write_atomically

_CELL = 0.85  # inches
_GAP = 0.18  # between pairs, in images


class SheetRow(NamedTuple):
    """A row of a contact sheet: some samples of one class.

    Args:
        label: The class.
        corruption: What its images were corrupted with.
        pairs: Images before and after, uint8 ``(channels, height, width)``.
    """

    label: int
    corruption: str
    pairs: list[tuple[Tensor, Tensor]]


def write_contact_sheet(path: Path, rows: Sequence[SheetRow], title: str) -> Path:
    """Write a contact sheet as a PNG file.

    Args:
        path: The file; its directory is made if it is not there.
        rows: One for each class.
        title: What stands above it.

    Returns:
        The path.
    """
    return write_atomically(path, png_of(contact_sheet(rows, title)))


def contact_sheet(rows: Sequence[SheetRow], title: str) -> Figure:
    """Draw a contact sheet: a row for each class, in it pairs of a clean image and the poisoned one.

    Args:
        rows: One for each class.
        title: What stands above it.

    Returns:
        A figure that no window shows.
    """
    pairs = max(len(row.pairs) for row in rows)
    widths = [1.0, 1.0, _GAP] * pairs
    figure = Figure(figsize=(_CELL * sum(widths), _CELL * len(rows)))
    # the texts stand outside, where `png_of` makes room for them
    outside = {"left": 0.0, "right": 1.0, "bottom": 0.0, "top": 1.0}
    grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths, wspace=0.06, hspace=0.08, **outside)
    for place, row in enumerate(rows):
        for number, images in enumerate(row.pairs):
            for side, image in enumerate(images):
                ax = figure.add_subplot(grid[place, 3 * number + side])
                draw_image(ax, image)
                ax.spines[:].set_visible(False)
                if place == 0:
                    ax.set_title(("clean", "poisoned")[side], fontsize=8, pad=3)
                if number == side == 0:
                    text = f"class {row.label}\n{row.corruption.replace('_', ' ')}"
                    ax.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
    figure.suptitle(title, fontsize=9, y=1 + 0.25 / figure.get_figheight(), va="bottom")
    return figure


def draw_image(ax: Axes, image: Tensor) -> None:
    """Draw an image without ticks.

    Args:
        ax: Where to draw.
        image: Pixels from 0 to 255 in the form ``(channels, height, width)``; one channel is grey.
    """
    pixels = image.cpu().movedim(0, -1).numpy()
    grey = pixels.shape[-1] == 1
    ax.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
    ax.set_xticks([])
    ax.set_yticks([])
