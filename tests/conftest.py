"""What all tests share."""

import sys
from pathlib import Path

import pytest
import torch

from lightning_cl.tasks.random_state import seed_generators


@pytest.fixture(autouse=True, scope="session")
def _use_one_thread() -> None:
    """Small tensors gain nothing from more threads, and tests that share a machine lose by them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test begin with the same random numbers, whichever tests ran before it in its process."""
    seed_generators(0)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        # set, so that what `seed_everything` writes in the test is taken away after it
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in an empty folder, as a user would who has none of our settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)
