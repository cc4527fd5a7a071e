"""Weather."""

import torch
from torch import Tensor

from lightning_cl.corruptions.draws import Draws
from lightning_cl.corruptions.pixels import to_bytes, to_unit

_FOG = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
_WIBBLE = 100


def fog(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add a plasma fractal, and bring the image's largest value back to where it may be at most."""
    density, decay = _FOG[severity - 1]
    height, width = images.shape[-2:]
    side = 1 << max(1, (max(height, width) - 1).bit_length())
    fractal = _plasma(2 * draws.uniform(side, side) - 1, decay)[:, :height, :width]
    values = to_unit(images)
    largest = values.amax(dim=(1, 2, 3), keepdim=True)
    return to_bytes((values + density * fractal.unsqueeze(1)) * largest / (largest + density))


def _plasma(draws: Tensor, decay: float) -> Tensor:
    """Return fractal height maps from 0 to 1 by the diamond-square algorithm on a torus.

    Each point is the mean of the four around it, at half the distance of the step before, and a random part. The
    published program multiplies by the wibble twice, so that the random part falls by the decay's square.

    Args:
        draws: The random part of each point, from -1 to 1, ``(batch, side, side)``, side a power of two.
        decay: What the wibble is divided by after each step.
    """
    heights = torch.zeros_like(draws)
    step, wibble = draws.shape[-1], float(_WIBBLE)
    while step >= 2:
        half = step // 2
        random = draws * wibble**2
        corners = heights[:, ::step, ::step]
        right, below = corners.roll(-1, 2), corners.roll(-1, 1)
        centres = (corners + right + below + below.roll(-1, 2)) / 4 + random[:, half::step, half::step]
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = (corners + right + centres + centres.roll(1, 1)) / 4 + (
            random[:, ::step, half::step]
        )
        heights[:, half::step, ::step] = (corners + below + centres + centres.roll(1, 2)) / 4 + (
            random[:, half::step, ::step]
        )
        step, wibble = half, wibble / decay
    heights -= heights.amin(dim=(1, 2), keepdim=True)
    return heights / heights.amax(dim=(1, 2), keepdim=True)
