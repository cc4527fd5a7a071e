"""Train exit heads beside the network, or one of them while the other stands still."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cl.exits import ExitHooks, ExitNetwork
from lightning_cl.tasks.added_loss import with_loss
from lightning_cl.tasks.batches import BatchStructure, as_labels
from lightning_cl.tasks.exit_phases import Phase, PhasePlan, depth_weights

LossWeights = Literal["uniform", "sdn"] | list[float]


class ExitTraining:
    """What is trained, phase by phase, and the loss of the exits.

    What a phase does not train keeps every bit: it has no gradient when the optimizer steps, since weight decay and
    momentum would move it else. A network that stands still is in eval mode and is called without gradients.

    Args:
        plan: The phases.
        loss_weights: Of the exits' losses and the network's own.
        network: The exits, on a module.

    Attributes:
        phase: The current one.
    """

    def __init__(self, plan: PhasePlan, loss_weights: LossWeights, network: ExitNetwork) -> None:
        exits = len(network.heads)
        if not isinstance(loss_weights, str) and len(loss_weights) != exits + 1:
            raise MisconfigurationException(
                f"`loss_weights` must have {exits + 1} numbers, one for each of {exits} exits and one for the network's"
                f" own head, got {len(loss_weights)}."
            )
        self.phase: Phase = plan.phases[0]
        self._plan = plan
        self._loss_weights = loss_weights
        self._heads = network.heads
        self._modes: dict[nn.Module, bool] = {}
        self._epoch, self._planned = 0, 1

    def enter(self, pl_module: LightningModule, hooks: ExitHooks, epoch: int, planned: int) -> None:
        """Begin an epoch of a task of which so many are planned, or go on in it."""
        self._epoch, self._planned = epoch, planned
        self.phase = self._plan.phase(epoch, planned)
        hooks.silent = self.phase == "network"
        hooks.detached = self.phase == "heads"
        if self.phase != "heads":
            self.wake()
        elif not self._modes:
            heads = set(self._heads.modules())
            network = [module for module in pl_module.modules() if module is not pl_module and module not in heads]
            self._modes = {module: module.training for module in network}
            for module in network:
                module.training = False

    def wake(self) -> None:
        """Put the network's layers back into the modes that they had before it stood still."""
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}

    def step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        hooks: ExitHooks,
        structure: BatchStructure,
        batch: Any,
        step: Callable[[Any], Any],
    ) -> Any:
        """Call the module's training step on a batch, and return what it returned with the loss of the phase."""
        if self.phase == "network":
            return with_loss(step(batch), partial(_found_by_ddp, trainer, self._heads.parameters()))
        for module in self._modes:  # the module's own hooks may have set it to train
            module.training = False
        hooks.begin_step()
        with torch.no_grad() if self.phase == "heads" else nullcontext():
            outputs = step(batch)
        if not isinstance(outputs.get("loss") if isinstance(outputs, dict) else outputs, Tensor):
            return outputs  # the module skips this batch
        logits = hooks.logits[:-1]
        targets = as_labels(structure.find_targets(batch))
        # on a network that stands still all calls are without gradients, and the last one counts
        if not logits or len(logits[0]) != len(targets) or (hooks.calls > 1 and self.phase != "heads"):
            rows = len(logits[0]) if logits else "no"
            raise ValueError(
                f"The exits of EarlyExits saw {rows} rows in {hooks.calls} calls in a step of {len(targets)} samples."
                " `training_step` must call the network once with gradients, with a row for each sample of its batch."
            )
        *weights, own_weight = self._weights(len(logits))

        def change(own: Tensor) -> Tensor:
            reduction = "mean" if own.numel() == 1 else "none"
            losses = [F.cross_entropy(rows, targets, reduction=reduction) for rows in logits]
            added = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum(0)
            pl_module.log("loss/early_exits", added.detach().mean(), batch_size=1)
            if self.phase == "heads":
                return _found_by_ddp(trainer, pl_module.parameters(), added)
            return own_weight * own + added

        return with_loss(outputs, change)

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Take the gradients of what the phase does not train from an optimizer that is about to step."""
        if self.phase == "all":
            return
        heads = {id(parameter) for parameter in self._heads.parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (id(parameter) in heads) == (self.phase == "network"):
                    parameter.grad = None

    def join(self, optimizer: Optimizer) -> None:
        """Let heads that an optimizer was not made with join its first group, where schedulers reach them.

        LightningCLI makes its ``--optimizer`` before there are heads, and a module may train its own network by name.
        """
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        optimizer.param_groups[0]["params"] += [p for p in self._heads.parameters() if id(p) not in trained]

    def _weights(self, exits: int) -> list[float]:
        if self._loss_weights == "sdn":
            return depth_weights(exits, self._epoch, self._planned)
        if self._loss_weights == "uniform":
            return [1 / (exits + (self.phase != "heads"))] * (exits + 1)
        return list(self._loss_weights)


def _found_by_ddp(trainer: Trainer, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Return the same loss as a function of some parameters, as DDP wants it of all that need gradients."""
    if trainer.world_size == 1:
        return loss
    return loss + sum(0 * parameter.sum() for parameter in parameters if parameter.requires_grad)
