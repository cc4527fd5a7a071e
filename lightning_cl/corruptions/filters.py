"""Filters that give an image the same result in whatever batch it comes.

The taps are added up one by one over the whole batch: what convolutions and matrix products round depends on how many
images there are. Borders may be wider than the image, which torch's own padding refuses.
"""

import math
from typing import Literal

import torch
from torch import Tensor

# What an image d c b a continues with beyond its end: a a a, b c d or a b c.
Border = Literal["edge", "mirror", "symmetric"]


def correlate(images: Tensor, kernel: Tensor, border: Border) -> Tensor:
    """Filter every image by one kernel with odd sides.

    Args:
        images: ``(..., height, width)``, floats.
        kernel: ``(rows, columns)``.
        border: How images continue beyond their borders.
    """
    height, width = images.shape[-2:]
    rows = _continue(height, kernel.shape[0] // 2, border)
    columns = _continue(width, kernel.shape[1] // 2, border)
    padded = images.index_select(-2, rows).index_select(-1, columns)
    filtered = torch.zeros_like(images)
    for row, column in kernel.nonzero().tolist():
        filtered += padded[..., row : row + height, column : column + width] * kernel[row, column]
    return filtered


def gaussian_filter(images: Tensor, sigma: float, border: Border, truncate: float = 4.0) -> Tensor:
    """Filter every image by a Gaussian.

    Args:
        images: ``(..., height, width)``, floats.
        sigma: Standard deviation in pixels.
        border: How images continue beyond their borders.
        truncate: Standard deviations after which the Gaussian ends.
    """
    taps = gaussian_taps(sigma, int(truncate * sigma + 0.5))
    return correlate(correlate(images, taps.unsqueeze(1), border), taps.unsqueeze(0), border)


def gaussian_taps(sigma: float, reach: int) -> Tensor:
    """Return ``2 * reach + 1`` weights of a Gaussian that add up to 1."""
    if reach == 0:
        return torch.ones(1, dtype=torch.float64)
    taps = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(-reach, reach + 1)]
    return torch.tensor(taps, dtype=torch.float64) / sum(taps)


def _continue(size: int, reach: int, border: Border) -> Tensor:
    places = torch.arange(-reach, size + reach)
    if border == "edge":
        return places.clamp(0, size - 1)
    period = 2 * size if border == "symmetric" else max(1, 2 * size - 2)
    places = places.remainder(period)
    last = period - 1 if border == "symmetric" else period
    return torch.where(places < size, places, last - places)
