"""Random number generators: read, put back and fork."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed the CPU generators that a dataset's transforms may draw from."""
    # `torch.manual_seed` would also queue a call for CUDA, one for every sample, where CUDA is not initialised
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def seed_torch_generator(seed: int) -> None:
    """Seed PyTorch's CPU generator alone, at a seventh of the cost of all three."""
    torch.default_generator.manual_seed(seed)


def python_and_numpy_states() -> tuple[Any, ...]:
    """Return something that compares equal as long as nothing is drawn from Python's and NumPy's generators."""
    _, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(keys).tobytes(), rest


def collect_random_state() -> dict[str, Any]:
    """Return the state of every global generator as tensors and plain Python, fit for ``weights_only`` loading."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `collect_random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def forked_generators() -> Iterator[None]:
    """Leave all generators as they were found, as Lightning's ``isolate_rng`` does.

    That one asks the driver for CUDA devices each time, which takes as long as a small network's forward, and puts
    nothing back after an exception.
    """
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        with forked_cpu_generators():
            yield
    finally:
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


@contextmanager
def forked_cpu_generators() -> Iterator[None]:
    """Leave the CPU generators as they were found; cheaper than a full fork, for use around every batch."""
    torch_state = torch.default_generator.get_state()
    numpy_state = np.random.get_state(legacy=True)
    python_state = random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
