"""What a callback does that puts exits into a module for the time of a Trainer call."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.exits import ExitHeads, ExitHooks, ExitNetwork
from lightning_cl.heads.exit_heads import ExitHeadKind
from lightning_cl.heads.exit_rules import Confidence
from lightning_cl.taps import EXITS, own_outputs
from lightning_cl.tasks import compat
from lightning_cl.tasks.callback import ContinualCallback
from lightning_cl.tasks.overrides import InstanceOverrides

AddedLosses = Literal["last_head", "all_exits"]

_FIXED = ("layers", "head", "ensemble", "widths", "num_classes")  # what must be the same in a run that goes on


class ExitCallback(ContinualCallback):
    """Base class of callbacks that put exits into a module.

    The heads are built as soon as the module has its layers, so that its optimizer, DDP and checkpoints have them, and
    come off at the end of each Trainer call.

    Args:
        head: The kind of head, or a module to copy.
        confidence: How sure a head is.
        losses: Which heads the losses of other callbacks are for.

    Attributes:
        network: The exits; ``None`` before a fit.
    """

    acts_innermost = True  # replay may give the module other rows
    commits_late = True  # prototypes may be means of what the memory holds

    def __init__(self, head: ExitHeadKind | nn.Module, confidence: Confidence, losses: AddedLosses) -> None:
        if not isinstance(head, nn.Module):
            check_choice("head", head, ("pool", "conv", "linear"))
        check_choice("confidence", confidence, ("max_softmax", "entropy", "patience"))
        check_choice("losses", losses, ("last_head", "all_exits"))
        self.head = head
        self.confidence: Confidence = confidence
        self.losses: AddedLosses = losses
        self.network: ExitNetwork | None = None
        self._overrides = InstanceOverrides()

    def begin_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit that cannot train exits."""

    def build(self, trainer: Trainer, pl_module: LightningModule) -> ExitNetwork:
        """Return the exits of a module that is about to be fitted."""
        raise NotImplementedError

    def set_hooks(self, hooks: ExitHooks) -> None:
        """Let the exits answer as they should now."""
        raise NotImplementedError

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.take_off()
        if isinstance(getattr(pl_module, EXITS, None), ExitHeads):
            raise MisconfigurationException(
                f"This {type(pl_module).__name__} has exits already, from `lightning_cl.load`. Give the Trainer one"
                " without them, and the checkpoint as `ckpt_path`."
            )
        if stage == "fit":
            self.network = None
            self.begin_fit(trainer, pl_module)

        def put_on() -> None:
            if stage == "fit":
                self.network = self.build(trainer, pl_module)
            if self.network is not None:
                self._put_on(pl_module, self.network)

        def setup(original: Callable[..., None], *args: Any, **named: Any) -> None:
            original(*args, **named)
            if not is_overridden("configure_model", pl_module):
                put_on()

        def configure_model(original: Callable[[], None]) -> None:
            original()
            if self.network is None or self.network.hooks is None:  # it may be called again
                put_on()

        # a module may build its layers in either
        self._overrides.wrap(pl_module, "setup", setup)
        self._overrides.wrap(pl_module, "configure_model", configure_model)
        self._overrides.wrap(pl_module, "on_load_checkpoint", partial(self._before_load, pl_module))

    def _put_on(self, pl_module: LightningModule, network: ExitNetwork) -> None:
        if hasattr(pl_module, EXITS):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has an attribute {EXITS!r} already, which is where EarlyExits puts its"
                " heads. Rename it."
            )
        try:
            hooks = network.attach(pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"EarlyExits: {error}") from None
        hooks.confidence = self.confidence
        self.set_hooks(hooks)
        if self.lets_samples_leave and network.mixing_layer is not None:
            rank_zero_warn(
                f"Samples cannot leave the batch at {network.mixing_layer!r}: what the network makes of the others"
                " depends on them. They take the answers of their exits, but go all the way, so nothing is saved."
            )

    @property
    def lets_samples_leave(self) -> bool:
        """Whether samples may leave in eval mode."""
        raise NotImplementedError

    def _before_load(
        self, pl_module: LightningModule, original: Callable[..., None], checkpoint: dict[str, Any]
    ) -> None:
        """Make the heads of a checkpoint before its weights are loaded."""
        original(checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state:
            self._refuse_without_state(checkpoint)
            return
        spec = state["spec"]
        if self.network is None:
            self.network = ExitNetwork(spec, self.head)
            self.load_state_dict(state)
            self._put_on(pl_module, self.network)
        else:
            for name in _FIXED:
                if self.network.spec[name] != spec[name]:
                    raise MisconfigurationException(
                        f"The checkpoint has exits with {name}={spec[name]}, this EarlyExits with"
                        f" {name}={self.network.spec[name]}. Use the same arguments."
                    )
        for name, tensor in state["heads"].items():
            checkpoint["state_dict"].setdefault(f"{EXITS}.{name}", tensor)

    def _refuse_without_state(self, checkpoint: dict[str, Any]) -> None:
        if self.network is not None and "callbacks" in checkpoint:
            raise MisconfigurationException(
                "The checkpoint is of a run without EarlyExits: it holds no exit heads. Take the callback out, or"
                " start from the module's weights alone."
            )
        if self.network is None and any(name.startswith(f"{EXITS}.") for name in checkpoint["state_dict"]):
            raise MisconfigurationException(
                "The checkpoint has the weights of exits but not the callbacks that say where they stand. Save with"
                " `save_weights_only=False`."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.take_off()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.take_off()

    def take_off(self) -> None:
        """Take everything off the module."""
        self._overrides.undo()
        if self.network is not None:
            self.network.detach()

    @property
    def found(self) -> ExitNetwork:
        """The exits of the module that was fitted."""
        if self.network is None:
            raise RuntimeError("EarlyExits has no heads before a fit.")
        return self.network

    @property
    def heads(self) -> nn.ModuleList:
        """The exit heads, in the order in which a sample meets them."""
        return self.found.heads.heads

    @property
    def hooks(self) -> ExitHooks:
        """What lets the heads answer, during a Trainer call."""
        if self.network is None or self.network.hooks is None:
            raise RuntimeError("EarlyExits was asked outside a Trainer call.")
        return self.network.hooks

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.network is None:
            return {}
        # during a fit the module's own weights hold those of the heads
        heads = {} if self.network.hooks is not None else self.network.heads.state_dict()
        return {
            "spec": copy.deepcopy(self.network.spec),
            "confidence": self.confidence,
            "heads": {name: tensor.cpu().clone() for name, tensor in heads.items()},
        }


def exits_of(trainer: Trainer) -> ExitCallback | None:
    """Return the callback that has put exits on the module."""
    return next((c for c in compat.callbacks_of(trainer) if isinstance(c, ExitCallback)), None)


def logits_by_head(trainer: Trainer, call: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """Call a module for the logits that the losses of callbacks are for.

    Args:
        trainer: The Trainer.
        call: Calls the module for its own logits.
        batch: The batch.

    Returns:
        Of shape ``(batch, heads, classes)``: of every exit and last the classification layer where `EarlyExits` has
        ``losses="all_exits"``, else of the layer alone. While the network is trained alone, so are its losses.
    """
    exits = exits_of(trainer)
    with own_outputs():
        if exits is None or exits.losses == "last_head":
            return call(batch)[:, None]
        with exits.hooks.collecting("logits"):
            # a network that stands still needs no gradient; its heads see to theirs
            with torch.no_grad() if exits.hooks.detached else nullcontext():
                call(batch)
            return torch.stack(exits.hooks.logits, dim=1)
