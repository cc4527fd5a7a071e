"""Random numbers that belong to samples."""

import math

import torch
from torch import Tensor

from lightning_cl.hashing import mix_each


class Draws:
    """Uniform random numbers for each sample of a batch, hashed from its id: no generator, no state of anybody else.

    Args:
        ids: ``(batch,)``.
        name: What the numbers are for; another name gives other numbers.
        seed: Another seed gives other numbers.

    Example::

        >>> one, both = Draws(torch.tensor([7]), "fog", 0), Draws(torch.tensor([3, 7]), "fog", 0)
        >>> torch.equal(one.uniform(2, 5)[0], both.uniform(2, 5)[1])
        True
    """

    def __init__(self, ids: Tensor, name: str, seed: int) -> None:
        self._keys = mix_each((seed, *name.encode()), ids).unsqueeze(1)
        self._used = 0

    def uniform(self, *shape: int) -> Tensor:
        """Return the next numbers of every sample, ``(batch, *shape)``, float64, between 0 and 1 without either."""
        count = math.prod(shape)
        places = torch.arange(self._used, self._used + count)
        self._used += count
        # 52 bits and a half: one bit more, and the largest would be rounded to 1
        fractions = mix_each((), self._keys + places).bitwise_right_shift_(11).double().add_(0.5)
        return fractions.mul_(2.0**-52).view(-1, *shape)
