"""Noise that is drawn for every value of an image on its own."""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_cl.corruptions.draws import Draws
from lightning_cl.corruptions.pixels import to_bytes, to_unit

_NORMAL = (0.04, 0.06, 0.08, 0.09, 0.10)
_PHOTONS = (500, 250, 100, 75, 50)
_SHARE = (0.01, 0.02, 0.03, 0.05, 0.07)


def gaussian_noise(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add normal noise."""
    noise = torch.special.ndtri(draws.uniform(*images.shape[1:]))
    return to_bytes(to_unit(images) + noise * _NORMAL[severity - 1])


def shot_noise(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Count photons: a Poisson number, with as many for white on average as the severity says."""
    white = _PHOTONS[severity - 1]
    # The levels stand two apart: between them is room for their distributions, so that one search serves all.
    found = torch.searchsorted(_photon_counts(white), 2.0 * images + draws.uniform(*images.shape[1:]))
    photons = found - images.long() * white
    return to_bytes(photons.double() / white)


def impulse_noise(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Turn a share of the values black or white (salt and pepper), each half of the time."""
    share, uniform = _SHARE[severity - 1], draws.uniform(*images.shape[1:])
    return images.masked_fill(uniform < share / 2, 0).masked_fill(uniform > 1 - share / 2, 255)


@lru_cache
def _photon_counts(white: int) -> Tensor:
    """Return, for each of 256 levels, twice the level and the probabilities of at most 0, 1, ... photons, in a row.

    From ``white`` photons on a value is white however many there are, so that the distributions end there.
    """
    levels = torch.arange(256, dtype=torch.float64).unsqueeze(1)
    at_most = torch.special.gammaincc(torch.arange(1, white + 1, dtype=torch.float64), levels / 255 * white)
    flat: Tensor = (2 * levels + at_most).flatten()
    return flat
