"""Parts of the real data sets, as arrays and as a DataModule."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torchvision.datasets import FashionMNIST

from benchmarks.stream_overhead import DATA
from lightning_cl.datamodules import ArrayData

DataName = Literal["fashion", "cifar"]

NORMALISATION: dict[str, dict[str, list[float]]] = {
    "fashion": {"mean": [0.286], "std": [0.353]},
    "cifar": {"mean": [0.507, 0.487, 0.441], "std": [0.267, 0.256, 0.276]},
}


def first_of_each(
    data: DataName, train: bool, per_class: int, classes: int, root: Path = DATA
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images and the labels of each of the first classes.

    Args:
        data: Which data set.
        train: The training or the test set.
        per_class: Images of each class.
        classes: How many classes.
        root: Folder that holds FashionMNIST and cifar100.
    """
    if data == "fashion":
        source = FashionMNIST(str(root), train=train)
        images, labels = source.data.numpy(), source.targets.numpy()
    else:
        files = [np.load(path) for path in sorted((root / "cifar100").glob(f"{'train' if train else 'test'}*.npz"))]
        images = np.concatenate([file["images"] for file in files])
        labels = np.concatenate([file["labels"] for file in files])
    rows = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(classes)])
    return images[rows], labels[rows].astype(np.int64)


def write_part(
    folder: Path, data: DataName, per_class: int, classes: int, test_images: int = 100, root: Path = DATA
) -> Path:
    """Write ``train.npz`` and ``test.npz`` of the first images of each of the first classes, and return the folder."""
    for name, count in (("train", per_class), ("test", test_images)):
        images, labels = first_of_each(data, name == "train", count, classes, root)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    return folder


def part_in(folder: Path, data: DataName, **settings: Any) -> ArrayData:
    """Return the DataModule of what `write_part` wrote, validated and tested on its test images."""
    train, test = (str(folder / f"{name}.npz") for name in ("train", "test"))
    return ArrayData(train, val=test, test=test, **{**NORMALISATION[data], **settings})
