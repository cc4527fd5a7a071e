"""Measure what a stream costs beside a plain PyTorch loop and a plain Lightning fit on the same batches.

    python benchmarks/stream_overhead.py

Split-FashionMNIST, 5 tasks x 1 epoch, MLP 784-400-400-10, batch 128, SGD 0.05; then `resnet32` on CIFAR-100 images. One
thread, everything in one process, the sides in turn, median of 5 rounds. The plain sides get batches that are ready
(fetched, converted and normalised); the stream makes its own. Training steps alone are timed, evaluation is left out.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ArrayData, ClassIncremental, TorchvisionData
from lightning_cl.models import build_backbone

DATA = Path(__file__).parents[1].parent / "shared" / "data"
Batches = list[list[tuple[Tensor, Tensor]]]


class Stopwatch(Callback):
    """Time the training steps of each epoch, and the way from one task to the next."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.switches: list[float] = []
        self._started = self._ended = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self._ended:
            self.switches.append(time.perf_counter() - self._ended)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.perf_counter()
        self.epochs.append(self._ended - self._started)


class Net(LightningModule):
    """The least that trains a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Loader:
    """Ready batches as a loader."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Ready(LightningDataModule):
    """Hand out ready batches, an epoch a task."""

    def __init__(self, tasks: Batches) -> None:
        super().__init__()
        self.tasks = tasks

    def train_dataloader(self) -> Any:
        return Loader(self.tasks[self.trainer.current_epoch])  # type: ignore[union-attr]


def plain_loop(net: nn.Module, tasks: Batches) -> float:
    """Return the seconds of a hand-written loop."""
    net.train()
    started = time.perf_counter()
    for batches in tasks:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return time.perf_counter() - started


def fit(net: LightningModule, data: LightningDataModule, epochs: int, **flags: Any) -> Stopwatch:
    """Return the times of a fit."""
    watch = Stopwatch()
    callbacks = [watch, *flags.pop("callbacks", [])]
    trainer = quiet_trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        **flags,
    )
    trainer.fit(net, datamodule=data)
    return watch


class Collect(Callback):
    """Keep the batches that a stream trains on, as the module gets them."""

    def __init__(self) -> None:
        self.tasks: Batches = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tasks.append([])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.tasks[-1].append((batch[0].clone(), batch[1].clone()))


def compare(make_net: Callable[[], Net], make_data: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Time the three sides in turn, and return milliseconds per step and the switch to the next task."""
    collect = Collect()
    fit(make_net(), make_data(), epochs=1, callbacks=[collect])
    tasks = collect.tasks
    steps = sum(len(batches) for batches in tasks)
    seconds: dict[str, list[float]] = {"loop": [], "lightning": [], "stream": [], "switch": []}
    for _ in range(rounds):
        seconds["loop"].append(plain_loop(make_net().model, tasks))
        watch = fit(make_net(), Ready(tasks), len(tasks), reload_dataloaders_every_n_epochs=1)
        seconds["lightning"].append(sum(watch.epochs))
        watch = fit(make_net(), make_data(), 1, callbacks=[ContinualMetrics(print_table=False)])
        seconds["stream"].append(sum(watch.epochs))
        seconds["switch"].append(statistics.median(fit(make_net(), make_data(), 1, limit_train_batches=2).switches))
    times = {name: statistics.median(values) * 1000 for name, values in seconds.items()}
    return {**{name: times[name] / steps for name in ("loop", "lightning", "stream")}, "switch": times["switch"]}


def main() -> None:
    """Run both settings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    silence()
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)

    fashion = DATA / "FashionMNIST"
    cifar = sorted((DATA / "cifar100").glob("train-*.npz"))
    settings: dict[str, tuple[Callable[[], Net], Callable[[], Any]]] = {
        "MLP, Split-FashionMNIST": (
            lambda: Net(build_backbone("mlp", num_classes=10, input_shape=(1, 28, 28))),
            lambda: ClassIncremental(TorchvisionData("FashionMNIST", root=str(fashion.parent), batch_size=128), 5),
        ),
        "resnet32, CIFAR-100 images": (
            lambda: Net(build_backbone("resnet32", num_classes=100, input_shape=(3, 32, 32))),
            # one file and large classes left out: a few dozen steps of this network are measurement enough
            lambda: ClassIncremental(
                ArrayData(train=[str(cifar[0])], mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], batch_size=128),
                classes_per_task=[5, 5, 5],
            ),
        ),
    }
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, median of {rounds} rounds\n")
    print(
        "| setting | plain loop, ms/step | plain Lightning, ms/step | stream, ms/step | stream / loop |"
        " stream / Lightning | next task, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (make_net, make_data) in settings.items():
        ms = compare(make_net, make_data, rounds)
        print(
            f"| {name} | {ms['loop']:.2f} | {ms['lightning']:.2f} | {ms['stream']:.2f} |"
            f" {ms['stream'] / ms['loop']:.2f} | {ms['stream'] / ms['lightning']:.2f} | {ms['switch']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
