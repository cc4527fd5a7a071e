"""A network up to one of its exits, for export and serving."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_cl.exits.heads import ExitHeads
from lightning_cl.exits.hooks import ExitHooks, ExitReached
from lightning_cl.taps import EXITS


class SubNetwork(nn.Module):
    """A network that ends at one of its exits, whatever it is given: nothing after the exit is computed.

    `torch.jit.trace` and ONNX export get the operations up to the exit alone.

    Args:
        network: A module with exits, such as one from `lightning_cl.load`; it is put into eval mode.
        position: Which exit, from 0.

    Raises:
        ValueError: If the module has no such exit.

    Example::

        module = lightning_cl.load("last.ckpt", MyModule)
        torch.onnx.export(SubNetwork(module, position=0), (images,), "first_exit.onnx", dynamo=True)
    """

    def __init__(self, network: nn.Module, position: int) -> None:
        super().__init__()
        heads = getattr(network, EXITS, None)
        hooks = heads.hooks if isinstance(heads, ExitHeads) else None
        if not isinstance(heads, ExitHeads) or not isinstance(hooks, ExitHooks) or hooks.root is not network:
            raise ValueError(
                "`network` must have exits, as a module from `lightning_cl.load` has them; this"
                f" {type(network).__name__} has none. A copy of one with exits has none either."
            )
        if not 0 <= position < len(heads.heads):
            raise ValueError(f"`position` must be from 0 to {len(heads.heads) - 1}, got {position}.")
        self.position = position
        self._hooks = hooks
        self._network = (network.eval(),)  # its layers, but not itself: a LightningModule without Trainer has no trace
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            setattr(self, shared, getattr(network, shared))
        self.training = False

    @override
    def train(self, mode: bool = True) -> Self:
        """Put the network into training mode, in which no exit answers, or back."""
        for network in self._network:
            network.train(mode)
        self.training = mode
        return self

    @override
    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the exit's logits, ``(batch, classes)``, for what the network's ``forward`` takes."""
        [network] = self._network
        if self._hooks.root is not network:
            raise RuntimeError("A copy of a network has no exits. Make a SubNetwork of the network itself.")
        if network.training:
            raise RuntimeError("The network is in training mode, in which no exit answers. Call `eval()`.")
        try:
            with self._hooks.stopping_at(self.position):
                network(*inputs, **named)
                return self._hooks.logits[self.position]
        except ExitReached as reached:
            return reached.logits
