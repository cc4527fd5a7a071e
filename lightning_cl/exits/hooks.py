"""Heads that answer inside a network, and rows that leave a batch there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_cl.exits.heads import ExitHeads
from lightning_cl.exits.points import ExitPoint
from lightning_cl.heads.exit_rules import Confidence, confidence_of, confidences_by_exit, first_confident, patience_of
from lightning_cl.taps import first_tensor, layer_named, wants_own_outputs

Collected = Literal["answers", "logits", "features"]


class ExitHooks:
    """Let heads answer at layers inside a network, by forward hooks.

    While the network trains, every head sees its layer's output, and `logits` holds what they say. In eval mode with a
    threshold, the rows that a head is sure of leave the batch at its layer: later layers get the others alone, and the
    classification layer's output has all rows in their order, each from the exit that it took.

    Args:
        root: The module whose ``training`` flag decides.
        points: The exits, in the order in which a sample meets them.
        heads: Their heads.
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
        features: What each exit got, pooled; in ``collecting("features")``.
        taken: The exit that each row of the last batch took, in eval mode with a threshold.
        root: The module.

    Example::

        >>> network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
        >>> _ = network[0].weight.data.copy_(torch.eye(2))
        >>> points = [ExitPoint("0", torch.zeros(1, 2), False)]
        >>> hooks = ExitHooks(network.eval(), points, ExitHeads([nn.Identity()]), "1")
        >>> hooks.threshold = 0.9
        >>> output = network(torch.tensor([[9.0, 0.0], [0.0, 0.1]]))
        >>> output[0], hooks.taken
        (tensor([9., 0.], grad_fn=<SelectBackward0>), tensor([0, 1]))
    """

    def __init__(self, root: nn.Module, points: Sequence[ExitPoint], heads: ExitHeads, classifier: str) -> None:
        self.threshold: float | None = None
        self.confidence: Confidence = "max_softmax"
        self.detached = False
        self.silent = False
        self.correction: Callable[[Tensor], Tensor] | None = None
        self.removes_rows = True
        self.keeps_one = False
        self.calls = 0
        self.logits: list[Tensor] = []
        self.features: list[Tensor] = []
        self.taken: Tensor | None = None
        self.root = root
        self._points = points
        self._heads = heads
        self._collects: Collected | None = None
        self._stops_at: int | None = None
        self._passes = False  # a call without gradients in a training step, such as for an accuracy
        self._straggler = False  # one row goes on although all have left
        self._nearest = False  # nearest means answer
        self._rows: Tensor | None = None  # those of the batch that are still in the network, once some have left
        self._left: list[tuple[Tensor, Tensor]] = []  # rows that left, and their logits
        self._said: list[Tensor] = []  # by exit, of the rows that are still there
        self._predictions: list[Tensor] = []  # by exit, of the same
        self._layers = [layer_named(root, name) for name in (*(point.layer for point in points), classifier)]
        self._handles = [
            layer.register_forward_hook(self._at(position)) for position, layer in enumerate(self._layers[:-1])
        ]
        self._handles.append(self._layers[-1].register_forward_hook(self._at_end, with_kwargs=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExitHooks":
        return self  # a copy of the network has no exits, and its layers ask who they are

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def collecting(self, what: Collected = "answers") -> Iterator[None]:
        """Let no row leave, and hear every exit.

        In eval mode the classification layer still puts out what it would: the answers of the exits that are taken.

        Args:
            what: "answers" has in `logits` what the exits answer with in eval mode, and what their heads say in
                training; "logits" has what the heads say in both. "features" has in `features` what they get.
        """
        before, self._collects = self._collects, what
        try:
            yield
        finally:
            self._collects = before
            self.logits, self.features = [], []

    @contextmanager
    def uncorrected(self) -> Iterator[None]:
        """Let exits answer without the correction."""
        before, self.correction = self.correction, None
        try:
            yield
        finally:
            self.correction = before

    @contextmanager
    def stopping_at(self, position: int) -> Iterator[None]:
        """Let a call of the network in eval mode end with `ExitReached` at an exit, whoever may leave."""
        self._stops_at = position
        try:
            with self.collecting():
                yield
        finally:
            self._stops_at = None

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

    def _at(self, position: int) -> Callable[..., Tensor | None]:
        point = self._points[position]

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if layer is not self._layers[position]:  # a copy of the network, which has no exits
                return None
            if position == 0:
                self._begin_batch()
            if self._passes:
                return None
            if self.root.training or self._collects:
                self._hear(position, output.clone() if point.written_over else output)
                return None
            if self.threshold is None or len(output) == 0 or self._straggler or wants_own_outputs():
                return None
            return self._let_go(output, position, self.threshold)

        return hook  # type: ignore[no-any-return]

    def _begin_batch(self) -> None:
        training = self.root.training
        self._passes = training and not self.detached and not torch.is_grad_enabled()
        if self._passes:
            return
        self.calls += training
        self.logits, self.features, self._left, self._said, self._predictions = [], [], [], [], []
        self._rows = self.taken = None
        self._straggler = False
        self._nearest = not training and self._heads.knows_means

    def _hear(self, position: int, features: Tensor) -> None:
        """Take down what an exit says, whoever may be sure."""
        training = self.root.training
        if self._collects == "features":
            self.features.append(self._heads.pooled(position, features))
        elif training and self.silent:
            return
        elif training and self.detached:
            with torch.enable_grad():  # the network may stand still
                self.logits.append(self._heads.say(position, features.detach(), self.logits))
        elif training or self._collects == "logits":
            self.logits.append(self._heads.say(position, features, self.logits))
        else:
            self.logits.append(self._answer(position, features))
            # an export follows calls from their beginning to their end, and drops what nobody uses
            if self._stops_at == position and not torch.compiler.is_compiling():
                raise ExitReached(self.logits[-1])

    def _answer(self, position: int, features: Tensor) -> Tensor:
        """Return what an exit answers the rows that are there."""
        if self._nearest:
            return self._corrected(self._heads.nearest_to(position, features))
        said = self._heads.say(position, features, self._said)
        self._said = [*self._said, said] if self._heads.looks_back else [said]
        return self._corrected(self._heads.answer(self._said))

    def _corrected(self, logits: Tensor) -> Tensor:
        return logits if self.correction is None else self.correction(logits)

    def _let_go(self, output: Tensor, position: int, threshold: float) -> Tensor | None:
        """Take down who leaves, and return the rows that stay; ``None`` if all do."""
        logits = self._answer(position, output)
        if self.taken is None:
            self.taken = torch.full((len(output),), len(self._points), device=output.device)
        if not self.removes_rows and self._rows is not None:
            logits = logits[self._rows]
        leaves = self._confidences(logits, position) > threshold
        leaving = leaves.nonzero().squeeze(1)
        if len(leaving) == 0:
            return None
        # a call costs more than its work where few rows are left
        everybody = len(leaving) == len(leaves)
        stays = leaving[:0] if everybody else (~leaves).nonzero().squeeze(1)
        there = self._rows
        rows, self._rows = (leaving, stays) if there is None else (there[leaving], there[stays])
        self._left.append((rows, logits if everybody else logits[leaving]))
        self.taken[rows] = position
        self._predictions = [predictions[stays] for predictions in self._predictions]
        if not self.removes_rows:
            return None
        if self._heads.looks_back:
            self._said = [said[stays] for said in self._said]
        # layers at rest know the shape of the dry run alone
        known = output.shape[1:] == self._points[position].features.shape[1:]
        self._straggler = len(stays) == 0 and (self.keeps_one or not known)
        return output[:1] if self._straggler else output[stays]

    def _confidences(self, logits: Tensor, position: int) -> Tensor:
        if self.confidence != "patience":
            return confidence_of(logits, self.confidence)
        self._predictions.append(logits.argmax(1))
        return patience_of(torch.stack(self._predictions, dim=1), len(self._layers))[:, position]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _at_end(self, layer: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> Tensor | None:
        if layer is not self._layers[-1] or self._passes:
            return None
        if self._collects == "features":
            features = first_tensor(inputs, named)
            self.features.append(self._heads.pooled(len(self._points), output if features is None else features))
            return None
        if self.root.training or self._collects == "logits":
            self.logits.append(output)
            return None
        if wants_own_outputs() and not self._collects:
            return None
        features = first_tensor(inputs, named)
        answer = self._last_answer(output, features)
        if not self._collects:
            return self._put_back(answer) if self._left else answer
        self.logits.append(answer)
        if wants_own_outputs():
            return None
        if self.threshold is not None:
            return self._taken_of_all(self.threshold).to(answer)
        self._said = []  # without a threshold exits are not asked, and the end answers alone
        return self._last_answer(output, features)

    def _taken_of_all(self, threshold: float) -> Tensor:
        """Return the answers that rows would leave with, of those of all exits."""
        logits = torch.stack(self.logits, dim=1)
        taken = first_confident(confidences_by_exit(logits, self.confidence), threshold)
        return logits[torch.arange(len(taken), device=taken.device), taken]

    def _last_answer(self, output: Tensor, features: Tensor | None) -> Tensor:
        if self._straggler:
            return output
        if self._nearest and features is not None:
            return self._corrected(self._heads.nearest_to(len(self._points), features).to(output.device))
        combines = self._heads.ensemble is not None and len(self._said) == len(self._points)
        return self._corrected(self._heads.answer([*self._said, output]) if combines else output)

    def _put_back(self, output: Tensor) -> Tensor:
        """Return the answers of all rows in their order."""
        first, logits = self._left[0]
        kind = torch.promote_types(output.dtype, logits.dtype)
        if len(first) == len(self.taken):  # type: ignore[arg-type]
            self._rows, self._left = None, []
            return logits.to(output.device, kind)
        whole = output.new_empty(len(self.taken), *output.shape[1:], dtype=kind)  # type: ignore[arg-type]
        if not self._straggler:
            whole[self._rows] = (output if self.removes_rows else output[self._rows]).to(kind)
        for rows, logits in self._left:
            whole[rows] = logits.to(whole)
        self._rows, self._left = None, []
        return whole


class ExitReached(Exception):  # noqa: N818
    """Ends a call of the network at an exit, since the layers after it are not wanted.

    Args:
        logits: The answer.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__("the call ends at an exit")
        self.logits = logits
