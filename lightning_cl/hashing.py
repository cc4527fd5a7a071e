"""Hashes of integers that are the same on every machine, in every process and for one value or a million."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = (1 << 64) - 1
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# numpy needs microseconds to turn a Python integer into one of these, several times the work on ten values
_INCREMENT_64, _FIRST_64, _SECOND_64 = np.uint64(_INCREMENT), np.uint64(_FIRST), np.uint64(_SECOND)
_1, _27, _30, _31 = np.uint64(1), np.uint64(27), np.uint64(30), np.uint64(31)


def mix(*parts: int) -> int:
    """Hash integers to one 63-bit seed (splitmix64), the same on every machine, process and Python version."""
    return _absorb(parts) >> 1


def mix_each(parts: tuple[int, ...], values: Tensor) -> Tensor:
    """Hash each of many values behind the same leading parts: ``mix_each((a, b), values)[i] == mix(a, b, values[i])``.

    Args:
        parts: What comes before the value; may be empty.
        values: Integers of any shape.

    Returns:
        Non-negative 63-bit hashes, int64, on the CPU, of the shape of ``values``.
    """
    # one dimension at least: numpy makes scalars of arrays without any, and these warn where arrays wrap around
    flat = np.atleast_1d(values.to("cpu", torch.int64).numpy()).view(np.uint64)
    state: NDArray[np.uint64] = flat ^ np.uint64(_absorb(parts))
    state += _INCREMENT_64
    state ^= state >> _30
    state *= _FIRST_64
    state ^= state >> _27
    state *= _SECOND_64
    state ^= state >> _31
    state >>= _1
    return torch.from_numpy(state.view(np.int64).reshape(values.shape))


def _absorb(parts: tuple[int, ...]) -> int:
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + _INCREMENT & _MASK
        state = (state ^ (state >> 30)) * _FIRST & _MASK
        state = (state ^ (state >> 27)) * _SECOND & _MASK
        state ^= state >> 31
    return state
