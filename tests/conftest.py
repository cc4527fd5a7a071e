"""What all tests share."""

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _use_one_thread() -> None:
    """Small tensors gain nothing from more threads, and tests that share a machine lose by them."""
    torch.set_num_threads(1)


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in an empty folder, as a user would who has none of our settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)
