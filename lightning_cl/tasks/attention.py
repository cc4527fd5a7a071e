"""Where a network looks: Grad-CAM maps of a layer, and which layers have any."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.taps import ActivationTap, layer_named


def attention_maps(scores: Tensor, activation: Tensor, create_graph: bool = False) -> Tensor:
    """Return the Grad-CAM map of each sample as a vector of length 1 (arXiv 1610.02391), ``(batch, positions)``.

    A channel weighs as much as the score rises with it, and what speaks against the score is cut off. A map that has
    nothing left is zero.

    Args:
        scores: A score of each sample, ``(batch,)``.
        activation: What they were made of, ``(batch, channels, height, width)``.
        create_graph: Whether the maps can be differentiated.

    Example::

        >>> activation = torch.tensor([[[[3.0, 4.0]]]], requires_grad=True)
        >>> attention_maps(activation.sum((1, 2, 3)), activation)
        tensor([[0.6000, 0.8000]], grad_fn=<DivBackward0>)
    """
    (slopes,) = torch.autograd.grad(scores.sum(), activation, create_graph=create_graph)
    weights = slopes.float().mean((2, 3), keepdim=True)
    return F.normalize(F.relu((weights * activation.float()).sum(1)).flatten(1), dim=1)


def find_map_layer(
    pl_module: LightningModule, call: Callable[[Any], Tensor], batch: Any, head: str, layer: str | None
) -> str:
    """Return the name of the layer whose maps are looked at: the one named, or the last one that has maps.

    Such a layer puts out ``(batch, channels, height, width)`` with more than one position, before the classification
    layer, whose logits depend on it. Of layers within another one the outer comes last.

    Args:
        pl_module: The module.
        call: Calls it for logits; for use under `evaluating`.
        batch: A few real samples.
        head: Name of the classification layer.
        layer: A name, or ``None``.

    Raises:
        MisconfigurationException: If there is none, or the one that is named has no maps.
    """
    layers = {name: part for name, part in pl_module.named_modules() if name}
    with ActivationTap(layers) as tap, torch.enable_grad():
        logits = call(batch)
        slopes = torch.autograd.grad(logits.sum(), list(tap.outputs.values()), allow_unused=True)
    names = list(tap.outputs)
    before = names[: names.index(head)] if head in names else names
    reached = {name for name, slope in zip(names, slopes, strict=True) if slope is not None}
    fitting = [name for name in before if name in reached and _is_map(tap.outputs[name], len(logits))]
    if layer is None and fitting:
        return fitting[-1]
    if layer in fitting:
        return layer
    model, known = type(pl_module).__name__, ", ".join(map(repr, fitting)) or "none"
    if layer is None:
        found = f"No layer of {model} that the logits of `head={head!r}` depend on has such an output"
    elif layer not in layers:
        found = f"`layer={layer!r}` names no layer of {model}"
    elif layer not in tap.outputs:
        found = f"`layer={layer!r}` of {model} puts out no tensor for a batch"
    elif not _is_map(tap.outputs[layer], len(logits)):
        found = f"`layer={layer!r}` of {model} puts out {tuple(tap.outputs[layer].shape)}"
    else:
        found = f"The logits of `head={head!r}` of {model} do not depend on what `layer={layer!r}` puts out before it"
    raise MisconfigurationException(
        f"`layer` must name a layer with outputs (batch, channels, height, width) and more than one position. {found}."
        f" Layers that fit: {known}."
    )


def check_second_derivative(pl_module: LightningModule, call: Callable[[Any], Tensor], batch: Any, layer: str) -> None:
    """Refuse a layer whose maps cannot be differentiated.

    Args:
        pl_module: The module.
        call: Calls it for logits; for use under `evaluating`.
        batch: A few real samples.
        layer: What `find_map_layer` returned.

    Raises:
        MisconfigurationException: If what follows the layer has no second derivative.
    """
    trained = [part for part in pl_module.parameters() if part.requires_grad]
    with ActivationTap({layer: layer_named(pl_module, layer, "layer")}) as tap, torch.enable_grad():
        scores = call(batch).amax(1)
        activation = tap.outputs[layer]
        try:
            maps = attention_maps(scores, activation, create_graph=True)
            torch.autograd.grad(maps.sum(), [activation, *trained], allow_unused=True)
        except RuntimeError as error:
            raise MisconfigurationException(
                f"What follows `layer={layer!r}` in {type(pl_module).__name__} cannot be differentiated twice:"
                f" {error}. Leave it uncompiled, or name a later layer with `layer=...`."
            ) from None


def _is_map(output: Tensor, rows: int) -> bool:
    return output.ndim == 4 and len(output) == rows and output.shape[2] * output.shape[3] > 1
