"""Read what layers of a module put out, by forward hooks."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class LayerTap:
    """Keep the last input and output of some layers while the ``with`` block lasts.

    Args:
        layers: The layers by name.

    Example::

        >>> import torch
        >>> layer = nn.Linear(2, 3)
        >>> with LayerTap({"fc": layer}) as tap:
        ...     _ = layer(torch.zeros(4, 2))
        >>> tap.outputs["fc"].shape
        torch.Size([4, 3])
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._layers = layers
        self._handles: list[Any] = []

    def __enter__(self) -> "LayerTap":
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep(self, name: str) -> Any:
        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                self.inputs[name] = inputs[0]
            if isinstance(output, Tensor):
                self.outputs[name] = output

        return keep


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a module by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def layer_named(module: nn.Module, name: str, argument: str = "head") -> nn.Module:
    """Return a layer by its name.

    Raises:
        ValueError: If there is none, showing the linear layers that there are.
    """
    layers = dict(module.named_modules())
    if name not in layers:
        raise ValueError(
            f"`{argument}={name!r}` names no layer of {type(module).__name__}. Its linear layers are:"
            f" {list_layers(linear_layers(module).items())}."
        )
    layer: nn.Module = layers[name]
    return layer


def find_head(module: nn.Module, num_classes: int | None, head: str | None) -> str:
    """Return the name of the classification layer: the one named, or the one linear layer with an output per class.

    Raises:
        ValueError: If it cannot be told, naming `head` and listing the linear layers.
    """
    if head is not None:
        layer_named(module, head)
        return head
    layers = linear_layers(module)
    fitting = [name for name, layer in layers.items() if layer.out_features == num_classes]
    if len(fitting) == 1:
        return fitting[0]
    found = "No linear layer" if not fitting else f"More than one linear layer ({', '.join(map(repr, fitting))})"
    wanted = "the number of classes, which is unknown" if num_classes is None else f"{num_classes} outputs"
    raise ValueError(
        f"Cannot tell the classification layer of {type(module).__name__}: {found} has {wanted}. Name it with"
        f" `head=...`. Its linear layers are: {list_layers(layers.items())}."
    )


def list_layers(layers: Iterable[tuple[str, nn.Module]]) -> str:
    """List layers for an error message."""
    return ", ".join(f"{name!r} ({layer})" for name, layer in layers) or "none"
