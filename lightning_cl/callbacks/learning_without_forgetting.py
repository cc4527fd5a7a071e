"""Learning without Forgetting: the network goes on saying of new samples what it said of them before."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_number
from lightning_cl.tasks import Task
from lightning_cl.tasks.evaluation import evaluating
from lightning_cl.tasks.other_weights import Weights, copy_weights, on_device
from lightning_cl.tasks.regulariser import Regulariser


class LearningWithoutForgetting(Regulariser):
    r"""Distil the network of the last task's end into the one in training (LwF, Li and Hoiem, arXiv 1606.09282).

    To the module's loss comes, from the second task on, ``weight`` times the divergence of its softened prediction from
    the teacher's over the classes of all past tasks together, a mean over the rows of the batch, logged as
    ``loss/learning_without_forgetting``:

    .. math:: \sum_c p_c (\log p_c - \log q_c), \quad p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    It is FACIL's cross-entropy without the teacher's entropy, so gradients are the same, and an unchanged network has
    loss 0. As there, it is not multiplied by :math:`T^2`.

    The teacher is a copy of weights and buffers, called in eval mode on the batch that ``training_step`` gets; the
    student's logits are those of the step itself, so each step costs one forward more. What a ``training_step`` does to
    its inputs, the teacher does not see.

    Args:
        weight: Weight of the term.
        temperature: What logits are divided by.
        task_classes_only: Whether the module's own loss sees the logits of the current task's classes alone, or, where
            past samples are replayed, those of all classes seen so far. Without this, cross-entropy over all classes
            unlearns the past ones as fast as the term can hold them.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Attributes:
        teacher: Weights and buffers of the last task's end, by name; ``None`` before.

    Raises:
        TypeError: If a number is none.
        ValueError: If one is out of its range.

    Example::

        >>> LearningWithoutForgetting(weight=10, temperature=2.0).weight
        10
    """

    def __init__(
        self,
        weight: float = 10.0,
        temperature: float = 2.0,
        task_classes_only: bool = True,
        head: str | None = None,
    ) -> None:
        check_number("temperature", temperature, 0, above=True)
        super().__init__(weight, task_classes_only, head)
        self.temperature = temperature
        self.teacher: Weights | None = None
        self._wanted: Tensor | None = None  # the teacher's logits of the batch in training

    @override
    def reset(self) -> None:
        super().reset()
        self.teacher = None

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        self._wanted = None
        if self.teacher is not None and self.knows_tasks:
            self.teacher = on_device(self.teacher, pl_module.device)
            # before the step, whose activations would stand in memory beside the teacher's
            self._wanted = self.logits_with(pl_module, self.teacher, batch)
        return super().around_training_step(trainer, pl_module, batch, batch_idx, step)

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        super().on_batch_trained(trainer, pl_module, batch_idx)
        self._wanted = None

    @override
    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        if self._wanted is None:
            return None
        pairs = self.past_logits(self._wanted)
        wanted, own = (F.log_softmax(part / self.temperature, dim=1) for part in pairs)
        return self.weight * F.kl_div(own, wanted, reduction="batchmean", log_target=True)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        if self.knows_tasks:
            with evaluating(trainer, pl_module):  # there all ranks have the buffers of the first
                self.teacher = copy_weights(pl_module)

    @override
    def forget(self) -> None:
        super().forget()
        self._wanted = None
        if self.teacher is not None:
            self.teacher = on_device(self.teacher, torch.device("cpu"))

    @override
    def state_dict(self) -> dict[str, Any]:
        teacher = None if self.teacher is None else {name: part.cpu().clone() for name, part in self.teacher.items()}
        return {**super().state_dict(), "teacher": teacher}

    @override
    def restore(self, state_dict: dict[str, Any]) -> None:
        super().restore(state_dict)
        self.teacher = state_dict["teacher"]
