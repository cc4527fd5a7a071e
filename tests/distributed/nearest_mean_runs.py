"""Streams with a nearest-mean head that the distributed tests run in processes of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import ContinualMetrics, NearestMeanClassifier, Replay
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback, Task
from tests.distributed.replay_runs import GLOBAL_BATCH
from tests.distributed.runs import DigitsOfSize, Net
from tests.modules import digits


class WithHead(NamedTuple):
    """Make the callbacks of a run; hashable and picklable, unlike the callbacks themselves."""

    options: tuple[tuple[str, Any], ...] = ()
    size: int | None = 30
    storage: str = "reference"

    def __call__(self) -> list[Callback]:
        replay = [] if self.size is None else [Replay(self.size, storage=self.storage)]  # type: ignore[arg-type]
        return [NearestMeanClassifier(**dict(self.options)), *replay]


def with_head(size: int | None = 30, storage: str = "reference", **options: Any) -> WithHead:
    return WithHead(tuple(options.items()), size, storage)


class NoisyNormedNet(Net):
    """Trains with dropout, and with batch norm that has other statistics on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)
        )


class FrozenNet(Net):
    """Only its last layer is trained, which prototypes do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer[1].requires_grad_(False)


class HeadNotes(ContinualCallback):
    """Note the head after each task, and what it predicts of all digits."""

    observer = True

    def __init__(self, nearest: NearestMeanClassifier, images: Tensor) -> None:
        self.nearest, self.images = nearest, images
        self.states: list[dict[str, Any]] = []
        self.predictions: list[list[int]] = []

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.states.append(self.nearest.state_dict()["classifier"])
        pl_module.eval()
        with torch.no_grad():
            self.predictions.append(pl_module(self.images).argmax(1).tolist())
        pl_module.train()


@dataclass(frozen=True)
class Run:
    """A stream of five tasks with a head."""

    callbacks: WithHead
    net: type[LightningModule] = FrozenNet
    per_class: int = 19  # 38 samples a task: two batches of 16 and one of 6


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each."""
    silence()
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    callbacks = run.callbacks()
    nearest = callbacks[0]
    assert isinstance(nearest, NearestMeanClassifier)
    data = DigitsOfSize(run.per_class, batch_size=GLOBAL_BATCH // ranks)
    notes, metrics = HeadNotes(nearest, digits(0, 100, 10)[0].view(-1, 1, 8, 8)), ContinualMetrics(print_table=False)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[*callbacks, notes, metrics],
    )
    net = run.net()
    trainer.fit(net, datamodule=ClassIncremental(data, num_tasks=5, epochs_per_task=1))
    return {
        "heads": notes.states,
        "predictions": notes.predictions,
        "matrix": metrics.matrix,
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "hooks": sum(len(layer._forward_hooks) for layer in net.modules()),
    }
