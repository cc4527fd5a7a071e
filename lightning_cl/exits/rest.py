"""Layers that compute nothing when no row is left for them."""

import copy
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

from torch import Tensor, nn

from lightning_cl.exits.hooks import ExitHooks
from lightning_cl.taps import layer_named


class LayersAtRest:
    """Let layers put out an empty batch without computing anything when no row is left.

    Args:
        root: The module.
        shapes: The shape of one row that each layer puts out.
        hooks: Know whether rows are left.
    """

    def __init__(self, root: nn.Module, shapes: dict[str, tuple[int, ...]], hooks: ExitHooks) -> None:
        self._layers = [layer_named(root, name) for name in shapes]
        self._before = [vars(layer).get("forward") for layer in self._layers]
        for layer, shape in zip(self._layers, shapes.values(), strict=True):
            layer.forward = _Resting(layer.forward, shape, hooks)

    def remove(self) -> None:
        """Let them compute again."""
        for layer, before in zip(self._layers, self._before, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before
        self._layers, self._before = [], []


class _Resting:
    """A layer's ``forward`` that knows when it has nothing to do; a copy of the layer has its own again."""

    def __init__(self, forward: Callable[..., Any], shape: tuple[int, ...], hooks: ExitHooks) -> None:
        self._forward = forward
        self._shape = shape
        self._hooks = hooks
        update_wrapper(self, forward)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self._hooks.nobody_left and inputs and isinstance(inputs[0], Tensor):
            return inputs[0].new_empty(0, *self._shape)
        return self._forward(*inputs, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)
