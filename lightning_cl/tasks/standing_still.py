"""Layers that stand still while others are trained."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cl.taps import EXITS, layer_named, layers_matching


def drop_gradients(optimizer: Optimizer, stands_still: Callable[[Tensor], bool]) -> None:
    """Take the gradients of some parameters from an optimizer that is about to step.

    A parameter without a gradient keeps every bit, whereas weight decay and momentum move one whose gradient is zero.

    Args:
        optimizer: The optimizer.
        stands_still: Says of a parameter whether it is one of these.

    Example::

        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> drop_gradients(optimizer, lambda parameter: parameter is layer.weight)
        >>> layer.weight.grad, layer.bias.grad
        (None, tensor([1., 1.]))
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if stands_still(parameter):
                parameter.grad = None


class StillLayers:
    """Hold some layers of a module still for a training step: in eval mode, and without gradients if it may be so.

    Between `hold` and `release` lies one batch, so that everything outside finds the module as its owner left it.

    Args:
        layers: The layers, with those inside them.
        parameters: Their parameters.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> still = StillLayers([net[0]], net[0].parameters())
        >>> still.hold(without_gradients=True)
        >>> [(layer.training, layer.weight.requires_grad) for layer in net]
        [(False, False), (True, True)]
        >>> still.release()
        >>> net[0].training, net[0].weight.requires_grad
        (True, True)
    """

    def __init__(self, layers: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> None:
        self._layers = list(layers)
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._in_training: list[nn.Module] = []
        self._with_gradients: list[nn.Parameter] = []

    @classmethod
    def matching(cls, module: nn.Module, patterns: Sequence[str]) -> "StillLayers":
        """Return the layers with such names, with all that is inside them.

        Raises:
            ValueError: If a pattern matches nothing.
        """
        matched = nn.ModuleList(layers_matching(module, patterns).values())
        return cls([layer for layer in matched.modules() if layer is not matched], matched.parameters())

    @classmethod
    def all_but(cls, module: nn.Module, head: str) -> "StillLayers":
        """Return all layers but one with that name and exit heads; the mode of the module itself stays its own.

        Raises:
            ValueError: If there is no such layer.
        """
        trained = nn.ModuleList([layer_named(module, head), getattr(module, EXITS, nn.Identity())])
        layers, parameters = set(trained.modules()), set(trained.parameters())
        return cls(
            [layer for layer in module.modules() if layer is not module and layer not in layers],
            [parameter for parameter in module.parameters() if parameter not in parameters],
        )

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._parameters

    def leave_something_of(self, module: nn.Module, optimizer: Optimizer) -> bool:
        """Return whether an optimizer trains another parameter of the network, exit heads not counted."""
        own = {id(p) for name, p in module.named_parameters() if p.requires_grad and EXITS not in name.split(".")}
        trained = own - self._parameters.keys()
        return any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"])

    def hold(self, without_gradients: bool) -> None:
        """Hold them still until `release`.

        Args:
            without_gradients: Whether autograd leaves their parameters out, which saves the backward pass below the
                first layer that is trained. Where it does not, `drop_gradients` is what keeps them.
        """
        # what stands still already is another's to wake
        self._in_training += [layer for layer in self._layers if layer.training]
        for layer in self._in_training:
            layer.training = False
        if without_gradients:
            self._with_gradients += [parameter for parameter in self._parameters.values() if parameter.requires_grad]
            for parameter in self._with_gradients:
                parameter.requires_grad = False

    def release(self) -> None:
        """Put back what `hold` changed."""
        for layer in self._in_training:
            layer.training = True
        for parameter in self._with_gradients:
            parameter.requires_grad = True
        self._in_training, self._with_gradients = [], []
