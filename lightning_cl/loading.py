"""A module out of a checkpoint, with the head that its run learnt."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_cl.callbacks import EarlyExits
from lightning_cl.exits import ExitNetwork
from lightning_cl.taps import EXITS
from lightning_cl.tasks.exit_evaluation import ExitRecord
from lightning_cl.tasks.head import HeadCallback

Module = TypeVar("Module", bound=LightningModule)


def load(checkpoint: str | Path, module_class: type[Module], weights_only: bool = True, **arguments: Any) -> Module:
    """Return a module that predicts as the run of a checkpoint did at its end, without a Trainer.

    A head that stood in for the classification layer, such as that of `NearestMeanClassifier`, takes the layer's place
    in the module, so that ``predict_step``, TorchScript and ONNX export use it. The exits of `EarlyExits` are in the
    module's ``early_exits``, and samples leave there as they did in the run.

    Args:
        checkpoint: A checkpoint of a fit.
        module_class: The class of its module.
        weights_only: Whether the file is read as plain data; say False for a checkpoint of your own that holds objects.
        **arguments: Of the module's constructor, where the module did not save its hyperparameters.

    Returns:
        The module on the CPU, in eval mode.

    Example::

        module = lightning_cl.load("last.ckpt", MyModule)
        scores = module(images)
    """
    trusted: dict[str, Any] = {} if weights_only else {"weights_only": False}
    content = torch.load(checkpoint, map_location="cpu", weights_only=weights_only)
    exits = {name: tensor for name, tensor in content["state_dict"].items() if name.startswith(f"{EXITS}.")}
    source: Any = _without(content, exits) if exits else checkpoint
    module = module_class.load_from_checkpoint(source, map_location="cpu", **trusted, **arguments)
    states = content.get("callbacks")
    if states is None:
        rank_zero_warn(
            "The checkpoint holds weights only, so a head that the run learnt is not in it and the classification layer"
            " answers. Save with `save_weights_only=False`."
        )
        states = {}
    for kind in _subclasses(HeadCallback):
        state = states.get(kind.__qualname__)
        head = None if state is None else kind.build(state)
        if head is not None:
            _replace(module, module.get_submodule(state["layer"]), head)
    if states.get(EarlyExits.__qualname__):
        _attach_exits(module, states[EarlyExits.__qualname__], exits)
    return module.eval()


def _without(content: dict[str, Any], names: dict[str, Any]) -> io.BytesIO:
    """Return a checkpoint that has no weights of these names."""
    kept = {name: tensor for name, tensor in content["state_dict"].items() if name not in names}
    file = io.BytesIO()
    torch.save({**content, "state_dict": kept}, file)
    file.seek(0)
    return file


def _attach_exits(module: nn.Module, state: dict[str, Any], saved: dict[str, Any]) -> None:
    spec = state["spec"]
    if spec["head"] is None:
        raise ValueError(
            "The checkpoint has exit heads of the user's own class, which it does not hold. Predict with"
            " `trainer.predict(module, ckpt_path=...)` and an EarlyExits that has the same `head`."
        )
    network = ExitNetwork(spec, spec["head"])
    weights = {name.removeprefix(f"{EXITS}."): tensor for name, tensor in saved.items()}
    network.heads.load_state_dict(weights or state["heads"])
    classifier = next(module.get_submodule(spec["classifier"]).parameters())
    network.heads.to_type_of(classifier)  # the module may be made in another precision than it was trained in
    hooks = network.attach(module)
    record = ExitRecord()
    record.load_state_dict(state["record"])
    hooks.threshold, hooks.confidence, hooks.correction = state["threshold"], state["confidence"], record.corrects


def _replace(module: nn.Module, layer: nn.Module, head: nn.Module) -> None:
    """Put a head wherever a layer stands: a module may know it by several names."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # `named_children` leaves out second names
            if child is layer:
                setattr(parent, name, head)


def _subclasses(kind: type[HeadCallback]) -> Iterator[type[HeadCallback]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
