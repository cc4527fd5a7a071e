"""What callbacks do around the module's own ``training_step``, and the loss terms that they add inside it."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.taps import untapped
from lightning_cl.tasks.callback import ContinualCallback
from lightning_cl.tasks.overrides import InstanceOverrides


def added_loss(pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any = None) -> Tensor:
    """Return the sum of the loss terms of all callbacks, for a module with manual optimisation.

    Automatic optimisation needs no such call: there the terms are added to what ``training_step`` returns.

    Args:
        pl_module: The module in training.
        batch: The batch that ``training_step`` got.
        batch_idx: Its index.
        outputs: What callbacks get as the outputs of the step.

    Example::

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch) + added_loss(self, batch, batch_idx)
            self.manual_backward(loss)
    """
    terms: LossTerms | None = getattr(pl_module.training_step, "loss_terms", None)
    if terms is None:
        return torch.zeros((), device=pl_module.device)
    return terms.total(batch, batch_idx, outputs)


def with_loss(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the loss in what a training step returned; one that skips its batch returned nothing."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
        return {**outputs, "loss": change(outputs["loss"])}
    return outputs


class LossTerms:
    """Lets callbacks act around the training step, and computes and logs the terms of those that have one."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[ContinualCallback]) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._callbacks = [c for c in callbacks if type(c).training_loss is not ContinualCallback.training_loss]
        changed = ContinualCallback.around_training_step
        around = [c for c in callbacks if type(c).around_training_step is not changed]
        self._around = sorted(around, key=lambda c: not c.acts_innermost)
        self.was_asked = False

    def attach(self, overrides: InstanceOverrides) -> None:
        """Wrap ``training_step`` if a callback acts around it or has a term."""
        if self._callbacks or self._around:
            overrides.wrap(self._pl_module, "training_step", self._training_step)
            self._pl_module.training_step.loss_terms = self  # type: ignore[attr-defined]

    def total(self, batch: Any, batch_idx: int, outputs: Any) -> Tensor:
        """Return the sum of the terms, and log each."""
        self.was_asked = True
        total = torch.zeros((), device=self._pl_module.device)
        for callback in self._callbacks:
            with untapped():  # manual optimisation asks for it in the middle of its step
                term = callback.training_loss(self._trainer, self._pl_module, batch, batch_idx, outputs)
            if term is not None:
                total = total + term
                self._pl_module.log(f"loss/{_snake_case(type(callback).__name__)}", term.detach(), batch_size=1)
        return total

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.was_asked = False
        batch, *others = (*args, *kwargs.values())
        batch_idx = others[0] if others else self._trainer.fit_loop.batch_idx

        def call_module(given: Any) -> Any:
            nonlocal batch
            batch = given
            return original(given, *others)

        step: Callable[[Any], Any] = call_module
        for callback in self._around:
            step = partial(self._call_around, callback, batch_idx, step)
        outputs = step(batch)
        if not self._callbacks:
            return outputs
        if not self._pl_module.automatic_optimization:
            if not self.was_asked:
                raise MisconfigurationException(
                    f"{', '.join(type(c).__name__ for c in self._callbacks)} adds a loss, but"
                    f" {type(self._pl_module).__name__} optimises manually and did not take it. Add"
                    " `lightning_cl.tasks.added_loss(self, batch, batch_idx)` to the loss that `training_step` gives to"
                    " `manual_backward`."
                )
            return outputs
        return with_loss(outputs, lambda loss: loss + self.total(batch, batch_idx, outputs))

    def _call_around(self, callback: ContinualCallback, batch_idx: int, step: Callable[[Any], Any], batch: Any) -> Any:
        return callback.around_training_step(self._trainer, self._pl_module, batch, batch_idx, step)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
