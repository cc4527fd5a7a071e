"""Read and replace what layers of a module put out, by forward hooks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, override

EXITS = "early_exits"  # where exit heads are in a module, none of which is its classification layer

_HIDDEN = -1e4  # no probability beside any logit, and a number in half precision too

_own_outputs: ContextVar[bool] = ContextVar("own_outputs", default=False)
_untapped: ContextVar[bool] = ContextVar("untapped", default=False)


class ForwardHooks:
    """Base class of what reads or changes the outputs of layers while a ``with`` block lasts."""

    _handles: Sequence[RemovableHandle] = ()

    def register(self) -> Iterable[RemovableHandle]:
        """Put hooks on the layers, and return their handles."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._handles = list(self.register())
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()


class LayerTap(ForwardHooks):
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

    @override
    def register(self) -> Iterable[RemovableHandle]:
        return [layer.register_forward_hook(self._keep(name), with_kwargs=True) for name, layer in self._layers.items()]

    def _keep(self, name: str) -> Any:
        # taps come and go, and a compiled module must not be compiled again for each
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def keep(layer: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
            first = first_tensor(inputs, named)
            if first is not None:
                self.inputs[name] = first
            if isinstance(output, Tensor):
                self.outputs[name] = output

        return keep


class ActivationTap(ForwardHooks):
    """Keep the last output of some layers, so that what follows can be differentiated by it, in a ``with`` block.

    What follows gets a copy: an operation in place does not reach what is kept. An output that nothing is trained for
    begins to record gradients here.

    Args:
        layers: The layers by name.
        only_own_step: Whether calls in an `untapped` block are left out.

    Attributes:
        outputs: The outputs by name, in the order in which the layers gave them.

    Example::

        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
        >>> with ActivationTap({"conv": net[0]}) as tap:
        ...     total = net(torch.ones(1, 1, 4, 4)).sum()
        >>> torch.autograd.grad(total, tap.outputs["conv"])[0].shape
        torch.Size([1, 2, 2, 2])
    """

    def __init__(self, layers: dict[str, nn.Module], only_own_step: bool = False) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._layers = layers
        self._only_own_step = only_own_step

    @override
    def register(self) -> Iterable[RemovableHandle]:
        return [layer.register_forward_hook(self._keep(name)) for name, layer in self._layers.items()]

    def _keep(self, name: str) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def keep(layer: nn.Module, inputs: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            if self._only_own_step and _untapped.get():
                return None
            self.outputs.pop(name, None)  # the order is that of the last calls
            self.outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return self.outputs[name].clone()

        return keep


class OutputReplacement:
    """Let a head answer in place of a layer while the module is in eval mode; training sees the layer's own output.

    Args:
        root: The module whose ``training`` flag decides; a backbone in it may be in eval mode for good.
        layer: The layer whose input the head gets.
        head: Returns the output; it is moved to where its input is. While it is ``None`` the layer answers for itself.

    Example::

        >>> import torch
        >>> root = nn.Sequential(nn.Linear(2, 3))
        >>> replacement = OutputReplacement(root, root[0], nn.Identity())
        >>> root.eval()(torch.ones(1, 2))
        tensor([[1., 1.]])
        >>> replacement.remove()
        >>> root(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, root: nn.Module, layer: nn.Module, head: nn.Module | None = None) -> None:
        self.head = head
        self.layer = layer
        self._root = root
        self._handle = layer.register_forward_hook(self, with_kwargs=True)

    # or a compiled module would be compiled again for each head
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, layer: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> Tensor | None:
        """Return what the head makes of the layer's input, or ``None`` to keep the output."""
        features = first_tensor(inputs, named)
        if self.head is None or features is None or self._root.training or wants_own_outputs():
            return None
        held = next((tensor for tensor in (*self.head.buffers(), *self.head.parameters())), features)
        if held.device != features.device:
            self.head.to(features.device)
        scores: Tensor = self.head(features)
        return scores.to(torch.promote_types(scores.dtype, output.dtype))

    def remove(self) -> None:
        """Take it off."""
        self._handle.remove()


class ClassMask:
    """Hide all but some classes: their logits become so low that a softmax leaves them no probability and no gradient.

    Args:
        classes: Those that stay.

    Example::

        >>> import torch
        >>> ClassMask([0, 2])(torch.ones(1, 3)).softmax(1)
        tensor([[0.5000, 0.0000, 0.5000]])
    """

    def __init__(self, classes: Iterable[int]) -> None:
        self.classes = tuple(classes)
        self._hidden = torch.empty(0, dtype=torch.bool)

    def __call__(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Return logits without the scores of the other classes.

        Args:
            logits: What a classification layer puts out.
            dim: The dimension that has the classes: see `class_dimension`.
        """
        if len(self._hidden) != logits.shape[dim] or self._hidden.device != logits.device:
            hidden = torch.ones(logits.shape[dim], dtype=torch.bool)
            hidden[[label for label in self.classes if label < len(hidden)]] = False
            self._hidden = hidden.to(logits.device)
        after = logits.ndim - 1 - dim % logits.ndim
        return logits.masked_fill(self._hidden.view(-1, *[1] * after), _HIDDEN)


def class_dimension(layer: nn.Module) -> int:
    """Return the dimension of a layer's output that has the classes: 1 of a convolution's, else the last.

    Of a layer that consists of others, the last one with weights tells.

    Example::

        >>> class_dimension(nn.Conv2d(8, 3, 1)), class_dimension(nn.Linear(8, 3))
        (1, -1)
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kinds = [isinstance(part, convolutions) for part in layer.modules() if isinstance(part, (nn.Linear, *convolutions))]
    return 1 if kinds and kinds[-1] else -1


class LogitTap(ForwardHooks):
    """Keep what a classification layer gets and puts out, and let a mask change what others get of it.

    That is, while the ``with`` block lasts.

    Args:
        layer: The classification layer.
        mask: Hides classes from whatever comes after the layer.

    Attributes:
        features: The layer's last input; ``None`` until then.
        logits: The layer's last output, as it was before any mask; ``None`` until then.

    Example::

        >>> import torch
        >>> layer = nn.Linear(2, 3)
        >>> with LogitTap(layer, ClassMask([1])) as tap:
        ...     masked = layer(torch.zeros(4, 2))
        >>> masked.softmax(1)[0], torch.equal(tap.logits, layer(torch.zeros(4, 2)))
        (tensor([0., 1., 0.], grad_fn=<SelectBackward0>), True)
    """

    def __init__(self, layer: nn.Module, mask: ClassMask | None = None) -> None:
        self.features: Tensor | None = None
        self.logits: Tensor | None = None
        self._layer = layer
        self._mask = mask

    @override
    def register(self) -> Iterable[RemovableHandle]:
        # before all other hooks, since another tap may mask too
        yield self._layer.register_forward_hook(self._keep, prepend=True, with_kwargs=True)
        if self._mask is not None:
            yield self._layer.register_forward_hook(self._hide)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, layer: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor) and not _untapped.get():
            self.features, self.logits = first_tensor(inputs, named), output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _hide(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        if self._mask is None or not isinstance(output, Tensor) or _untapped.get():
            return None
        return self._mask(output, class_dimension(layer))


@contextmanager
def untapped() -> Iterator[None]:
    """Let no `LogitTap` keep or change anything while the ``with`` block lasts: it is not the module's own step."""
    token = _untapped.set(True)
    try:
        yield
    finally:
        _untapped.reset(token)


def first_tensor(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """Return the first tensor that a layer was called with."""
    return next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)


@contextmanager
def own_outputs() -> Iterator[None]:
    """Let every layer answer for itself while the ``with`` block lasts, whatever heads stand in for some."""
    token = _own_outputs.set(True)
    try:
        yield
    finally:
        _own_outputs.reset(token)


def wants_own_outputs() -> bool:
    """Return whether an `own_outputs` block is open."""
    return _own_outputs.get()


def layers_matching(
    module: nn.Module, patterns: Sequence[str] | None, argument: str = "layers"
) -> dict[str, nn.Module]:
    """Return layers of a module by name, in its own order, without those of its exit heads.

    Args:
        module: The module.
        patterns: Shell patterns of names, such as ``"backbone.*.conv1"``; ``None`` for all layers with parameters of
            their own and no layers in them: convolutions, linear layers, norms.
        argument: What the patterns are called in an error.

    Raises:
        ValueError: If a pattern matches nothing, showing the layers that there are.
    """
    layers = {name: layer for name, layer in _own_layers(module) if name}
    with_weights = {
        name: layer
        for name, layer in layers.items()
        if not any(True for _ in layer.children()) and any(True for _ in layer.parameters(recurse=False))
    }
    if patterns is None:
        return with_weights
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"`{argument}` has {pattern!r}, which matches no layer of {type(module).__name__}. Layers with weights"
                f" are: {', '.join(map(repr, with_weights)) or 'none'}."
            )
    return {name: layer for name, layer in layers.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a module by name, without those of its exit heads."""
    return {name: layer for name, layer in _own_layers(module) if isinstance(layer, nn.Linear)}


def _own_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if EXITS not in name.split("."):
            yield name, layer


def layer_named(module: nn.Module, name: str, argument: str = "head") -> nn.Module:
    """Return a layer by its name.

    Raises:
        ValueError: If there is none, showing the linear layers that there are.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"`{argument}={name!r}` names no layer of {type(module).__name__}. Its linear layers are:"
            f" {list_layers(linear_layers(module).items())}."
        ) from None


def find_head(module: nn.Module, num_classes: int | None, head: str | None, argument: str = "head") -> str:
    """Return the name of the classification layer: the one named, or the one layer with an output per class.

    That is a linear layer or, where none fits, a 1x1 convolution.

    Raises:
        ValueError: If it cannot be told, with the argument that names it and the linear layers.
    """
    if head is not None:
        layer_named(module, head, argument)
        return head
    layers: dict[str, nn.Module] = dict(linear_layers(module))
    fitting = [name for name, layer in linear_layers(module).items() if layer.out_features == num_classes]
    if not fitting:
        fitting = [name for name, layer in _pointwise_convolutions(module) if layer.out_channels == num_classes]
        layers.update(_pointwise_convolutions(module))
    if len(fitting) == 1:
        return fitting[0]
    found = "No linear layer" if not fitting else f"More than one layer ({', '.join(map(repr, fitting))})"
    wanted = "the number of classes, which is unknown" if num_classes is None else f"{num_classes} outputs"
    raise ValueError(
        f"Cannot tell the classification layer of {type(module).__name__}: {found} has {wanted}. Name it with"
        f" `{argument}=...`. Its linear layers are: {list_layers(layers.items())}."
    )


def _pointwise_convolutions(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, layer in _own_layers(module):
        if isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1}:
            yield name, layer


def list_layers(layers: Iterable[tuple[str, nn.Module]]) -> str:
    """List layers for an error message."""
    return ", ".join(f"{name!r} ({layer})" for name, layer in layers) or "none"
