"""Streams with early exits that the distributed tests run in processes of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import ContinualMetrics, EarlyExits, Replay, TaskEarlyStopping
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.heads.exit_ensemble import Ensemble
from lightning_cl.tasks.exit_phases import Regime
from tests.distributed.replay_runs import GLOBAL_BATCH
from tests.distributed.runs import DigitsOfSize, Net


@dataclass(frozen=True)
class Run:
    """A stream of five tasks with an exit after the first layer; where it stops early, by a score of the net's."""

    regime: Regime
    net: type[LightningModule] = Net
    per_class: int = 24  # 48 samples a task: three batches of 16
    epochs: int = 2
    stops: bool = False
    ensemble: Ensemble = "none"
    exit_classifier: Literal["head", "nearest_mean"] = "head"


class WorseOnTheLastRank(Net):
    """Has a score that falls on the last rank alone."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        falls = self.trainer.global_rank == self.trainer.world_size - 1
        self.log("score", float(-self.current_epoch if falls else self.current_epoch))


class Epochs(Callback):
    """Note the weights at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each."""
    silence()
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    data = DigitsOfSize(run.per_class, batch_size=GLOBAL_BATCH // ranks)
    exits, metrics, epochs = (
        EarlyExits(["layer.1"], run.regime, threshold=0.3, ensemble=run.ensemble, exit_classifier=run.exit_classifier),
        ContinualMetrics(print_table=False),
        Epochs(),
    )
    stopping = [TaskEarlyStopping("score", mode="max", patience=1)] if run.stops else []
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        limit_val_batches=int(run.stops),
        num_sanity_val_steps=0,
        callbacks=[Replay(30), exits, metrics, epochs, *stopping],
    )
    net = run.net()
    trainer.fit(net, datamodule=ClassIncremental(data, num_tasks=5, epochs_per_task=run.epochs))
    return {
        "epochs": epochs.states,
        "heads": exits.state_dict()["heads"],
        "matrix": metrics.matrix,
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "modes": [layer.training for layer in net.modules()],
    }
