"""Screened streams that the distributed tests run in processes of their own."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger

from benchmarks.quiet import quiet_trainer
from lightning_cl.callbacks import SampleScreen
from lightning_cl.datamodules import ClassIncremental
from tests.distributed.runs import DigitsOfSize, Net

GLOBAL_BATCH = 16
PER_CLASS = 16  # 32 samples a task: batches divide by any number of ranks


def run_all(ranks: int, folder: str, samples: Sequence[int | None]) -> list[dict[str, Any]]:
    """Run a stream for each number of screened samples, 0 for no screen, and return what this rank saw of each."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return [_run(ranks, Path(folder, f"{ranks}-{count}"), count) for count in samples]


def _run(ranks: int, folder: Path, samples: int | None) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    screen = None if samples == 0 else SampleScreen(samples=samples, tasks=[1, 2])
    net = Net()
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[] if screen is None else [screen],
        logger=CSVLogger(folder, "", version=""),
    )
    data = DigitsOfSize(PER_CLASS, batch_size=GLOBAL_BATCH // ranks)
    trainer.fit(net, datamodule=ClassIncremental(data, num_tasks=5, epochs_per_task=1))
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "rankings": {} if screen is None else {task: tuple(found) for task, found in screen.rankings.items()},
    }
