"""Tracked streams that the distributed tests run in processes of their own."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, seed_everything

from benchmarks.quiet import quiet_trainer
from benchmarks.resume import Net as DroppingNet
from lightning_cl.callbacks import NearestMeanClassifier, Replay, StabilityGapTracker
from lightning_cl.datamodules import ClassIncremental
from tests.distributed.runs import DigitsOfSize, Net

GLOBAL_BATCH = 16
PER_CLASS = 16  # 32 samples a task: batches divide by any number of ranks, so the mean over ranks is that over samples


class Tracking(NamedTuple):
    """Make the callbacks of a run; hashable and picklable, unlike the callbacks themselves."""

    head: bool = False
    tracked: bool = True
    start: str = "next_task"
    memory: int = 40
    probe_size: int = 10
    every_n_steps: int = 1
    nmc_refresh: int = 1

    def __call__(self) -> list[Callback]:
        callbacks: list[Callback] = [Replay(self.memory, start=self.start)]  # type: ignore[arg-type]
        if self.head:
            callbacks.append(NearestMeanClassifier())
        if self.tracked:
            options = {"every_n_steps": self.every_n_steps, "nmc_refresh": self.nmc_refresh}
            callbacks.append(StabilityGapTracker(probe_size=self.probe_size, compare_heads=self.head, **options))
        return callbacks


@dataclass(frozen=True)
class Run:
    """A stream of five tasks, and what is tracked in it."""

    tracking: Tracking
    drops: bool = False  # whether the net has dropout and batch norm


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    data = DigitsOfSize(PER_CLASS, batch_size=GLOBAL_BATCH // ranks, val_fraction=0.1)
    callbacks = run.tracking()
    net: LightningModule = DroppingNet("onecycle") if run.drops else Net()
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=callbacks,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(net, datamodule=ClassIncremental(data, num_tasks=5, epochs_per_task=1))
    states = {type(callback).__name__: callback.state_dict() for callback in callbacks}
    tracker = next((callback for callback in callbacks if isinstance(callback, StabilityGapTracker)), None)
    return {
        "curve": states.pop("StabilityGapTracker", {}).get("curve"),
        "figures": None if tracker is None else tracker.figures,
        "warnings": [str(warning.message) for warning in caught],
        "run": {
            "weights": {name: value.clone() for name, value in net.state_dict().items()},
            "optimizer": trainer.optimizers[0].state_dict(),
            "callbacks": {name: states[name] for name in sorted(states)},
            "steps": trainer.global_step,
        },
    }
