"""The stream of the poisoning benchmarks: part of CIFAR-100 with a large first task, and a small convnet."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import arrays
from benchmarks.stream_overhead import DATA, Net
from lightning_cl.datamodules import ArrayData

CLASSES = 40
CLASSES_PER_TASK = [20, 4, 4, 4, 4, 4]
EPOCHS = [8, 6, 6, 6, 6, 6]
MEAN, STD = arrays.NORMALISATION["cifar"].values()


class Classifier(Net):
    """A network with an optimizer that is slower after the first task."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first = self.trainer.datamodule.current_task.index == 0  # type: ignore[attr-defined]
        return torch.optim.SGD(self.parameters(), lr=0.05 if first else 0.02, momentum=0.9)


class ConvNet(Classifier):
    """Three blocks of convolution, batch norm and pooling, and one hidden layer."""

    def __init__(self, width: int = 16) -> None:
        channels = [3, width, 2 * width, 2 * width]
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
            for i, o in pairwise(channels)
        ]
        head = [nn.Flatten(), nn.Linear(channels[-1] * 16, 128), nn.ReLU(), nn.Linear(128, CLASSES)]
        super().__init__(nn.Sequential(*blocks, *head))


def write_part(folder: Path, per_class: int, root: Path = DATA) -> Path:
    """Write the first images of each of the first classes; of the test images all."""
    return arrays.write_part(folder, "cifar", per_class, CLASSES, root=root)


def part_of_cifar(folder: Path, **settings: Any) -> ArrayData:
    """Return the DataModule of what `write_part` wrote."""
    return arrays.part_in(folder, "cifar", **{"batch_size": 64, **settings})


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Return mean and standard deviation in points."""
    points = 100 * np.array(values)
    return f"{points.mean():{'+' if sign else ''}.1f} ± {points.std():.1f}"
