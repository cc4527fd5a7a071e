"""A small stream, and a callback that refuses its tasks."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.datamodules import ClassIncremental, Digits
from lightning_cl.tasks import ContinualCallback, Task, TaskClock
from lightning_cl.tasks.random_state import collect_random_state


class Net(BoringModel):
    """A net with everything that a task leaves traces in: dropout, batch norm, momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(  # type: ignore[assignment]
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Judge(ContinualCallback):
    """Refuse attempts of a task; keeps a memory of its own, as behaviours do."""

    def __init__(self, task: int, repeats: list[int] | None = None) -> None:
        self.task = task
        self.repeats = repeats
        self.memory = torch.zeros(3)
        self.heard: list[tuple[str, int, int]] = []
        self.at_start: dict[str, Any] = {}
        self.after_undo: dict[str, Any] = {}

    @property
    @override
    def wants_rollback(self) -> bool:
        return True

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._note(trainer, "start", task)
        if task.index == self.task and not self.at_start:
            self.at_start = traces(trainer, pl_module, self)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.memory += 1

    @override
    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        if task.index != self.task:
            return True
        if self.repeats is None:
            return False
        if not self.repeats:
            return True
        clock = TaskClock.of(trainer)
        assert clock is not None
        clock.repeat_task(self.repeats.pop(0))
        return False

    @override
    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._note(trainer, "rejected", task)
        self.after_undo = traces(trainer, pl_module, self)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._note(trainer, "end", task)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.clone()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.memory = state_dict["memory"].clone()

    def _note(self, trainer: Trainer, hook: str, task: Task) -> None:
        clock = TaskClock.of(trainer)
        assert clock is not None
        self.heard.append((hook, task.index, clock.progress.attempt))


def traces(trainer: Trainer, pl_module: LightningModule, judge: Judge) -> dict[str, Any]:
    return {
        "module": {name: value.clone() for name, value in pl_module.state_dict().items()},
        "memory": judge.memory.clone(),
        "random": collect_random_state(),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def fit(
    *callbacks: Any,
    reset_optimizer: bool = True,
    directory: Path | None = None,
    module: type[Net] = Net,
    **fit: Any,
) -> tuple[Trainer, Net]:
    """Train three tasks of two epochs, and return the Trainer and the module."""
    seed_everything(5, verbose=False)
    net = module()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=directory is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=list(callbacks),
    )
    data = ClassIncremental(Digits(batch_size=64), classes_per_task=[4, 3, 3], reset_optimizer=reset_optimizer)
    trainer.fit(net, datamodule=data, **fit)
    return trainer, net
