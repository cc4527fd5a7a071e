"""Train exit heads beside the network, or one of them while the other stands still."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cl.exits import ExitHooks, ExitNetwork
from lightning_cl.tasks.added_loss import with_loss
from lightning_cl.tasks.batches import BatchStructure, as_labels
from lightning_cl.tasks.exit_losses import ExitLosses, ensemble_loss
from lightning_cl.tasks.exit_phases import Phase, PhasePlan
from lightning_cl.tasks.standing_still import drop_gradients


class ExitTraining:
    """What is trained, phase by phase, and the loss of the exits.

    What a phase does not train keeps every bit: it has no gradient when the optimizer steps, since weight decay and
    momentum would move it else. A network that stands still is in eval mode and is called without gradients.

    Args:
        plan: The phases.
        losses: Of the exits.
        network: The exits, on a module.

    Attributes:
        phase: The current one.
    """

    def __init__(self, plan: PhasePlan, losses: ExitLosses, network: ExitNetwork) -> None:
        losses.check(len(network.heads.heads))
        self.phase: Phase = plan.phases[0]
        self._plan = plan
        self._losses = losses
        self._heads = network.heads
        self._modes: dict[nn.Module, bool] = {}
        self._epoch, self._planned = 0, 1

    def enter(self, pl_module: LightningModule, hooks: ExitHooks, epoch: int, planned: int) -> None:
        """Begin an epoch of a task of which so many are planned, or go on in it."""
        if epoch == 0:
            self._plan.begin_task()
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
        logits, hooks.logits = hooks.logits, []  # they hold the graph of the step
        if not isinstance(outputs.get("loss") if isinstance(outputs, dict) else outputs, Tensor):
            return outputs  # the module skips this batch
        targets = as_labels(structure.find_targets(batch))
        # on a network that stands still all calls are without gradients, and the last one counts
        once = hooks.calls == 1 or self.phase == "heads"
        if len(logits) < hooks.count or len(logits[0]) != len(targets) or not once:
            rows = len(logits[0]) if logits else "no"
            raise ValueError(
                f"The exits of EarlyExits saw {rows} rows in {hooks.calls} calls in a step of {len(targets)} samples."
                " `training_step` must call the network once with gradients, with a row for each sample of its batch."
            )
        heads_alone = self.phase == "heads"
        *weights, own_weight = self._losses.weights_of(len(logits) - 1, self._epoch, self._planned, heads_alone)

        def change(own: Tensor) -> Tensor:
            by_row = own.numel() > 1
            added = self._losses.of_exits(logits, targets, weights, by_row)
            if self._heads.ensemble is not None:
                added = added + ensemble_loss(self._heads, logits, targets, by_row)
            pl_module.log("loss/early_exits", added.detach().mean(), batch_size=1)
            if heads_alone:
                return _found_by_ddp(trainer, pl_module.parameters(), added)
            return own_weight * own + added

        return with_loss(outputs, change)

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Take the gradients of what the phase does not train from an optimizer that is about to step."""
        if self.phase == "all":
            return
        heads = {id(parameter) for parameter in self._heads.parameters()}
        drop_gradients(optimizer, lambda parameter: (id(parameter) in heads) == (self.phase == "network"))

    def join(self, optimizer: Optimizer) -> None:
        """Let heads that an optimizer was not made with join its first group, where schedulers reach them.

        LightningCLI makes its ``--optimizer`` before there are heads, and a module may train its own network by name.
        """
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        optimizer.param_groups[0]["params"] += [p for p in self._heads.parameters() if id(p) not in trained]


def _found_by_ddp(trainer: Trainer, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Return the same loss as a function of some parameters, as DDP wants it of all that need gradients."""
    if trainer.world_size == 1:
        return loss
    return loss + sum(0 * parameter.sum() for parameter in parameters if parameter.requires_grad)
