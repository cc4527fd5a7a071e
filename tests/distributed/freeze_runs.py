"""Streams with layers that stand still, which the distributed tests run in processes of their own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import Freeze
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback, Task
from tests.distributed.nearest_mean_runs import NoisyNormedNet
from tests.distributed.runs import DigitsOfSize, Net

GLOBAL_BATCH = 16


class DecayingNet(Net):
    """Its optimizer moves whatever has a gradient, be it zero."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


class DecayingNormedNet(NoisyNormedNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


class Run(NamedTuple):
    """A stream of five tasks of two digits; hashable and picklable, unlike the callback itself."""

    layers: tuple[str, ...] | None = None
    after_task: int | None = 0
    net: type[LightningModule] = DecayingNet


class States(ContinualCallback):
    """Keep what the module holds at the end of each task."""

    observer = True

    def __init__(self) -> None:
        self.of_tasks: list[dict[str, Tensor]] = []

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.of_tasks.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def run_all(ranks: int, runs: Sequence[Run]) -> list[list[dict[str, Tensor]]]:
    """Run streams one after another and return what this rank held at the end of each task."""
    silence()
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> list[dict[str, Tensor]]:
    seed_everything(1, verbose=False)
    states = States()
    layers = None if run.layers is None else list(run.layers)
    data = ClassIncremental(DigitsOfSize(24, batch_size=GLOBAL_BATCH // ranks), num_tasks=5)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        callbacks=[Freeze(layers, run.after_task), states],
    )
    trainer.fit(run.net(), datamodule=data)
    return states.of_tasks
