"""A module's forward with other weights than its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_cl.taps import own_outputs, untapped
from lightning_cl.tasks.random_state import forked_generators

Weights = dict[str, Tensor]


def copy_weights(module: nn.Module) -> Weights:
    """Return copies of a module's parameters and buffers, by name, which nothing trains."""
    return {name: tensor.detach().clone() for name, tensor in weights_of(module).items()}


def weights_of(module: nn.Module) -> Weights:
    """Return a module's parameters and buffers, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def on_device(weights: Weights, device: torch.device) -> Weights:
    """Return the same tensors on a device."""
    if all(tensor.device == device for tensor in weights.values()):
        return weights
    return {name: tensor.to(device) for name, tensor in weights.items()}


@contextmanager
def held_in_eval_mode(module: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Hold a module in eval mode, without heads that stand in for layers, draws of random numbers, or gradients.

    It does for each step what `evaluating` does for a whole evaluation, and costs less: buffers are not put back, since
    the weights that are used here are not the module's own.

    Args:
        module: The module.
        gradients: Whether they are recorded after all, of what asks for them.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with forked_generators(), torch.set_grad_enabled(gradients), own_outputs(), untapped():
            yield
    finally:
        for part, training in modes:
            part.training = training


class WithWeights(nn.Module):
    """Call a module with weights given by name; those that are not given are its own.

    Args:
        module: The module.
        call: Calls it on a batch.

    Example::

        >>> layer = nn.Linear(2, 3)
        >>> call = WithWeights(layer, layer.forward)
        >>> call.with_weights({"weight": torch.zeros(3, 2), "bias": torch.ones(3)}, torch.rand(1, 2))
        tensor([[1., 1., 1.]])
    """

    def __init__(self, module: nn.Module, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._call = call

    @override
    def forward(self, batch: Any) -> Tensor:
        return self._call(batch)

    def with_weights(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return what the call gives for a batch under these parameters and buffers."""
        named = {f"module.{name}": tensor for name, tensor in weights.items()}
        return functional_call(self, named, (batch,))  # type: ignore[no-any-return]
