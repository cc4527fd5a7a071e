"""Measure what a training step costs with the callbacks that hold a network to its past, beside one without.

    python benchmarks/regularisers.py

`resnet32` on images of CIFAR-100's shape, batch 128, SGD with momentum, one thread. The sides take turns in one
process, a few steps each a round, all of them in the second task, where the terms are; the table has medians over the
rounds, of the process's CPU time, which other work on the machine hardly changes. EWC's look at the data of a task,
once when it ends, stands by itself.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import ElasticWeightConsolidation, LearningWithoutForgetting, LearningWithoutMemorizing
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.models import ImageClassifier
from lightning_cl.tasks import Task

BATCH, FIRST_TASK, STEPS = 128, 96, 4
LIMITS = {
    "naive": 1.0,
    "LearningWithoutForgetting": 1.45,
    "LearningWithoutMemorizing": 1.5,
    "ElasticWeightConsolidation": 1.25,
}


class Images(LightningDataModule):
    """Random images of a hundred classes: a few of the first ten, and batches enough of the others."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader over all."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(FIRST_TASK + (STEPS + 1) * BATCH, 3, 32, 32, generator=generator)
        first = torch.arange(FIRST_TASK) % 10
        others = 10 + torch.arange(len(images) - FIRST_TASK) % 90
        return DataLoader(TensorDataset(images, torch.cat([first, others])), batch_size=BATCH, shuffle=True)


class Stopwatch(Callback):
    """Time the first steps of the second task, and end the fit after them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.process_time()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        seconds = time.process_time() - self._started
        if trainer.datamodule.current_task.index == 1:  # type: ignore[attr-defined]
            self.seconds.append(seconds)
            trainer.should_stop = len(self.seconds) == STEPS


class TimedConsolidation(ElasticWeightConsolidation):
    """Keep how long the look at a task's data took, a sample."""

    look = 0.0

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        started = time.process_time()
        super().on_task_end(trainer, pl_module, task)
        self.look = (time.process_time() - started) / FIRST_TASK


SIDES: dict[str, Callable[[], list[Callback]]] = {
    "naive": list,
    "LearningWithoutForgetting": lambda: [LearningWithoutForgetting()],
    "LearningWithoutMemorizing": lambda: [LearningWithoutMemorizing()],
    "ElasticWeightConsolidation": lambda: [TimedConsolidation()],
}


def steps_of(callbacks: list[Callback]) -> list[float]:
    """Return the seconds of steps of the second task, without the first one."""
    seed_everything(0, verbose=False)
    watch = Stopwatch()
    model = ImageClassifier(
        "resnet32", num_classes=100, optimizer=lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    )
    # of two epochs a task the second one's first is left unfinished, so that no task ends for it
    trainer = quiet_trainer(max_epochs=2, callbacks=[*callbacks, watch])
    trainer.fit(model, datamodule=ClassIncremental(Images(), classes_per_task=[10, 90]))
    return watch.seconds[1:]


def main() -> None:
    """Time the sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    silence()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    looks: list[float] = []
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread, median of {rounds} rounds\n",
        flush=True,
    )
    for _ in range(rounds):
        for name, make in SIDES.items():
            callbacks = make()
            seconds[name].append(statistics.median(steps_of(callbacks)))
            looks += [callback.look for callback in callbacks if isinstance(callback, TimedConsolidation)]
    print("| | ms/step | beside naive | at most |")
    print("|---|---|---|---|")
    over = False
    for name, times in seconds.items():
        # round by round: what else the machine does then falls on all sides
        ratio = statistics.median(own / naive for own, naive in zip(times, seconds["naive"], strict=True))
        print(f"| {name} | {statistics.median(times) * 1000:.0f} | {ratio:.2f} | {LIMITS[name]:.2f} |")
        over |= ratio > LIMITS[name]
    print(f"\nEWC's look at a task's data: {statistics.median(looks) * 1000:.1f} ms a sample.")
    if over:
        raise SystemExit("A step costs more than it may.")


if __name__ == "__main__":
    main()
