"""Streams that the distributed tests run in processes of their own; module-level, so that they can be pickled."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, Digits
from lightning_cl.tasks import ContinualCallback, Task


class Net(BoringModel):
    """A small net without dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class DigitsOfSize(Digits):
    """The digits, each class cut to one size, so that streams divide (or not) by the global batch.

    Each sample carries its own number as a third entry.
    """

    def __init__(self, per_class: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.per_class = per_class

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        samples = [loader.dataset[index] for index in range(len(loader.dataset))]  # type: ignore[arg-type]
        labels = torch.stack([label for _, label in samples])
        kept = torch.cat([(labels == label).nonzero().squeeze(1)[: self.per_class] for label in range(10)])
        images = torch.stack([image for image, _ in samples])[kept]
        numbered = TensorDataset(images, labels[kept], torch.arange(len(kept)))
        return DataLoader(numbered, batch_size=loader.batch_size, shuffle=True)


class Seen(Callback):
    """Note the samples that this rank trains on in every step."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.ids.append(batch[2].tolist())


class RefuseTask(ContinualCallback):
    """Refuse a task on one rank."""

    def __init__(self, task: int, rank: int) -> None:
        self.task, self.rank = task, rank
        self.before: dict[str, Tensor] = {}
        self.undone = False

    @property
    def wants_rollback(self) -> bool:
        return True

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if task.index == self.task:
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        return not (task.index == self.task and trainer.global_rank == self.rank)

    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        now = pl_module.state_dict()
        self.undone = all(torch.equal(now[name], value) for name, value in self.before.items())


def run_stream(
    ranks: int, global_batch: int, per_class: int, strategy: str = "ddp", refuse: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Run a stream of five tasks and return what one rank saw of it."""
    silence()
    seed_everything(1, verbose=False)
    data = ClassIncremental(DigitsOfSize(per_class, batch_size=global_batch // ranks), num_tasks=5, epochs_per_task=2)
    seen, metrics, net = Seen(), ContinualMetrics(print_table=False), Net()
    refusal = [] if refuse is None else [RefuseTask(*refuse)]
    trainer = quiet_trainer(
        devices=ranks,
        strategy=strategy if ranks > 1 else "auto",
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        callbacks=[seen, metrics, *refusal],
    )
    trainer.fit(net, datamodule=data)
    return {
        "ids": seen.ids,
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "matrix": metrics.matrix,
        "undone": [callback.undone for callback in refusal],
    }
