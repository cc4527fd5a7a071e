"""What the callbacks share that keep a copy of the network to teach the one in training."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_number
from lightning_cl.tasks.evaluation import evaluating
from lightning_cl.tasks.other_weights import Weights, copy_weights, on_device
from lightning_cl.tasks.regulariser import Regulariser
from lightning_cl.tasks.task import Task


class TeacherRegulariser(Regulariser):
    """Base class of regularisers that hold the network to what a copy of it, the teacher, says of each batch.

    The copy is made when a task ends. It is called in eval mode on the batch that ``training_step`` gets, before the
    step; what it said stands in `wanted` while the batch is trained.

    Args:
        weight: Weight of the distillation.
        task_classes_only: See `Regulariser`.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Attributes:
        teacher: Weights and buffers of the last task's end, by name; ``None`` before.
        wanted: What the teacher says of the batch in training, ``(batch, ...)``.
        keeps_teacher: Whether a copy is made at all.
        asks_teacher: Whether it is called in each step.
    """

    keeps_teacher: bool = True
    asks_teacher: bool = True

    def __init__(self, weight: float, task_classes_only: bool = True, head: str | None = None) -> None:
        super().__init__(weight, task_classes_only, head)
        self.teacher: Weights | None = None
        self.wanted: Tensor | None = None

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
        self.wanted = None
        if self.asks_teacher and self.teacher is not None and self.in_stream:
            self.teacher = on_device(self.teacher, pl_module.device)
            # before the step, whose activations would stand in memory beside the teacher's
            self.wanted = self.ask_teacher(pl_module, self.teacher, batch)
        return super().around_training_step(trainer, pl_module, batch, batch_idx, step)

    def ask_teacher(self, pl_module: LightningModule, teacher: Weights, batch: Any) -> Tensor:
        """Return what the teacher says of a batch, ``(batch, ...)``.

        Args:
            pl_module: The module.
            teacher: The teacher's weights, on the module's device.
            batch: The batch, on the same device.
        """
        raise NotImplementedError

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        super().on_batch_trained(trainer, pl_module, batch_idx)
        self.wanted = None

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        if self.in_stream and self.keeps_teacher:
            with evaluating(trainer, pl_module):  # there all ranks have the buffers of the first
                self.teacher = copy_weights(pl_module)

    @override
    def forget(self) -> None:
        super().forget()
        self.wanted = None
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


class LogitDistiller(TeacherRegulariser):
    """Base class of those that hold the network to the logits of past classes which the teacher gives.

    Args:
        weight: Weight of the distillation.
        temperature: What logits are divided by.
        task_classes_only: See `Regulariser`.
        head: Name of the classification layer; found by its number of outputs if ``None``.
    """

    def __init__(
        self, weight: float, temperature: float, task_classes_only: bool = True, head: str | None = None
    ) -> None:
        check_number("temperature", temperature, 0, above=True)
        super().__init__(weight, task_classes_only, head)
        self.temperature = temperature

    @override
    def ask_teacher(self, pl_module: LightningModule, teacher: Weights, batch: Any) -> Tensor:
        return self.logits_with(pl_module, teacher, batch)

    def distillation(self, wanted: Tensor) -> Tensor:
        """Return how far the softened prediction of the training step is from the teacher's, a mean over the rows.

        Args:
            wanted: The teacher's logits, ``(batch, outputs)``, of which those of past classes count.
        """
        pairs = self.past_logits(wanted)
        teacher, student = (F.log_softmax(part / self.temperature, dim=1) for part in pairs)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
