"""Exits inside the network: heads that are trained with it, and samples that leave early."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.exits import ExitHooks, ExitNetwork
from lightning_cl.exits.network import ATTRIBUTE
from lightning_cl.heads.exit_heads import ExitHeadKind
from lightning_cl.heads.exit_rules import Confidence
from lightning_cl.taps import find_head
from lightning_cl.tasks import ContinualCallback, TaskClock
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.evaluation import held_still, sample_batches
from lightning_cl.tasks.exit_phases import Phase, PhasePlan, Regime, depth_weights
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.overrides import InstanceOverrides
from lightning_cl.tasks.stream import ReplayStream

LossWeights = Literal["uniform", "sdn"] | list[float]

_TRIED = 8  # samples of the dry run


class EarlyExits(ContinualCallback):
    """Train exit heads inside a network, and let samples leave where a head is sure (arXiv 2407.14320).

    The heads are built from a dry run and are part of the module during a Trainer call: its optimizer, DDP and
    checkpoints have them, under ``early_exits``. In eval mode, with a `threshold`, a sample that a head is sure of
    leaves the batch at its layer, so that the layers after it compute the others alone; what the module's own forward,
    validation and prediction see is the batch in its order.

    Args:
        layers: Names of the layers with exits, or patterns as in ``layer?``.
        regime: "joint" trains network and heads together; "mixed" the network alone in the first half of each task;
            "disjoint" the network alone, and then the heads alone on a network that stands still.
        head: "pool", "conv" or "linear", or a module of your own that is copied for each exit.
        loss_weights: Of the exits' losses: all alike, growing with depth and epochs ("sdn"), or one number for each
            exit and one for the network's own.
        phase_epochs: Epochs of the regime's phases in each task; halves of the task if ``None``.
        threshold: How sure a head must be, from 0 to 1, for a sample to leave. ``None`` lets all go to the end.
        confidence: What sure is: the largest probability, a low entropy, or predictions that repeat ("patience").
        classifier: Name of the classification layer; found by its number of outputs if ``None``.

    Example::

        >>> EarlyExits(["layer1", "layer2"], regime="joint", threshold=0.9).threshold
        0.9
    """

    acts_innermost = True  # replay may give the module other rows

    def __init__(
        self,
        layers: list[str],
        regime: Regime = "mixed",
        head: ExitHeadKind | nn.Module = "pool",
        loss_weights: LossWeights = "uniform",
        phase_epochs: list[int] | None = None,
        threshold: float | None = None,
        confidence: Confidence = "max_softmax",
        classifier: str | None = None,
    ) -> None:
        if isinstance(layers, str) or not layers:
            raise ValueError(f"`layers` must be a list of layer names, got {layers!r}.")
        check_choice("regime", regime, ("disjoint", "joint", "mixed"))
        if not isinstance(head, nn.Module):
            check_choice("head", head, ("pool", "conv", "linear"))
        if isinstance(loss_weights, str):
            check_choice("loss_weights", loss_weights, ("uniform", "sdn"))
        elif any(weight < 0 for weight in loss_weights):
            raise ValueError(f"`loss_weights` must be 0 or more, got {loss_weights}.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be from 0 to 1, got {threshold}.")
        check_choice("confidence", confidence, ("max_softmax", "entropy", "patience"))
        self.layers = layers
        self.head = head
        self.loss_weights = loss_weights
        self.plan = PhasePlan(regime, phase_epochs)
        self.threshold = threshold
        self.confidence: Confidence = confidence
        self.classifier = classifier
        self.network: ExitNetwork | None = None
        self._answers = False  # once heads have been trained
        self._overrides = InstanceOverrides()
        self._phase: Phase = "all"
        self._clock: TaskClock | None = None
        self._stream: ReplayStream | None = None
        self._modes: dict[nn.Module, bool] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._take_off()
        if stage == "fit":
            self._check(trainer, pl_module)

        def build() -> None:
            if stage == "fit":
                self._build(trainer, pl_module)
            elif self.network is not None:
                self._put_on(pl_module)

        def setup(original: Callable[..., None], *args: Any, **named: Any) -> None:
            original(*args, **named)
            if not is_overridden("configure_model", pl_module):
                build()

        def configure_model(original: Callable[[], None]) -> None:
            original()
            if self.network is None or self.network.hooks is None:  # it may be called again
                build()

        # a module may build its layers in either
        self._overrides.wrap(pl_module, "setup", setup)
        self._overrides.wrap(pl_module, "configure_model", configure_model)
        self._overrides.wrap(pl_module, "on_load_checkpoint", partial(self._before_load, pl_module))

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clock = TaskClock.of(trainer)
        if clock is None or not isinstance(clock.stream, ReplayStream):
            raise MisconfigurationException(
                "EarlyExits tries the module on training data before it is set up, and this fit has no tasks. Wrap your"
                " DataModule in a task sequence: `Joint(your_datamodule)` is one of a single task."
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"EarlyExits adds the losses of its heads to that of `training_step`, and {type(pl_module).__name__}"
                " optimises manually. Use automatic optimisation."
            )
        for task in clock.stream.tasks:
            self.plan.check(task.index, clock.limits.epochs(task.index))
        self._clock, self._stream = clock, clock.stream
        self.network, self._answers = None, False

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = self.stream
        task = stream.current_task.index
        try:
            stream.check_labels(task)
            classifier = find_head(pl_module, stream.num_classes, self.classifier)
            with held_still(trainer, pl_module):
                few = torch.arange(min(_TRIED, stream.samples_of(task) or 0))
                _, batch = next(sample_batches(trainer, pl_module, stream, task, few, every_rank=True))
                # the module is where its layers were made, and has not been converted yet
                batch = apply_to_collection(batch, Tensor, lambda tensor: _as_in(tensor, pl_module))
                call = ModuleCall.find(pl_module, batch, stream.structure, stream.num_classes, head=classifier)
                rows = len(as_labels(stream.structure.find_targets(batch)))
                run = partial(call, batch)
                self.network = ExitNetwork.find(pl_module, self.layers, classifier, run, rows, self.head)
        except ValueError as error:
            raise MisconfigurationException(f"EarlyExits: {error}") from None
        exits = len(self.network.heads)
        if self.confidence == "patience" and exits < 2:
            raise MisconfigurationException(
                "`confidence='patience'` waits for predictions that repeat and needs at least 2 exits, got 1."
            )
        if not isinstance(self.loss_weights, str) and len(self.loss_weights) != exits + 1:
            raise MisconfigurationException(
                f"`loss_weights` must have {exits + 1} numbers, one for each of {exits} exits and one for the network's"
                f" own head, got {len(self.loss_weights)}."
            )
        self._put_on(pl_module)

    def _put_on(self, pl_module: LightningModule) -> None:
        if self.network is None:
            return
        if hasattr(pl_module, ATTRIBUTE):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has an attribute {ATTRIBUTE!r} already, which is where EarlyExits puts its"
                " heads. Rename it."
            )
        self.network.attach(pl_module)
        self.hooks.confidence = self.confidence
        self.hooks.threshold = self.threshold if self._answers else None
        if self.threshold is not None and self.network.mixing_layer is not None:
            rank_zero_warn(
                f"Samples cannot leave the batch at {self.network.mixing_layer!r}: what the network makes of the others"
                " depends on them. They take the answers of their exits, but go all the way, so nothing is saved."
            )

    def _before_load(
        self, pl_module: LightningModule, original: Callable[..., None], checkpoint: dict[str, Any]
    ) -> None:
        """Make the heads of a checkpoint before its weights are loaded."""
        original(checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            if self.network is not None and "callbacks" in checkpoint:
                raise MisconfigurationException(
                    "The checkpoint is of a run without EarlyExits: it holds no exit heads. Take the callback out, or"
                    " start from the module's weights alone."
                )
            return
        if self.network is None:
            self.network = ExitNetwork(state["spec"], self.head)
            self._answers = state["answers"]
            self._put_on(pl_module)
        elif self.network.spec["layers"] != state["spec"]["layers"]:
            raise MisconfigurationException(
                f"The checkpoint has exits at {state['spec']['layers']}, this EarlyExits at"
                f" {self.network.spec['layers']}. Use the same `layers`."
            )
        for name, tensor in state["heads"].items():
            checkpoint["state_dict"].setdefault(f"{ATTRIBUTE}.{name}", tensor)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        if any(id(parameter) not in trained for parameter in self.heads.parameters()):
            raise MisconfigurationException(
                f"`configure_optimizers` leaves out the exit heads, which are in {ATTRIBUTE!r} of the module. Build the"
                " optimizer from `self.parameters()`."
            )
        self._enter_phase(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter_phase(pl_module)

    def _enter_phase(self, pl_module: LightningModule) -> None:
        self._phase = self.plan.phase(self.clock.progress.epochs, self.clock.planned_epochs)
        self.hooks.silent = self._phase == "network"
        self.hooks.detached = self._phase == "heads"
        if self._phase != "network":
            self._answers = True
            self.hooks.threshold = self.threshold
        if self._phase != "heads":
            self._wake()
        elif not self._modes:
            heads = set(self.heads.modules())
            still = [module for module in pl_module.modules() if module is not pl_module and module not in heads]
            self._modes = {module: module.training for module in still}
            for module in still:
                module.training = False

    def _wake(self) -> None:
        """Put the network's layers back into the modes that they had before it stood still."""
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        if self._phase == "network":
            return _with_loss(step(batch), partial(_tied_to, self.heads, trainer))
        with torch.no_grad() if self._phase == "heads" else nullcontext():
            outputs = step(batch)
        logits = self.hooks.logits[:-1]
        targets = as_labels(self.stream.structure.find_targets(batch))
        if not logits or len(logits[0]) != len(targets):
            raise ValueError(
                f"The exits of EarlyExits saw {len(logits[0]) if logits else 'no'} rows in a step of {len(targets)}"
                " samples. `training_step` must call the network once, with a row for each sample of its batch."
            )
        weights = self._weights(len(logits))

        def add(own: Tensor) -> Tensor:
            reduction = "mean" if own.numel() == 1 else "none"
            losses = [F.cross_entropy(exit_, targets, reduction=reduction) for exit_ in logits]
            added = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=False)]).sum(0)
            pl_module.log("loss/early_exits", added.detach().mean(), batch_size=1)
            if self._phase == "heads":
                network = [p for p in pl_module.parameters() if p.requires_grad]
                return _tied_to(network, trainer, added)
            return weights[-1] * own + added

        return _with_loss(outputs, add)

    def _weights(self, exits: int) -> list[float]:
        if self.loss_weights == "sdn":
            return depth_weights(exits, self.clock.progress.epochs, self.clock.planned_epochs)
        if self.loss_weights == "uniform":
            heads = exits + (self._phase != "heads")
            return [1 / heads] * (exits + 1)
        return list(self.loss_weights)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let what the phase does not train have no gradient: weight decay and momentum would move it else."""
        if self._phase == "all":
            return
        heads = {id(parameter) for parameter in self.heads.parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (id(parameter) in heads) == (self._phase == "network"):
                    parameter.grad = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wake()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._take_off()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_off()

    def _take_off(self) -> None:
        self._wake()
        self._overrides.undo()
        if self.network is not None:
            self.network.detach()
        self._stream = self._clock = None

    @property
    def stream(self) -> ReplayStream:
        """The tasks of the running fit."""
        if self._stream is None:
            raise RuntimeError("EarlyExits was asked outside a fit.")
        return self._stream

    @property
    def clock(self) -> TaskClock:
        """The clock of the running fit."""
        if self._clock is None:
            raise RuntimeError("EarlyExits was asked outside a fit.")
        return self._clock

    @property
    def heads(self) -> nn.ModuleList:
        """The exit heads, in the order in which a sample meets them."""
        if self.network is None:
            raise RuntimeError("EarlyExits has no heads before a fit.")
        return self.network.heads

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
        heads = {} if self.network.hooks is not None else self.heads.state_dict()
        return {
            "spec": copy.deepcopy(self.network.spec),
            "answers": self._answers,
            "heads": {name: tensor.cpu().clone() for name, tensor in heads.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.network is None:
            return
        self._answers = state_dict["answers"]
        if self.network.hooks is not None:
            self.hooks.threshold = self.threshold if self._answers else None


def _as_in(tensor: Tensor, pl_module: LightningModule) -> Tensor:
    dtype = pl_module.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=pl_module.device, dtype=dtype)  # type: ignore[arg-type]


def _with_loss(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the loss in what a training step returned; one that skips its batch returned nothing."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
        return {**outputs, "loss": change(outputs["loss"])}
    return outputs


def _tied_to(parameters: nn.Module | Sequence[nn.Parameter], trainer: Trainer, loss: Tensor) -> Tensor:
    """Return a loss of the same value that DDP finds these parameters in, which have no part in it."""
    if trainer.world_size == 1:
        return loss
    found = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    return loss + sum(0 * parameter.sum() for parameter in found)
