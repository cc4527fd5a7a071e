"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _use_one_thread() -> None:
    """Small tensors gain nothing from more threads, and tests that share a machine lose by them."""
    torch.set_num_threads(1)
