"""Streams with replay that the distributed tests run in processes of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import DarkExperienceReplay, Replay
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback, Task
from lightning_cl.tasks.replay import ReplayCallback
from tests.distributed.runs import DigitsOfSize, Net

GLOBAL_BATCH = 16


class Replaying(NamedTuple):
    """Make the callback that replays; hashable and picklable, unlike the callback itself."""

    kind: type[ReplayCallback]
    options: tuple[tuple[str, Any], ...]

    def __call__(self) -> list[Callback]:
        return [self.kind(**dict(self.options))]


def replay(**options: Any) -> Replaying:
    return Replaying(Replay, tuple(options.items()))


def dark_replay(**options: Any) -> Replaying:
    return Replaying(DarkExperienceReplay, tuple(options.items()))


class ExactNet(Net):
    """A trained head on a frozen backbone whose features are whole numbers.

    Sums of whole numbers are not rounded, so the features have the same bits in batches of any size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(64, 32, bias=False).requires_grad_(False)
        self.backbone.weight.copy_(torch.randint(-3, 4, (32, 64)))
        self.layer = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.backbone((images.flatten(1) > 0).float()).relu())
        return logits


class NetOfItsRank(Net):
    """Augments and drops out on each rank in a way of its own, and does not stop when it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = torch.Generator()

    def on_fit_start(self) -> None:
        self.chance.manual_seed(100 + self.global_rank)

    def forward(self, images: Tensor) -> Tensor:
        noisy = images + 0.5 * torch.randn(images.shape, generator=self.chance)
        dropped = noisy * (torch.rand(images.shape, generator=self.chance) > 0.3)
        logits: Tensor = self.layer(dropped)
        return logits


class MemoryNotes(ContinualCallback):
    """Note what is replayed in each step on this rank, and the memory after each step and each task."""

    observer = True

    def __init__(self, replay: ReplayCallback) -> None:
        self.replay = replay
        self.drawn: list[list[tuple[int, int]]] = []
        self.has_rows_as_drawn = True
        self.lengths: list[int] = []  # before the first step, then after each
        self.memories: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        replayed = data.training_draw.replayed
        pairs = [] if replayed is None else [(task, index) for task, ids in replayed.samples for index in ids]
        self.drawn.append(pairs)
        numbers = [int(data.task_data(task, "train").indices[index]) for task, index in pairs]
        self.has_rows_as_drawn &= batch[2][data.replay_rows].tolist() == numbers

        if not self.lengths:
            self._note_length()

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._note_length()

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        assert self.replay.memory is not None
        self.lengths[-1] = len(self.replay.memory)
        self.memories.append(self.replay.memory.state_dict())

    def _note_length(self) -> None:
        assert self.replay.memory is not None
        self.lengths.append(len(self.replay.memory))


@dataclass(frozen=True)
class Run:
    """A stream of five tasks, and what is replayed in it."""

    replaying: Replaying
    net: type[LightningModule] = Net
    per_class: int = 19  # 38 samples a task: two batches of 16 and one of 6
    epochs: int = 1
    workers: int = 0


def run_all(ranks: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Run streams one after another and return what this rank saw of each."""
    silence()
    return [_run(ranks, run) for run in runs]


def _run(ranks: int, run: Run) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    digits = DigitsOfSize(run.per_class, batch_size=GLOBAL_BATCH // ranks, num_workers=run.workers)
    [callback] = run.replaying()
    assert isinstance(callback, ReplayCallback)
    notes = MemoryNotes(callback)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[callback, notes],
    )
    trainer.fit(run.net(), datamodule=ClassIncremental(digits, num_tasks=5, epochs_per_task=run.epochs))
    return {
        "drawn": notes.drawn,
        "has_rows_as_drawn": notes.has_rows_as_drawn,
        "lengths": notes.lengths,
        "memories": notes.memories,
    }
