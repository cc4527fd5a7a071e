"""Measure how well SampleScreen finds the poisoned samples of a partly poisoned task.

    python benchmarks/sample_screen.py

Three tasks of FashionMNIST (2 classes each, 400 images a class, 2 epochs) or CIFAR-100 (5 classes, 200 images, 4
epochs), one after another without replay; the third is poisoned at severity 5. "convnet", SGD, batch 64, one thread. A
share of the samples is poisoned, of all classes ("base") or of half of them ("bait"). Precision at k is the share of
poisoned samples among the k most suspicious, k being the number of poisoned ones; chance is their share of the task.
"""

import argparse
import os
import platform
import statistics
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fashion import load_fashion
from benchmarks.quiet import quiet_trainer, silence
from benchmarks.stream_overhead import DATA
from lightning_cl.callbacks import SampleScreen
from lightning_cl.datamodules import ClassIncremental, PoisonedTask
from lightning_cl.models import ImageClassifier

BATCH = 64
TASK = 2
CORRUPTIONS = ("gaussian_blur", "contrast", "gaussian_noise")
ATTACKS: tuple[tuple[Literal["base", "bait"], float], ...] = (("bait", 0.1), ("bait", 0.3), ("base", 0.2))


class Images(LightningDataModule):
    """Training images with pixels in [0, 1]."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.dataset = TensorDataset(images.float() / 255, labels)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a shuffling loader."""
        return DataLoader(self.dataset, batch_size=BATCH, shuffle=True)


def fashion_images(root: str) -> tuple[Tensor, Tensor]:
    """Return 400 images of each class of FashionMNIST, and their labels."""
    data = load_fashion(root, train=True, per_class=400)
    return data.data.unsqueeze(1), data.targets


def cifar_images(root: str) -> tuple[Tensor, Tensor]:
    """Return 200 images of each class of CIFAR-100, and their labels."""
    files = [np.load(path) for path in sorted((Path(root) / "cifar100").glob("train*.npz"))]
    images = torch.from_numpy(np.concatenate([file["images"] for file in files])).movedim(3, 1)
    labels = torch.from_numpy(np.concatenate([file["labels"] for file in files])).long()
    rows = torch.cat([(labels == label).nonzero()[:200, 0] for label in range(100)])
    return images[rows], labels[rows]


# how to load it, classes a task, epochs
DATA_SETS = {"FashionMNIST": (fashion_images, 2, 2, ATTACKS), "CIFAR-100": (cifar_images, 5, 4, ATTACKS[1:2])}


def screen(images: Tensor, labels: Tensor, classes: int, epochs: int, seed: int, **poison: Any) -> tuple[float, float]:
    """Train until the poisoned task is over, and return precision at k and chance."""
    seed_everything(seed, verbose=False)
    tasks = [classes] * (TASK + 1)
    sequence = ClassIncremental(Images(images, labels), classes_per_task=tasks, seed=seed, class_order=seed)
    data = PoisonedTask(sequence, task=TASK, **poison)
    module = ImageClassifier("convnet", int(labels.max()) + 1, tuple(images.shape[1:]))
    screened = SampleScreen(tasks=[TASK])
    quiet_trainer(max_epochs=epochs, callbacks=[screened]).fit(module, datamodule=data)
    ranking, poisoned = screened.ranking(TASK), data.poisoned_indices("train")
    hits = torch.isin(ranking.indices[: len(poisoned)], poisoned).float().mean()
    return float(hits), len(poisoned) / len(ranking.indices)


def main() -> None:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data", default=str(DATA), help="folder that holds FashionMNIST and cifar100")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    print(f"{versions}; one thread of {os.cpu_count()} ({platform.machine()}); {arguments.seeds} seeds\n")
    print("| data | corruption | attack | share of a class | chance | precision at k: mean (lowest, highest) |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, (load, classes, epochs, attacks) in DATA_SETS.items():
        images, labels = load(arguments.data)
        for corruption in CORRUPTIONS:
            for attack, share in attacks:
                poison = {"corruption": corruption, "attack": attack, "samples": share}
                runs = [screen(images, labels, classes, epochs, seed, **poison) for seed in range(arguments.seeds)]
                hits, chances = zip(*runs, strict=True)
                figures = f"{statistics.mean(hits):.2f} ({min(hits):.2f}, {max(hits):.2f})"
                row = (name, corruption, attack, share, f"{statistics.mean(chances):.2f}", figures)
                print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
