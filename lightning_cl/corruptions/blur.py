"""Blurs."""

import math

import torch
from torch import Tensor

from lightning_cl.corruptions.draws import Draws
from lightning_cl.corruptions.filters import correlate, gaussian_filter, gaussian_taps
from lightning_cl.corruptions.pixels import relative_size, to_bytes, to_unit

_GAUSSIAN = (0.4, 0.6, 0.7, 0.8, 1.0)
_DEFOCUS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
_MOTION = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
_GLASS = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))


def gaussian_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Blur by a Gaussian, with the edge going on beyond the image."""
    return to_bytes(gaussian_filter(to_unit(images), _GAUSSIAN[severity - 1] * relative_size(images), "edge"))


def defocus_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Blur by a disk whose rim is smoothed, with the image mirrored beyond its edge."""
    radius, sigma = (length * relative_size(images) for length in _DEFOCUS[severity - 1])
    squares = torch.arange(-math.floor(radius), math.floor(radius) + 1).square()
    disk = (squares.unsqueeze(1) + squares <= radius**2).double()
    # In images of 32x32 the smoothing reaches one pixel far, however wide its Gaussian is.
    taps = gaussian_taps(sigma, math.ceil(relative_size(images)))
    values = correlate(to_unit(images), disk / disk.sum(), "mirror")
    return to_bytes(correlate(correlate(values, taps.unsqueeze(1), "mirror"), taps.unsqueeze(0), "mirror"))


def motion_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Blur along a line: pixels take from those to the right, up to 45 degrees up or down, by half a Gaussian."""
    radius, sigma = (length * relative_size(images) for length in _MOTION[severity - 1])
    taps = 2 * math.ceil(radius) + 1
    weights = gaussian_taps(sigma, taps - 1)[taps - 1 :]
    weights /= weights.sum()
    angles = torch.deg2rad(90 * draws.uniform(1) - 45)
    values = to_unit(images).flatten(2)
    blurred = torch.zeros_like(values)
    height, width = images.shape[-2:]
    for distance, weight in enumerate(weights.tolist()):
        down, right = ((distance * part - 0.5).ceil().long() for part in (angles.sin(), angles.cos()))
        rows = (torch.arange(height) + down).clamp(0, height - 1)
        columns = (torch.arange(width) + right).clamp(0, width - 1)
        places = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1)
        blurred += values.gather(2, places.unsqueeze(1).expand_as(values)) * weight
    return to_bytes(blurred).view_as(images)


def glass_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Blur, swap each pixel with a random neighbour, one after the other, and blur again.

    The neighbours are those of the published program, from ``-shift`` to ``shift - 1`` in both directions.
    """
    sigma, shift, iterations = _GLASS[severity - 1]
    sigma, shift = sigma * relative_size(images), max(1, round(shift * relative_size(images)))
    values = gaussian_filter(to_unit(images), sigma, "edge").flatten(2)
    height, width = images.shape[-2:]
    offsets = (draws.uniform(iterations, height, width, 2) * 2 * shift).floor().long() - shift
    order = _swap(offsets, shift)
    values = values.gather(2, order.unsqueeze(1).expand_as(values)).view(images.shape)
    return to_bytes(gaussian_filter(values, sigma, "edge"))


def _swap(offsets: Tensor, shift: int) -> Tensor:
    """Return, for each place of each image, from which place its pixel came, ``(batch, height * width)``.

    Args:
        offsets: Rows down and columns right of the pixel to swap with, ``(batch, iterations, height, width, 2)``.
        shift: The largest.
    """
    batch, iterations, height, width, _ = offsets.shape
    places = torch.arange(height * width).view(height, width)
    # Bare arrays, since these are many small steps, and the images last, since a step takes the same place of all.
    partners = (places + offsets[..., 0] * width + offsets[..., 1]).permute(1, 2, 3, 0)
    there = (partners * batch + torch.arange(batch)).numpy()
    order = torch.arange(height * width).unsqueeze(1).repeat(1, batch)
    here, anywhere = order.view(height, width, batch).numpy(), order.view(-1).numpy()
    for iteration in range(iterations):
        for row in range(height - shift, shift, -1):
            for column in range(width - shift, shift, -1):
                partner, leaving = there[iteration, row, column], here[row, column].copy()
                here[row, column] = anywhere[partner]
                anywhere[partner] = leaving
    return order.t()
