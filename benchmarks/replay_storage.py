"""What a replay memory takes: bytes, times of its operations, and checkpoints with it. Run by `replay.py`."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.stream_overhead import Net, fit
from lightning_cl.callbacks import Replay
from lightning_cl.datamodules import ArrayData, ClassIncremental
from lightning_cl.memory import ReplayMemory, Selection

SLOTS = 1_000_000
CLASSES = 100
DRAWN = 256
SETTINGS = [(2_000, 12_000), (SLOTS, 1_200_000)]  # slots, and samples of the stream: more than there are slots


def tensor_bytes(memory: ReplayMemory) -> int:
    """Return the bytes of all tensors that a memory holds."""
    held = [value for value in vars(memory).values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in [*held, *memory.extras.values()])


def seconds_of(action: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def time_memory(selection: Selection, seed: int) -> tuple[float, float, float, float]:
    """Fill a memory, offer it as many samples again, draw; return its megabytes, both offers' seconds, a draw's µs."""
    memory = ReplayMemory(size=SLOTS, selection=selection, seed=seed)
    indices = torch.arange(SLOTS)
    labels = indices % CLASSES
    others = labels + CLASSES
    to_empty = seconds_of(lambda: memory.add(0, indices, labels))
    to_full = seconds_of(lambda: memory.add(1, indices, others))
    draws = [seconds_of(lambda key=key: memory.sample(DRAWN, key)) for key in range(1000)]  # type: ignore[misc]
    if len(memory) != SLOTS:
        raise RuntimeError(f"The memory holds {len(memory):,} of {SLOTS:,} samples.")
    return tensor_bytes(memory) / 1e6, to_empty, to_full, 1e6 * statistics.median(draws)


def measure_memory(rounds: int) -> None:
    """Print bytes, offers to an empty and to a full memory, and draws, for a memory of 1,000,000 slots."""
    print(
        f"A memory of {SLOTS:,} slots, offered {SLOTS:,} samples of {CLASSES} classes, then as many of others;", end=""
    )
    print(f" medians of {rounds} rounds\n")
    print(f"| selection | tensors, MB | offer to the empty one, s | to the full one, s | drawing {DRAWN} ids, µs |")
    print("|---|---|---|---|---|")
    selections: tuple[Selection, ...] = ("class_balanced", "reservoir", "random")
    for selection in selections:
        figures = zip(*(time_memory(selection, seed) for seed in range(rounds)), strict=True)
        size, to_empty, to_full, draw = (statistics.median(values) for values in figures)
        print(f"| {selection} | {size:.1f} | {to_empty:.2f} | {to_full:.2f} | {draw:.0f} |", flush=True)
    print("| asked: at most | 32 | 1 | 1 | 100 |\n", flush=True)


class SaveAtEnd(Callback):
    """Save checkpoints when the stream is over."""

    def __init__(self, path: Path, rounds: int) -> None:
        self.path, self.rounds = path, rounds
        self.seconds: list[float] = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = [seconds_of(lambda: trainer.save_checkpoint(self.path)) for _ in range(self.rounds)]


def write_images(folder: Path, samples: int) -> ArrayData:
    """Write tiny images of ten classes, and return them as data."""
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (samples, 8, 8), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(samples) % 10)
    return ArrayData(
        train=str(folder / "images.npy"),
        train_labels=str(folder / "labels.npy"),
        mean=[0.5],
        std=[0.25],
        val_fraction=0.0,
    )


def measure_checkpoints(rounds: int) -> None:
    """Print size and save time of checkpoints without a memory and with one, by reference and with copies."""
    print(f"Checkpoints of a stream of two tasks with 8x8 images and a linear layer; medians of {rounds} saves\n")
    print("| slots | storage | checkpoint, MB | beside it, MB | saving, ms | way to the next task, s |")
    print("|---|---|---|---|---|---|")
    for slots, samples in SETTINGS:
        with tempfile.TemporaryDirectory() as images:
            data = write_images(Path(images), samples)
            print_checkpoint(f"| 0 (stream of {samples:,}) | - |", data, [], rounds)
            for storage in ("reference", "copy"):
                print_checkpoint(f"| {slots:,} | {storage} |", data, [Replay(size=slots, storage=storage)], rounds)
    print(flush=True)


def print_checkpoint(row: str, data: ArrayData, replay: list[Callback], rounds: int) -> None:
    """Run two steps of each task, save, and print the rest of the row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.ckpt")
        save = SaveAtEnd(path, rounds)
        stream = ClassIncremental(data, num_tasks=2)
        net = Net(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        flags: dict[str, Any] = {"limit_train_batches": 2, "default_root_dir": folder}
        watch = fit(net, stream, epochs=1, callbacks=[*replay, save], **flags)
        beside = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file() and file != path)
        size, saving = path.stat().st_size, statistics.median(save.seconds)
        print(
            f"{row} {size / 1e6:.2f} | {beside / 1e6:.1f} | {1000 * saving:.1f} | {watch.switches[0]:.2f} |", flush=True
        )
