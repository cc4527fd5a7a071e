"""Streams with a Gaussian head that the distributed tests run in processes of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import ContinualMetrics, GaussianClassifier
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback, Task
from tests.distributed.nearest_mean_runs import FrozenNet
from tests.distributed.replay_runs import GLOBAL_BATCH
from tests.distributed.runs import DigitsOfSize
from tests.modules import digits


class WithGaussian(NamedTuple):
    """Make the callbacks of a run; hashable and picklable, unlike the callbacks themselves."""

    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> list[Callback]:
        return [GaussianClassifier(**dict(self.options))]


class HeadNotes(ContinualCallback):
    """Note Gaussians and head after each task, and the scores of all digits."""

    observer = True

    def __init__(self, gaussian: GaussianClassifier, images: Tensor) -> None:
        self.gaussian, self.images = gaussian, images
        self.states: list[dict[str, Any]] = []
        self.scores: list[Tensor] = []

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.states.append(self.gaussian.state_dict())
        pl_module.eval()
        with torch.no_grad():
            self.scores.append(pl_module(self.images.to(pl_module.dtype)))
        pl_module.train()


@dataclass(frozen=True)
class Run:
    """A stream of five tasks with a head."""

    options: tuple[tuple[str, Any], ...] = ()
    net: type[LightningModule] = FrozenNet
    per_class: int = 19  # 38 samples a task: two batches of 16 and one of 6
    precision: str = "64-true"  # where batches of any size give the same features


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each."""
    silence()
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    gaussian = GaussianClassifier(**dict(run.options))
    data = DigitsOfSize(run.per_class, batch_size=GLOBAL_BATCH // ranks)
    notes, metrics = HeadNotes(gaussian, digits(0, 100, 10)[0].view(-1, 1, 8, 8)), ContinualMetrics(print_table=False)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision=run.precision,
        callbacks=[gaussian, notes, metrics],
    )
    net = run.net()
    trainer.fit(net, datamodule=ClassIncremental(data, num_tasks=5, epochs_per_task=1))
    return {
        "states": notes.states,
        "scores": notes.scores,
        "matrix": metrics.matrix,
        "hooks": sum(len(layer._forward_hooks) for layer in net.modules()),
    }
