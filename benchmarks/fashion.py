"""Split-FashionMNIST and its network, the same for lightning-cl, a plain loop and Avalanche: needs torch alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST
from torchvision.transforms import Compose, Normalize, RandomCrop, ToTensor

MEAN, STD = 0.2860, 0.3530
TASKS = 5
CLASSES = 10


def load_fashion(
    root: str, train: bool, per_class: int | None = None, transform: Callable[[Any], Tensor] | None = None
) -> FashionMNIST:
    """Return FashionMNIST.

    Args:
        root: Folder that holds FashionMNIST.
        train: The training or the test set.
        per_class: The first samples of each class only; None for all.
        transform: What is done to each image, a PIL one, when it is asked for.
    """
    images = FashionMNIST(root, train=train, transform=transform)
    if per_class is not None:
        rows = torch.cat([(images.targets == label).nonzero()[:per_class, 0] for label in range(CLASSES)])
        images.data, images.targets = images.data[rows], images.targets[rows]
    return images


def normalise(images: Tensor) -> Tensor:
    """Return raw images ``(batch, 28, 28)`` as normalised floats ``(batch, 1, 28, 28)``."""
    return (images.float() / 255).sub_(MEAN).div_(STD).unsqueeze(1)


def image_transform(crop: bool) -> Compose:
    """Return what makes one PIL image normalised floats, after a random crop or not."""
    return Compose([*([RandomCrop(28, padding=2)] if crop else []), ToTensor(), Normalize(MEAN, STD)])


def build_mlp() -> nn.Sequential:
    """Return the MLP 784-400-400-10."""
    hidden = [nn.Linear(784, 400), nn.ReLU(inplace=True), nn.Linear(400, 400), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(400, CLASSES))


@torch.no_grad()
def accuracy_of(net: nn.Module, root: str) -> float:
    """Return the fraction of test images whose largest logit of all ten is the right one."""
    test = load_fashion(root, train=False)
    net.eval()
    return float((net(normalise(test.data)).argmax(dim=1) == test.targets).float().mean())
