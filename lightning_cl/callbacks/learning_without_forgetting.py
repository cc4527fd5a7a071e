"""Learning without Forgetting: the network goes on saying of new samples what it said of them before."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.tasks.teacher import LogitDistiller


class LearningWithoutForgetting(LogitDistiller):
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
        super().__init__(weight, temperature, task_classes_only, head)

    @override
    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        return None if self.wanted is None else self.weight * self.distillation(self.wanted)
