"""Streams that a poison detector watches, with every behaviour of the suite that goes with the others."""

import copy
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.quiet import quiet_trainer, silence
from benchmarks.resume import Net
from lightning_cl.callbacks import (
    ContinualMetrics,
    DarkExperienceReplay,
    EarlyExits,
    ElasticWeightConsolidation,
    GaussianClassifier,
    LearningWithoutForgetting,
    NearestMeanClassifier,
    PoisonDetector,
    Replay,
    SampleScreen,
    StabilityGapTracker,
    TaskEarlyStopping,
)
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback, Task, TaskClock
from tests.distributed.replay_runs import GLOBAL_BATCH
from tests.distributed.runs import DigitsOfSize

BEHAVIOURS: tuple[Any, ...] = (
    NearestMeanClassifier,
    partial(EarlyExits, ["*.3"], regime="joint", print_table=False),
    partial(TaskEarlyStopping, "val_loss", patience=1, strict=False),
    partial(StabilityGapTracker, every_n_steps=2, probe_size=8),
    partial(ContinualMetrics, print_table=False),
)
# Whatever the suite has that keeps a state over tasks; a new behaviour is to be added to one of these. What holds the
# network to its past refuses early exits.
SETS: dict[str, tuple[Any, ...]] = {
    "replay": (partial(Replay, 30), *BEHAVIOURS),
    "der": (partial(DarkExperienceReplay, 30), *BEHAVIOURS),
    "held": (
        LearningWithoutForgetting,
        partial(ElasticWeightConsolidation, weight=1.0),
        SampleScreen,
        GaussianClassifier,
    ),
}


def everything(name: str = "replay") -> list[Callback]:
    """Make one of each behaviour of a set."""
    return [make() for make in SETS[name]]


@dataclass(frozen=True)
class Watched:
    """Make the callbacks of a run: everything with a detector; hashable and picklable."""

    behaviours: str | None = "replay"
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> list[Callback]:
        rest = [] if self.behaviours is None else everything(self.behaviours)
        # the runs that are resumed have a `ContinualMetrics` of their own
        return [PoisonDetector(**dict(self.options)), *(c for c in rest if not isinstance(c, ContinualMetrics))]


def watched(behaviours: str | None = "replay", **options: Any) -> Watched:
    return Watched(behaviours, tuple(options.items()))


class AfterUndoing(ContinualCallback):
    """Photographs the run right after a task was undone, before any other callback hears of it."""

    def __init__(self) -> None:
        self.photographs: dict[int, dict[str, Any]] = {}

    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.photographs[task.index] = photograph(trainer, pl_module)


class ZAfterAll(ContinualCallback):
    """Photographs the run after all others have heard of a task's end."""

    observer = True

    def __init__(self, detector: PoisonDetector) -> None:
        self.detector = detector
        self.photographs: dict[int, dict[str, Any]] = {}
        self.means: dict[str, Any] | None = None  # of the network as it was at first

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.means = self.means or self.detector.state_dict()["before"]

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.photographs[task.index] = photograph(trainer, pl_module)


def photograph(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Copy the states of module, optimizers and all callbacks but those that are not undone."""
    kept = (TaskClock, ModelCheckpoint, PoisonDetector, AfterUndoing, ZAfterAll)
    callbacks = [c for c in trainer.callbacks if not isinstance(c, kept)]  # type: ignore[attr-defined]
    return copy.deepcopy(
        {
            "module": {name: value.clone() for name, value in pl_module.state_dict().items()},
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "callbacks": {c.state_key: c.state_dict() for c in callbacks},
        }
    )


class VetoOfOneRank(Net):
    """Refuses the third task on the second rank only."""

    def __init__(self, schedule: str) -> None:
        super().__init__(schedule)
        self.refused: list[int] = []

    def accept_task(self, task: Task) -> bool:
        return not (task.index == 2 and self.global_rank == 1)

    def on_task_rejected(self, task: Task) -> None:
        self.refused.append(task.index)


@dataclass(frozen=True)
class Run:
    """A stream of five tasks with a detector."""

    options: tuple[tuple[str, Any], ...]
    behaviours: str | None = None
    net: type[Net] = Net
    per_class: int = 24


def run_of(behaviours: str | None = None, net: type[Net] = Net, **options: Any) -> Run:
    return Run(tuple(options.items()), behaviours, net)


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each."""
    silence()
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    detector = PoisonDetector(**dict(run.options))
    undone, ended = AfterUndoing(), ZAfterAll(detector)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        callbacks=[*([] if run.behaviours is None else everything(run.behaviours)), detector, undone, ended],
    )
    net = run.net("cosine")
    data = DigitsOfSize(run.per_class, batch_size=GLOBAL_BATCH // ranks)
    with redirect_stdout(StringIO()) as console:
        trainer.fit(net, datamodule=ClassIncremental(data, num_tasks=5, epochs_per_task=1))
    return {
        "record": detector.record,
        "threshold": detector.current_threshold,
        "means": ended.means,
        "undone": undone.photographs,
        "ended": ended.photographs,
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "refused": getattr(net, "refused", []),
        "hooks": sum(len(layer._forward_hooks) for layer in net.modules()),
        "said": [line for line in console.getvalue().splitlines() if line.startswith("PoisonDetector")],
        "epochs": trainer.current_epoch,
    }
