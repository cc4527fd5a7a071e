"""Changes of the values, of the resolution and of the geometry."""

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_cl.corruptions.draws import Draws
from lightning_cl.corruptions.filters import gaussian_filter
from lightning_cl.corruptions.pixels import to_bytes, to_unit

_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
_QUALITY = (80, 65, 58, 50, 40)
_RESOLUTION = (0.95, 0.9, 0.85, 0.75, 0.65)
_ELASTIC = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))


def contrast(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Bring values nearer to the mean of their channel."""
    # Integers are added up exactly, in whatever order.
    means = images.sum(dim=(2, 3), keepdim=True).double() / (images[0, 0].numel() * 255)
    return to_bytes((to_unit(images) - means) * _CONTRAST[severity - 1] + means)


def brightness(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add to the value of HSV, which multiplies the channels alike and makes black grey."""
    values = to_unit(images)
    value = values.amax(dim=1, keepdim=True)
    tones = torch.where(value > 0, values / value, 1)
    return to_bytes(tones * (value + _BRIGHTNESS[severity - 1]).clamp(max=1))


def jpeg_compression(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Write as JPEG, and read again."""
    with warnings.catch_warnings():
        # from torchvision 0.29 on, the function, which stays, warns of the ones that it calls
        warnings.simplefilter("ignore", DeprecationWarning)
        compressed: Tensor = functional.jpeg(images, _QUALITY[severity - 1])
    return compressed


def pixelate(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Resize to fewer pixels and back, by boxes, rounding to whole levels along each side as Pillow does."""
    height, width = images.shape[-2:]
    to_rows, to_columns = (_boxes(size, max(1, int(size * _RESOLUTION[severity - 1]))) for size in (height, width))
    small = (images.double() @ to_columns.t() + 0.5).floor()
    small = (to_rows @ small + 0.5).floor()
    back = [((torch.arange(size) + 0.5) * small.shape[dim] / size).long() for dim, size in ((-2, height), (-1, width))]
    return small.index_select(-2, back[0]).index_select(-1, back[1]).byte()


def elastic_transform(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Move three points at random and the image with them (affinely), then every pixel by a smooth random field."""
    height, width = images.shape[-2:]
    distance, sigma, jitter = (length * min(height, width) for length in _ELASTIC[severity - 1])
    rows, columns = _map_affinely((2 * draws.uniform(3, 2) - 1) * jitter, height, width)
    values = _sample(to_unit(images), rows, columns, "mirror")
    fields = gaussian_filter(2 * draws.uniform(2, height, width) - 1, sigma, "symmetric", truncate=3) * distance
    rows, columns = torch.arange(height).unsqueeze(1) + fields[:, 0], torch.arange(width) + fields[:, 1]
    return to_bytes(_sample(values, rows, columns, "symmetric"))


def _boxes(size: int, smaller: int) -> Tensor:
    """Return which share every one of ``size`` pixels has in ``smaller`` pixels: those with their centres inside."""
    scale = size / smaller
    centres = (torch.arange(smaller, dtype=torch.float64).unsqueeze(1) + 0.5) * scale
    places = (torch.arange(size, dtype=torch.float64) + 0.5 - centres) / scale
    inside = ((places > -0.5) & (places <= 0.5)).double()
    return inside / inside.sum(dim=1, keepdim=True)


def _map_affinely(moves: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return from which rows and columns pixels come where three points around the centre move.

    Args:
        moves: Columns to the right and rows down for each point, ``(batch, 3, 2)``.
        height: Rows of the image.
        width: Columns of the image.
    """
    reach = max(1, min(height, width) // 3)
    corners = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64)
    points = torch.tensor([width // 2, height // 2]) + reach * corners
    arrivals = F.pad(points + moves, (0, 1), value=1)
    across, down, start = torch.linalg.solve(arrivals, points).unsqueeze(-1).unsqueeze(-1).unbind(dim=1)
    origins = across * torch.arange(width) + down * torch.arange(height).unsqueeze(1) + start
    return origins[:, 1], origins[:, 0]


def _sample(values: Tensor, rows: Tensor, columns: Tensor, border: Literal["mirror", "symmetric"]) -> Tensor:
    """Interpolate images linearly at ``rows`` and ``columns`` of shape ``(batch, height, width)``."""
    height, width = values.shape[-2:]
    # These are the places that torch counts from -1 to 1: the middles of the outer pixels, or their outer edges.
    if border == "mirror":
        places = [2 * columns / max(1, width - 1) - 1, 2 * rows / max(1, height - 1) - 1]
    else:
        places = [(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1]
    grid = torch.stack(places, dim=-1)
    return F.grid_sample(values, grid, padding_mode="reflection", align_corners=border == "mirror")
