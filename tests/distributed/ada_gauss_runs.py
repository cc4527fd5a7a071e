"""Streams with AdaGauss that the distributed tests run in processes of their own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import nn

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import AdaGauss, AntiCollapse, ProjectedDistillation
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks.adapter_training import AdapterTraining
from tests.distributed.regulariser_runs import Terms
from tests.distributed.runs import DigitsOfSize, Net, RefuseTask

GLOBAL_BATCH = 16


class Narrow(Net):
    """Has five features before its classification layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 5), nn.Linear(5, 10)]
        self.layer = nn.Sequential(*layers)  # type: ignore[assignment]


class NarrowNoisy(Narrow):
    """With batch norm, whose statistics differ between ranks, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer[2] = nn.Sequential(nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2))  # type: ignore[operator]


class Still(Narrow):
    """Does not learn, so it is the same on any number of ranks."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Run(NamedTuple):
    """A stream of five tasks of two digits."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    net: type[LightningModule] = Narrow
    refuse: tuple[int, int] | None = None
    per_class: int = 24  # 48 samples a task: batches divide by the number of ranks

    def callback(self) -> Any:
        """Make the callback; a run is picklable, unlike it."""
        options = dict(self.options)
        if self.kind == "ada_gauss":
            quick = {"expansion": 4, "adapter_epochs": 4, "samples": 50, "warmup": 0.0, "flips": True}
            return AdaGauss(**{**quick, **options})
        return {"spread": AntiCollapse, "projected": ProjectedDistillation}[self.kind](**options)


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each, and then of an adapter alone."""
    silence()
    return [*(_run(ranks, run) for run in runs), _adapter(ranks)]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    callback, terms, refusal = run.callback(), Terms(), [] if run.refuse is None else [RefuseTask(*run.refuse)]
    batch = GLOBAL_BATCH // ranks
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        callbacks=[callback, terms, *refusal],
    )
    net = run.net()
    trainer.fit(net, datamodule=ClassIncremental(DigitsOfSize(run.per_class, batch_size=batch), num_tasks=5))
    return {
        "state": callback.state_dict(),
        "terms": terms.values,
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
    }


class Quick(NamedTuple):
    """Make an AdaGauss for a network of any width; hashable and picklable, unlike the callback."""

    def __call__(self) -> list[Callback]:
        options: dict[str, Any] = {"anti_collapse": 0.0, "distillation": 1.0, "expansion": 2}
        return [AdaGauss(**options, adapter_epochs=3, samples=100, warmup=0.0)]


class TrainsAdapter(Callback):
    """Train an adapter when a fit begins."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        generator = torch.Generator().manual_seed(0)
        before = torch.randn(101, 4, generator=generator)
        training = AdapterTraining(epochs=5, batch_size=16, expansion=4)
        with torch.no_grad():
            adapter = training.run(trainer, before, before.flip(1) + 1, 0, 1)
        self.weights = {name: value.clone() for name, value in adapter.state_dict().items()}


def _adapter(ranks: int) -> dict[str, Any]:
    trains = TrainsAdapter()
    strategy = "ddp" if ranks > 1 else "auto"
    trainer = quiet_trainer(devices=ranks, strategy=strategy, max_epochs=1, callbacks=[trains])
    trainer.fit(Narrow(), datamodule=DigitsOfSize(4, batch_size=16))
    return {"weights": trains.weights}
