"""Kill a stream with SIGKILL after a random step, resume it, and compare it bit for bit with one that ran through.

    python benchmarks/resume.py --kills 30

Five tasks of three epochs on the handwritten digits, a checkpoint every 7 steps and at every epoch's end. The kills go
round dropout with a cosine and with a OneCycle schedule, no and two loader workers, and one and two processes (DDP).
"""

import argparse
import os
import random
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from benchmarks.processes import KILLED, run_ranks
from benchmarks.quiet import silence
from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, Digits

EPOCHS = 3
TASKS = 5


class Net(BoringModel):
    """A small net with dropout and batch norm, and a schedule over its horizon."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.schedule = schedule
        self.layer = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.schedule == "onecycle":
            scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        else:
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@dataclass(frozen=True)
class Setting:
    """What is run."""

    schedule: Literal["cosine", "onecycle"] = "cosine"
    workers: int = 0
    ranks: int = 1
    accumulate: int = 1
    validate_every: float = 1.0
    epochs: int = EPOCHS
    callbacks: Callable[[], Sequence[Callback]] = tuple
    net: Callable[[str], Net] = Net
    seeded_once: bool = False  # only the run from the start gets its stream's seed from `seed_everything`


@dataclass(frozen=True)
class Kill:
    """When the process is killed: in the first of these hooks after a number of batches."""

    batches: int
    hook: Literal["on_train_batch_end", "on_validation_start", "on_train_epoch_end"] = "on_train_batch_end"


class Killer(Callback):
    """End the process as a power cut would."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill = kill
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.batches += 1
        self._reach(trainer, "on_train_batch_end")

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        self._reach(trainer, "on_validation_start")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self._reach(trainer, "on_train_epoch_end")

    def _reach(self, trainer: Trainer, hook: str) -> None:
        if self.kill is not None and hook == self.kill.hook and self.batches >= self.kill.batches:
            trainer.strategy.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def run_stream(setting: Setting, directory: str, kill: Kill | None, resume_from: str | None) -> dict[str, Any]:
    """Run the stream, or the rest of it, and return its end."""
    silence()
    seed_everything(7 if resume_from is None else 99, verbose=False)
    if resume_from is not None or not setting.seeded_once:
        os.environ.pop("PL_GLOBAL_SEED")  # the order of samples must come from the checkpoint
    batch_size = 12 // setting.ranks
    # with this split no short last batch leaves a rank with one sample, of which batch norm could make nothing
    digits = Digits(batch_size=batch_size, num_workers=setting.workers, val_fraction=0.11)
    data = ClassIncremental(digits, num_tasks=TASKS)
    metrics, more = ContinualMetrics(print_table=False), setting.callbacks()
    checkpoints = [
        ModelCheckpoint(directory, "step-{step}", every_n_train_steps=7, save_top_k=-1),
        ModelCheckpoint(directory, "epoch-{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1),
    ]
    trainer = Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        devices=setting.ranks,
        strategy="ddp" if setting.ranks > 1 else "auto",
        accumulate_grad_batches=setting.accumulate,
        val_check_interval=setting.validate_every,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[metrics, *more, Killer(kill), *checkpoints],
    )
    net = setting.net(setting.schedule)
    trainer.fit(net, datamodule=data, ckpt_path=resume_from)
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "matrix": metrics.matrix,
        "steps": trainer.global_step,
        "task": data.current_task.index,
        "callbacks": [callback.state_dict() for callback in more],
    }


def kill_and_resume(setting: Setting, kill: Kill) -> tuple[dict[str, Any], str]:
    """Return the end of a stream that was killed and resumed, and the checkpoint it was resumed from."""
    with tempfile.TemporaryDirectory() as directory:
        killed = run_ranks(run_stream, setting.ranks, setting, directory, kill, None)
        if killed != [KILLED] * setting.ranks:
            raise RuntimeError(f"The run was to be killed ({kill}), and ended.")
        last = max(Path(directory).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        return run_ranks(run_stream, setting.ranks, setting, directory, None, str(last))[0], last.name


def uninterrupted(setting: Setting) -> dict[str, Any]:
    """Return the end of a stream that ran through."""
    with tempfile.TemporaryDirectory() as directory:
        ends: list[dict[str, Any]] = run_ranks(run_stream, setting.ranks, setting, directory, None, None)
        return ends[0]


def differences(end: Any, other: Any, path: str = "") -> list[str]:
    """List where two ends differ in a bit; NaN equals NaN."""
    if isinstance(end, dict):
        return [
            d for key in end.keys() | other.keys() for d in differences(end.get(key), other.get(key), f"{path}/{key}")
        ]
    if isinstance(end, (list, tuple)):
        if len(end) != len(other):
            return [path]
        return [d for i, (a, b) in enumerate(zip(end, other, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    if isinstance(end, Tensor):
        same = end.shape == other.shape and torch.equal(
            torch.nan_to_num(end, nan=-1.0), torch.nan_to_num(other, nan=-1.0)
        )
        return [] if same else [path]
    return [] if end == other else [path]


def main() -> None:
    """Kill, resume, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = [
        Setting("cosine", workers=0),
        Setting("onecycle", workers=0),
        Setting("cosine", workers=2),
        Setting("onecycle", workers=2),
        Setting("onecycle", workers=0, ranks=2),
        Setting("cosine", workers=2, ranks=2),
    ]
    chance = random.Random(arguments.seed)
    ends: dict[Setting, dict[str, Any]] = {}
    exact = 0
    print("| kill | schedule | workers | processes | killed after batch | resumed from | bit-identical |")
    print("|---|---|---|---|---|---|---|")
    for number in range(arguments.kills):
        setting = settings[number % len(settings)]
        if setting not in ends:
            ends[setting] = uninterrupted(setting)
        kill_after = chance.randint(8, ends[setting]["steps"])
        end, checkpoint = kill_and_resume(setting, Kill(kill_after))
        wrong = differences(ends[setting], end)
        exact += not wrong
        answer = "yes" if not wrong else f"no: {wrong[0]}"
        print(
            f"| {number + 1} | {setting.schedule} | {setting.workers} | {setting.ranks} | {kill_after} | {checkpoint} |"
            f" {answer} |",
            flush=True,
        )
    print(f"\n{exact} of {arguments.kills} resumed runs ended bit-identical to the uninterrupted one.")


if __name__ == "__main__":
    main()
