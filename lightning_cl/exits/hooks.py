"""Heads that answer inside a network, and rows that leave a batch there."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.exits.points import ExitPoint
from lightning_cl.heads.exit_rules import Confidence, confidence_of, patience_of
from lightning_cl.taps import layer_named


class ExitHooks:
    """Let heads answer at layers inside a network, by forward hooks.

    While the network trains, every head sees its layer's output, and `logits` holds what they say. In eval mode with a
    threshold, the rows that a head is sure of leave the batch at its layer: later layers get the others alone, and the
    classification layer's output has all rows in their order, each from the exit that it took.

    Args:
        root: The module whose ``training`` flag decides.
        points: The exits, in the order in which a sample meets them.
        heads: One head for each.
        classifier: Name of the classification layer.

    Attributes:
        threshold: How sure an exit must be for a sample to leave there; ``None`` where all go to the end.
        confidence: What sure means.
        detached: Whether heads train on features without a gradient to the network.
        silent: Whether heads say nothing while the network trains.
        correction: What is made of logits in eval mode before anybody looks at them, the classification layer's too.
        removes_rows: Whether rows leave the batch, or go to the end and take the answer of their exit with them.
        keeps_one: Whether one row goes on when all have left, for networks that cannot do with none.
        calls: How often the network was called in this training step.
        logits: What each exit said of the last batch, the classification layer last; in training and `collecting`.
        taken: The exit that each row of the last batch took, in eval mode with a threshold.

    Example::

        >>> network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
        >>> _ = network[0].weight.data.copy_(torch.eye(2))
        >>> hooks = ExitHooks(network.eval(), [ExitPoint("0", torch.zeros(1, 2), False)], [nn.Identity()], "1")
        >>> hooks.threshold = 0.9
        >>> output = network(torch.tensor([[9.0, 0.0], [0.0, 0.1]]))
        >>> output[0], hooks.taken
        (tensor([9., 0.], grad_fn=<SelectBackward0>), tensor([0, 1]))
    """

    def __init__(
        self, root: nn.Module, points: Sequence[ExitPoint], heads: Sequence[nn.Module], classifier: str
    ) -> None:
        self.threshold: float | None = None
        self.confidence: Confidence = "max_softmax"
        self.detached = False
        self.silent = False
        self.correction: Callable[[Tensor], Tensor] | None = None
        self.removes_rows = True
        self.keeps_one = False
        self.calls = 0
        self.logits: list[Tensor] = []
        self.taken: Tensor | None = None
        self._root = root
        self._points = points
        self._heads = heads
        self._collects = False
        self._passes = False  # a call without gradients in a training step, such as for an accuracy
        self._straggler = False  # one row goes on although all have left
        self._rows: Tensor | None = None  # the rows of the batch that are still in the network
        self._left: list[tuple[Tensor, Tensor]] = []  # rows that left, and their logits
        self._predictions: list[Tensor] = []  # of the rows that are still there, by exit
        self._layers = [layer_named(root, name) for name in (*(point.layer for point in points), classifier)]
        hooks = [*(self._at(position) for position in range(len(points))), self._at_end]
        self._handles = [layer.register_forward_hook(hook) for layer, hook in zip(self._layers, hooks, strict=True)]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Let no row leave, and have `logits` of every exit, in eval mode."""
        before, self._collects = self._collects, True
        try:
            yield
        finally:
            self._collects = before
            self.logits = []

    @property
    def count(self) -> int:
        """How many heads there are, the classification layer among them."""
        return len(self._layers)

    def begin_step(self) -> None:
        """Forget the last training step."""
        self.logits, self.calls = [], 0

    @property
    def nobody_left(self) -> bool:
        """Whether all rows of the batch that is in the network have left it."""
        return self._rows is not None and len(self._rows) == 0 and self.removes_rows and not self._straggler

    @property
    def _looks(self) -> bool:
        return self._root.training or self._collects

    def _at(self, position: int) -> Callable[..., Tensor | None]:
        point, head = self._points[position], self._heads[position]

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if layer is not self._layers[position]:  # a copy of the network, which has no exits
                return None
            if position == 0:
                self._begin_batch()
            if self._passes:
                return None
            if self._looks:
                if not (self.silent and self._root.training):
                    self.logits.append(self._heard(head, output, point))
                return None
            if self.threshold is None or len(output) == 0 or self._straggler:
                return None
            return self._let_go(output, self._corrected(head(output)), position, self.threshold)

        return hook  # type: ignore[no-any-return]

    def _begin_batch(self) -> None:
        training = self._root.training
        self._passes = training and not self.detached and not torch.is_grad_enabled()
        if self._passes:
            return
        self.calls += training
        self.logits, self._left, self._predictions = [], [], []
        self._rows = self.taken = None
        self._straggler = False

    def _heard(self, head: nn.Module, output: Tensor, point: ExitPoint) -> Tensor:
        features = output.clone() if point.written_over else output
        if not self._root.training:
            return self._corrected(head(features))
        if not self.detached:
            return head(features)  # type: ignore[no-any-return]
        with torch.enable_grad():  # the network may stand still
            return head(features.detach())  # type: ignore[no-any-return]

    def _corrected(self, logits: Tensor) -> Tensor:
        return logits if self.correction is None else self.correction(logits)

    def _let_go(self, output: Tensor, logits: Tensor, position: int, threshold: float) -> Tensor | None:
        """Take down who leaves, and return the rows that stay; ``None`` if all do."""
        if self._rows is None:
            self._rows = torch.arange(len(output), device=output.device)
            self.taken = torch.full_like(self._rows, len(self._points))
        if not self.removes_rows:
            logits = logits[self._rows]
        leaves = self._confidences(logits, position) > threshold
        leaving, stays = leaves.nonzero().squeeze(1), (~leaves).nonzero().squeeze(1)
        if len(leaving) == 0:
            return None
        rows = self._rows[leaving]
        self._left.append((rows, logits[leaving]))
        self.taken[rows] = position  # type: ignore[index]
        self._rows = self._rows[stays]
        self._predictions = [predictions[stays] for predictions in self._predictions]
        if not self.removes_rows:
            return None
        # layers at rest know the shape of the dry run alone
        known = output.shape[1:] == self._points[position].features.shape[1:]
        self._straggler = len(stays) == 0 and (self.keeps_one or not known)
        return output[:1] if self._straggler else output[stays]

    def _confidences(self, logits: Tensor, position: int) -> Tensor:
        if self.confidence != "patience":
            return confidence_of(logits, self.confidence)
        self._predictions.append(logits.argmax(1))
        so_far = patience_of(torch.stack(self._predictions, dim=1))[:, -1]
        return so_far * position / len(self._points)  # as a share of the repeats up to the last head

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _at_end(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if layer is not self._layers[-1]:
            return None
        if self._passes:
            return None
        if self._root.training:
            self.logits.append(output)
            return None
        corrected = self._corrected(output)
        if self._collects:
            self.logits.append(corrected)
        if self._collects or self.threshold is None or self._rows is None or not self._left:
            return None if self.correction is None else corrected
        output = corrected
        whole = output.new_empty(len(self.taken), *output.shape[1:])  # type: ignore[arg-type]
        if not self._straggler:
            whole[self._rows] = output if self.removes_rows else output[self._rows]
        for rows, logits in self._left:
            whole[rows] = logits.to(whole)
        self._rows, self._left = None, []
        return whole


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
