"""Fits that write and say nothing beside what a benchmark prints."""

import logging
import warnings
from typing import Any

from lightning.pytorch import Trainer


def silence() -> None:
    """Let neither Lightning nor warnings say anything in this process."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_trainer(**settings: Any) -> Trainer:
    """Return a Trainer on the CPU that trains, and neither validates nor writes but where the settings say so."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **settings})
