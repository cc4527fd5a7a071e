"""Streams held to their past that the distributed tests run in processes of their own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from benchmarks.quiet import quiet_trainer, silence
from benchmarks.resume import Net as ScheduledNet
from lightning_cl.callbacks import ElasticWeightConsolidation, LearningWithoutForgetting, LearningWithoutMemorizing
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks.regulariser import Regulariser
from tests.distributed.runs import DigitsOfSize, Net, RefuseTask

GLOBAL_BATCH = 16


class StillNet(Net):
    """Does not learn, so it is the same on any number of ranks."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class ConvolvedNet(Net):
    """A small net that looks at images."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        parts = [nn.Conv2d(1, 6, 3, padding=1), *layers, nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()]
        self.layer = nn.Sequential(*parts, nn.Linear(96, 10))  # type: ignore[assignment]


class NormedConvolvedNet(ConvolvedNet):
    """Trains with batch norm that has other statistics on each rank, and with dropout."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.3), nn.BatchNorm2d(6))


class ScheduledConvolvedNet(ScheduledNet):
    """The net of the runs that are killed, with maps to look at before its other layers."""

    def __init__(self, schedule: str) -> None:
        super().__init__(schedule)
        maps = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer = nn.Sequential(*maps, nn.Flatten(), nn.Linear(64, 64), *self.layer[1:])


class Held(NamedTuple):
    """Make the callbacks of a run; hashable and picklable, unlike the callbacks themselves."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> list[Callback]:
        kinds = {"lwf": LearningWithoutForgetting, "ewc": ElasticWeightConsolidation, "lwm": LearningWithoutMemorizing}
        return [kinds[self.name](**dict(self.options))]


def held(name: str, **options: Any) -> Held:
    return Held(name, tuple(options.items()))


class Run(NamedTuple):
    """A stream of five tasks of two digits."""

    callbacks: Held
    net: type[LightningModule] = Net
    refuse: tuple[int, int] | None = None
    per_class: int = 24  # 48 samples a task: batches divide by the number of ranks


class Terms(Callback):
    """Note the terms of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        own = [value for name, value in trainer.callback_metrics.items() if name.startswith("loss/")]
        self.values.append(float(own[0]) if own else 0.0)


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each."""
    silence()
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    [callback] = run.callbacks()
    terms, refusal = Terms(), [] if run.refuse is None else [RefuseTask(*run.refuse)]
    data = ClassIncremental(DigitsOfSize(run.per_class, batch_size=GLOBAL_BATCH // ranks), num_tasks=5)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        callbacks=[callback, terms, *refusal],
    )
    net = run.net()
    trainer.fit(net, datamodule=data)
    assert isinstance(callback, Regulariser)
    return {
        "state": callback.state_dict(),
        "terms": terms.values,
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "undone": [callback.undone for callback in refusal],
    }
