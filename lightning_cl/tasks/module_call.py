"""Find out, once, how to get class scores for a batch from a module that nobody asked to know us."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_cl.heads import pool_positions
from lightning_cl.taps import LayerTap, layer_named, linear_layers, list_layers
from lightning_cl.tasks.batches import BatchStructure, as_labels, describe

Call = Callable[[Any], Any]


class ModuleCall:
    """Call a module for logits.

    Made by `find`, which tries the ways in which modules are called on a real batch and takes the first that gives one
    row of scores for each sample: in what the call returns (after masks and corrections of the module's own, and with
    whatever head is then active), else in the output of the classification layer.

    Args:
        call: Calls the module on a batch.
        module: The module.
        head: Name of the layer to read the logits from; ``None`` to take what the call returns.
    """

    def __init__(self, call: Call, module: nn.Module, head: str | None) -> None:
        self._call = call
        self._module = module
        self._head = head

    def __call__(self, batch: Any) -> Tensor:
        """Return the logits ``(batch, classes)`` of a batch that is on the module's device."""
        if self._head is None:
            return _scores(self._call(batch))  # type: ignore[return-value]
        # by name: a module may put a new layer in the place of the old one
        with LayerTap({self._head: layer_named(self._module, self._head)}) as tap:
            self._call(batch)
        return pool_positions(tap.outputs[self._head])

    @classmethod
    def find(
        cls,
        pl_module: LightningModule,
        batch: Any,
        structure: BatchStructure,
        num_outputs: int | None = None,
        head: str | None = None,
        differentiable: bool = False,
    ) -> "ModuleCall":
        """Find out how to call a module, by dry runs; for use under `evaluating`.

        Args:
            pl_module: The module.
            batch: A real batch on its device.
            structure: Where a batch has inputs and targets.
            num_outputs: How many logits the labels need; taken from the batch if unknown.
            head: Name of the classification layer; found by its number of outputs if ``None``.
            differentiable: Whether gradients are wanted, which ``predict_step`` need not give.

        Raises:
            MisconfigurationException: If no way of calling gives class scores, saying what was tried.
        """
        labels = as_labels(structure.find_targets(batch))
        needed = int(labels.max()) + 1
        layers: Mapping[str, nn.Module] = linear_layers(pl_module)
        if head is not None:
            layers = {head: layer_named(pl_module, head)}
        tried = []
        if differentiable and is_overridden("predict_step", pl_module):
            tried.append("predict_step: left out, since it need not give gradients; `forward` must return logits")
        for name, call in ways_to_call(pl_module, batch, structure, differentiable):
            with LayerTap(dict(layers)) as tap:
                try:
                    result = _scores(call(batch))
                except Exception as error:
                    tried.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                    continue
            outputs = {name: pool_positions(output) for name, output in tap.outputs.items()}
            rows = {n: out for n, out in outputs.items() if out.ndim == 2 and len(out) == len(labels)}
            if head is not None:
                exact = [head] if head in rows else []
            else:
                exact = [n for n, out in rows.items() if out.shape[1] == num_outputs]
            if head is None and result is not None and _gives_scores(result, rows, labels, num_outputs, needed):
                return cls(call, pl_module, None)
            if len(exact) == 1:
                _check_width(exact[0], rows[exact[0]], needed if num_outputs is None else num_outputs)
                return cls(call, pl_module, exact[0])
            tried.append(f"{name}: no class scores ({describe(result) if result is not None else 'no tensor'})")
        wanted = num_outputs or needed
        raise MisconfigurationException(
            f"Cannot find out how {type(pl_module).__name__} gives class scores for a batch {describe(batch)}"
            f" with labels up to {wanted - 1}, which need {wanted} outputs. Tried: {'; '.join(tried)}. Linear layers:"
            f" {list_layers(linear_layers(pl_module).items())}. Name the classification layer with `head=...` on the"
            " callback, and the inputs with `inputs=...` on the task sequence."
        )


def ways_to_call(
    pl_module: LightningModule, batch: Any, structure: BatchStructure, differentiable: bool = False
) -> Iterator[tuple[str, Call]]:
    """Yield the ways in which modules are called on a batch, the likeliest first, each with its name."""
    if structure.inputs is None:
        if is_overridden("predict_step", pl_module) and not differentiable:
            yield "predict_step(batch, batch_idx)", lambda b: pl_module.predict_step(b, 0)
        yield "forward(batch)", lambda b: pl_module.forward(b)
    yield "forward(inputs)", lambda b: pl_module.forward(structure.find_inputs(b))
    if structure.inputs is None and isinstance(batch, Mapping):
        yield "forward(**batch without targets)", lambda b: pl_module.forward(**structure.without_targets(b))
        yield "forward(**batch)", lambda b: pl_module.forward(**b)


def _scores(output: Any) -> Tensor | None:
    """Return the tensor that holds scores in what a call returned: itself, its ``logits``, or its first entry."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _gives_scores(
    result: Tensor, rows: Mapping[str, Tensor], labels: Tensor, num_outputs: int | None, needed: int
) -> bool:
    if result.ndim != 2 or len(result) != len(labels) or not result.is_floating_point():
        return False
    if num_outputs is not None and result.shape[1] == num_outputs:
        return True
    # a wider head than the labels need: then it must be what a linear layer put out, not some features
    return result.shape[1] >= (num_outputs or needed) and any(result is out for out in rows.values())


def _check_width(name: str, output: Tensor, needed: int) -> None:
    if output.shape[1] < needed:
        raise MisconfigurationException(
            f"Labels go up to {needed - 1}, outside the head: `head={name!r}` has {output.shape[1]} outputs."
            f" Give the module {needed} outputs; labels are never renumbered."
        )
