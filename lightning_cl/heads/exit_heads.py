"""Exit heads: small classifiers on the features of a layer inside a network."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

ExitHeadKind = Literal["pool", "conv", "linear"]


class PooledExitHead(nn.Module):
    """A linear layer on features pooled to few positions, the head of Shallow-Deep Networks (arXiv 1810.07052).

    Pooling is ``alpha`` times max pooling plus ``1 - alpha`` times average pooling, with a learnt ``alpha`` that may be
    any number.

    Args:
        shape: Channels, height and width of the features.
        num_classes: Number of logits.
        positions: Rows and columns that are left, fewer where the features have fewer.

    Example::

        >>> PooledExitHead((16, 8, 8), num_classes=10)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], num_classes: int, positions: int = 4) -> None:
        super().__init__()
        channels, height, width = shape
        self.size = min(positions, height), min(positions, width)
        self.alpha = nn.Parameter(torch.rand(()))
        self.classifier = nn.Linear(channels * self.size[0] * self.size[1], num_classes)

    @override
    def forward(self, features: Tensor) -> Tensor:
        height, width = (length // size for length, size in zip(features.shape[2:], self.size, strict=True))
        if self.training or features.shape[2:] != (self.size[0] * height, self.size[1] * width):
            largest = functional.adaptive_max_pool2d(features, self.size)
            mean = functional.adaptive_avg_pool2d(features, self.size)
        else:  # windows of one size side by side, which need half the time
            rows = features.unflatten(2, (self.size[0], height)).amax(3)  # type: ignore[no-untyped-call]
            largest = rows.unflatten(3, (self.size[1], width)).amax(4)
            mean = functional.avg_pool2d(features, (height, width))
        return self.classifier((self.alpha * largest + (1 - self.alpha) * mean).flatten(1))  # type: ignore[no-any-return]


class ConvExitHead(nn.Module):
    """A 3x3 convolution with stride 2 and half the channels before a `PooledExitHead`.

    Args:
        shape: Channels, height and width of the features.
        num_classes: Number of logits.

    Example::

        >>> ConvExitHead((16, 8, 8), num_classes=10)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        half = max(1, channels // 2)
        self.conv = nn.Conv2d(channels, half, kernel_size=3, stride=2, padding=1)
        self.pooled = PooledExitHead((half, (height + 1) // 2, (width + 1) // 2), num_classes)

    @override
    def forward(self, features: Tensor) -> Tensor:
        return self.pooled(self.conv(functional.relu(features)))  # type: ignore[no-any-return]


class LinearExitHead(nn.Module):
    """A linear layer: on a vector, on the class token of a sequence, or on the mean over an image's positions.

    Args:
        shape: Shape of one sample's features: ``(width,)``, ``(tokens, width)`` with the class token first, or
            ``(channels, height, width)``.
        num_classes: Number of logits.

    Example::

        >>> LinearExitHead((17, 32), num_classes=10)(torch.rand(2, 17, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(shape[0] if len(shape) == 3 else shape[-1], num_classes)

    @override
    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            features = features.mean((2, 3))
        elif features.dim() == 3:
            features = features[:, 0]
        return self.classifier(features)  # type: ignore[no-any-return]


def build_exit_head(head: ExitHeadKind | nn.Module, features: Tensor, num_classes: int, seed: int) -> nn.Module:
    """Build a head for the features of a layer, with weights that are drawn by the seed alone.

    Args:
        head: "pool" and "conv" suit images and are "linear" elsewhere. A module is copied with the weights that it
            has, and its lazy layers find their sizes and draw theirs.
        features: What the layer puts out for a batch.
        num_classes: Number of logits.
        seed: Of the weights that are drawn; the global generators are left alone.

    Raises:
        ValueError: If the features have a shape that no head is known for, or a module does not take them or gives no
            logits for them.

    Example::

        >>> build_exit_head("conv", torch.zeros(1, 400), num_classes=10, seed=0)
        LinearExitHead(
          (classifier): Linear(in_features=400, out_features=10, bias=True)
        )
    """
    shape = tuple(features.shape[1:])
    with seeded(seed):
        if isinstance(head, nn.Module):
            return _copy_of(head, features, num_classes)
        if len(shape) not in (1, 2, 3):
            raise ValueError(
                f"`head={head!r}` is for features of shape (batch, width), (batch, tokens, width) or (batch, channels,"
                f" height, width), got {tuple(features.shape)}. Give a module of your own as `head`."
            )
        kinds: dict[str, Callable[[Sequence[int], int], nn.Module]] = {"pool": PooledExitHead, "conv": ConvExitHead}
        build = kinds.get(head, LinearExitHead) if len(shape) == 3 else LinearExitHead
        return build(shape, num_classes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw weights that are a function of a seed; the global generators are left alone."""
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed CUDA too
        torch.default_generator.manual_seed(seed)
        yield


def _copy_of(head: nn.Module, features: Tensor, num_classes: int) -> nn.Module:
    copied = copy.deepcopy(head).to(features)
    modes = {module: module.training for module in copied.modules()}
    try:
        with torch.no_grad():
            logits = copied.eval()(features)
    except (RuntimeError, ValueError, IndexError) as error:  # a wrong width or number of dimensions
        sizes = ", ".join(map(str, features.shape[1:]))
        raise ValueError(
            f"`head` ({type(head).__name__}) does not take features of shape (batch, {sizes}): {error}. Lazy layers,"
            " such as `nn.LazyLinear`, find their sizes themselves."
        ) from error
    for module, training in modes.items():
        module.training = training
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(features), num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"`head` must give logits of shape ({len(features)}, {num_classes}), got {got}.")
    return copied


def pool_features(features: Tensor, positions: int = 4) -> Tensor:
    """Return one row of features a sample: vectors as they are, class tokens, and images max-pooled to few positions.

    Args:
        features: What a layer puts out.
        positions: Rows and columns that are left of an image, fewer where it has fewer.

    Example::

        >>> pool_features(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 256])
    """
    if features.dim() == 4:
        size = min(positions, features.shape[2]), min(positions, features.shape[3])
        return functional.adaptive_max_pool2d(features, size).flatten(1)
    return features[:, 0] if features.dim() == 3 else features
