"""Networks by name: the field's small ones, and torchvision's."""

import difflib
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn
from typing_extensions import override

_OWN = ("mlp", "convnet", "resnet32", "resnet18_cifar")


def build_backbone(
    name: str,
    num_classes: int,
    input_shape: Sequence[int] = (3, 32, 32),
    weights: str | None = None,
    bottleneck: int | None = None,
) -> nn.Module:
    """Build a network from inputs to logits, whose last layer is one `nn.Linear` with `num_classes` outputs.

    Args:
        name: "mlp", "convnet", "resnet32", "resnet18_cifar", or a classification model of `torchvision.models`.
        num_classes: Number of logits.
        input_shape: Shape of one input: ``(channels, height, width)``, or ``(features,)`` for "mlp".
        weights: Name of torchvision's pretrained weights, such as "DEFAULT". The head is new in any case.
        bottleneck: Width of a linear layer before the head, which then gets so many features; none if ``None``.

    Returns:
        The network. With a bottleneck, its last layer is a sequence of two: ``bottleneck`` and ``classifier``.

    Raises:
        ValueError: If an argument is unknown, or they do not go together.

    Example::

        >>> build_backbone("mlp", num_classes=10, input_shape=(1, 28, 28)).head
        Linear(in_features=400, out_features=10, bias=True)
    """
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    if bottleneck is not None:
        if bottleneck < 1:
            raise ValueError(f"`bottleneck` must be at least 1, got {bottleneck}.")
        return _narrowed(build_backbone(name, num_classes, input_shape, weights), num_classes, bottleneck)
    if name not in _OWN:
        return _build_torchvision(name, num_classes, input_shape, weights)
    if weights is not None:
        raise ValueError(f"`weights` goes with torchvision models; `backbone={name!r}` has none, got {weights!r}.")
    if name == "mlp":
        return MLP(math.prod(input_shape), num_classes)
    channels = _channels_of(name, input_shape)
    if name == "convnet":
        return ConvNet(channels, num_classes)
    return CifarResNet(channels, num_classes) if name == "resnet32" else _build_resnet18_cifar(channels, num_classes)


class MLP(nn.Module):
    """A fully connected network with ReLU, on flattened inputs; 784-400-400-10 is the field's for MNIST.

    Args:
        in_features: Numbers in one input.
        num_classes: Number of logits.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: Sequence[int] = (400, 400)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(in_features, width), nn.ReLU(inplace=True)]
            in_features = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(in_features, num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """Three blocks of convolution, batch norm, ReLU and pooling (32, 64 and 64 channels), and a hidden layer of 128.

    It takes images of any size from 8x8 up: what the blocks leave is pooled to at most 4x4.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for channels in (32, 64, 64):
            blocks += [
                nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
            in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(64 * 4 * 4, 128)
        self.head = nn.Linear(128, num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        features = self.pool(self.blocks(x)).flatten(1)
        return self.head(F.relu(self.hidden(features)))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """The residual network for CIFAR of He et al. (arXiv 1512.03385, section 4.2), with 16, 32 and 64 channels.

    Its shortcuts are the paper's option A: where the channels double, the input is subsampled and padded with zero
    channels, so no shortcut has parameters. Five blocks a stage make ResNet-32, of 0.46 million parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        blocks_per_stage: Basic blocks in each of the three stages.
    """

    def __init__(self, in_channels: int, num_classes: int, blocks_per_stage: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        stages: list[nn.Module] = []
        width = 16
        for channels in (16, 32, 64):
            blocks = [_BasicBlock(width if i == 0 else channels, channels) for i in range(blocks_per_stage)]
            stages.append(nn.Sequential(*blocks))
            width = channels
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(self.pool(self.stages(x)).flatten(1))  # type: ignore[no-any-return]


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.missing_channels = channels - in_channels

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.stride > 1:
            half = self.missing_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing_channels - half))
        return self.relu(out + x)  # type: ignore[no-any-return]


def _build_resnet18_cifar(channels: int, num_classes: int) -> nn.Module:
    """Build torchvision's ResNet-18 with a 3x3 stem of stride 1 and no max-pooling, as small images need it."""
    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _build_torchvision(name: str, num_classes: int, input_shape: Sequence[int], weights: str | None) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), [*_OWN, *known], n=3)
        hint = f" Nearest names: {', '.join(nearest)}." if nearest else ""
        raise ValueError(
            f"`backbone` must be {', '.join(map(repr, _OWN))} or a classification model of torchvision.models, got "
            f"{name!r}.{hint}"
        )
    if _channels_of(name, input_shape) != 3:
        raise ValueError(f"`input_shape`: torchvision's {name} takes 3 channels, got {tuple(input_shape)}.")
    if weights is not None:
        allowed = ["DEFAULT", *(entry.name for entry in torchvision.models.get_model_weights(name))]
        if weights not in allowed:
            raise ValueError(f"`weights` of {name} must be one of {', '.join(allowed)}, got {weights!r}.")
    model: nn.Module = torchvision.models.get_model(name, weights=weights)
    if hasattr(model, "aux_logits"):
        # GoogLeNet and Inception return named tuples while their auxiliary heads train.
        for attribute, off in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
            if hasattr(model, attribute):
                setattr(model, attribute, off)
    _replace_head(model, name, num_classes)
    return model


def _replace_head(model: nn.Module, name: str, num_classes: int) -> None:
    parent, attribute, head = _head_of(model, name)
    setattr(parent, attribute, nn.Linear(head.in_features, num_classes))


def _narrowed(model: nn.Module, num_classes: int, width: int) -> nn.Module:
    parent, attribute, head = _head_of(model, type(model).__name__)
    layers = {"bottleneck": nn.Linear(head.in_features, width), "classifier": nn.Linear(width, num_classes)}
    setattr(parent, attribute, nn.Sequential(OrderedDict(layers)))
    return model


def _head_of(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Linear]:
    """Return a network's last linear layer, and where it stands."""
    linear = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linear:
        raise ValueError(f"`backbone`: {name} ends in a convolution; a model that ends in an `nn.Linear` is needed.")
    path, head = list(linear.items())[-1]
    parent, _, attribute = path.rpartition(".")
    return model.get_submodule(parent), attribute, head


def _channels_of(name: str, input_shape: Sequence[int]) -> int:
    if len(input_shape) != 3:
        raise ValueError(
            f"`input_shape` must be (channels, height, width) for `backbone={name!r}`, got {tuple(input_shape)}."
        )
    return input_shape[0]
