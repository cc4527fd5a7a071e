"""Learning without Memorizing: the network goes on looking where it looked before."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_number
from lightning_cl.taps import ActivationTap, layer_named
from lightning_cl.tasks.attention import attention_maps, check_second_derivative, find_map_layer
from lightning_cl.tasks.evaluation import evaluating
from lightning_cl.tasks.other_weights import Weights
from lightning_cl.tasks.teacher import LogitDistiller


class LearningWithoutMemorizing(LogitDistiller):
    r"""Distil what the last task's network said, and where it looked (LwM, Dhar et al., arXiv 1811.08051).

    To the module's loss comes, from the second task on, ``weight`` times the divergence of `LearningWithoutForgetting`
    and ``gamma`` times the distance of two attention maps, a mean over the rows of the batch, logged together as
    ``loss/learning_without_memorizing``. The map is Grad-CAM's, of a layer with activations :math:`A_k` and of the past
    class :math:`b` that the teacher scores highest for the sample, with :math:`s_b` its logit:

    .. math:: Q = \mathrm{relu}\Big(\sum_k \alpha_k A_k\Big), \quad
        \alpha_k = \mathrm{mean}_{ij} \frac{\partial s_b}{\partial A_{kij}}, \quad
        AD = \Big\| \frac{Q_{teacher}}{\|Q_{teacher}\|_2} - \frac{Q_{student}}{\|Q_{student}\|_2} \Big\|_1

    The student's slopes are differentiated too, so what follows the layer must allow a second derivative. An unchanged
    network without dropout and batch norm has loss 0. Where batch norm in train mode follows the layer, a slope is that
    of the batch's sum of scores, since the samples then depend on each other.

    The teacher is a copy of weights and buffers, called in eval mode on the batch that ``training_step`` gets. Logits
    and activation of the student are those of the step itself, so each step costs one forward more, and two backward
    passes from the logits to the layer.

    Args:
        weight: Weight of the divergence of logits.
        gamma: Weight of the distance of maps; with 0 there are none.
        temperature: What logits are divided by in the divergence.
        layer: Name of the layer whose maps are compared. By default the last one before the classification layer that
            puts out ``(batch, channels, height, width)`` with more than one position, as a first dry run shows: the
            last stage of a residual network.
        task_classes_only: Whether the module's own loss sees the logits of the current task's classes alone, or, where
            past samples are replayed, those of all classes seen so far.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Attributes:
        map_layer: Name of the layer whose maps are compared; found when training starts.
        teacher: Weights and buffers of the last task's end, by name; ``None`` before.

    Raises:
        TypeError: If a number is none.
        ValueError: If one is out of its range.

    Example::

        >>> LearningWithoutMemorizing(weight=10, gamma=20, layer="model.layer4").gamma
        20
    """

    needs_gradients = True

    def __init__(
        self,
        weight: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 2.0,
        layer: str | None = None,
        task_classes_only: bool = True,
        head: str | None = None,
    ) -> None:
        check_number("gamma", gamma, 0)
        if layer is not None and not isinstance(layer, str):
            raise TypeError(f"`layer` must be the name of a layer or None, got {layer!r}.")
        super().__init__(weight, temperature, task_classes_only, head)
        self.gamma = gamma
        self.map_layer = layer
        self._named = layer
        self._wanted_maps: tuple[Tensor, Tensor] | None = None  # of which past class, and the teacher's map
        self._activation: ActivationTap | None = None

    @override
    def look_at_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        with evaluating(trainer, pl_module):
            try:
                self.map_layer = find_map_layer(pl_module, self.call, batch, self.layer, self._named)
                check_second_derivative(pl_module, self.call, batch, self.map_layer)
            except MisconfigurationException as error:
                raise MisconfigurationException(f"{self.name}: {error}") from None

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        self._wanted_maps = None

        def tapped(given: Any) -> Any:
            self._activation = self._tap_of(pl_module, only_own_step=True)
            with self._activation:
                return step(given)

        # in each task alike: a compiled module keeps the hooks that it was compiled with
        tap = self.in_stream and self.gamma > 0
        return super().around_training_step(trainer, pl_module, batch, batch_idx, tapped if tap else step)

    @override
    def ask_teacher(self, pl_module: LightningModule, teacher: Weights, batch: Any) -> Tensor:
        if self.gamma == 0:
            return super().ask_teacher(pl_module, teacher, batch)
        with self._tap_of(pl_module) as tap:
            logits = self.logits_with(pl_module, teacher, batch, gradients=True)
        past = torch.tensor([label for label in self.classes if label < logits.shape[1]], device=logits.device)
        chosen = past[logits.detach()[:, past].argmax(1)]
        maps = attention_maps(_scores(logits, chosen), self._output_of(tap, len(logits)))
        self._wanted_maps = chosen, maps.detach()
        return logits.detach()

    @override
    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        if self.wanted is None:
            return None
        loss = self.weight * self.distillation(self.wanted)
        if self._wanted_maps is None or self._activation is None:
            return loss
        chosen, wanted = self._wanted_maps
        logits = self.student_logits()
        activation = self._output_of(self._activation, len(logits))
        maps = attention_maps(_scores(logits, chosen), activation, create_graph=True)
        if maps.shape != wanted.shape:
            raise ValueError(
                f"`layer={self.map_layer!r}` gave maps of {maps.shape[1]} positions in `training_step`, and of"
                f" {wanted.shape[1]} for the batch that it got, so {self.name} cannot compare them. Let the"
                " step leave the size of its inputs as it is."
            )
        return loss + self.gamma * (wanted - maps).abs().sum(1).mean()

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        super().on_batch_trained(trainer, pl_module, batch_idx)
        self._wanted_maps = self._activation = None

    @override
    def forget(self) -> None:
        super().forget()
        self._wanted_maps = self._activation = None

    def _tap_of(self, pl_module: LightningModule, only_own_step: bool = False) -> ActivationTap:
        name = str(self.map_layer)
        # by name: a module may put a new layer in the place of the old one
        return ActivationTap({name: layer_named(pl_module, name, "layer")}, only_own_step)

    def _output_of(self, tap: ActivationTap, rows: int) -> Tensor:
        output = tap.outputs.get(str(self.map_layer))
        if output is None or len(output) != rows:
            got = "did not call it" if output is None else f"put {len(output)} rows through it"
            raise ValueError(
                f"{self.name} reads what `layer={self.map_layer!r}` puts out, and the step {got}, with {rows}"
                f" rows of logits from `head={self.layer!r}`. Name a layer that it calls once with `layer=...`."
            )
        return output


def _scores(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the logit of a class for each row, ``(batch,)``."""
    return logits.gather(1, chosen[:, None]).squeeze(1)
