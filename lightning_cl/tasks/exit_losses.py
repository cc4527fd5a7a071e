"""What exit heads are trained on: the labels, and what later heads say."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.arguments import check_choice, check_list
from lightning_cl.exits import ExitHeads
from lightning_cl.heads.exit_rules import log_probabilities
from lightning_cl.tasks.exit_phases import depth_weights

LossWeights = Literal["uniform", "sdn"] | list[float]
Distill = Literal["last", "next", "later"]

_TEMPERATURE = 2.0


class ExitLosses:
    """The losses of exits.

    Args:
        weights: Of the exits' losses and the network's own.
        distill: Whom each exit imitates beside the labels; ``None`` if nobody.

    Raises:
        TypeError: If weights are no numbers.
        ValueError: If one is negative or not finite, or a word is unknown.
    """

    def __init__(self, weights: LossWeights, distill: Distill | None) -> None:
        if isinstance(weights, str):
            check_choice("loss_weights", weights, ("uniform", "sdn"))
        else:
            check_list("loss_weights", weights, (int, float), "'uniform', 'sdn' or a list of numbers")
            if not all(0 <= weight < math.inf for weight in weights):
                raise ValueError(f"`loss_weights` must be 0 or more and finite, got {weights}.")
        if distill is not None:
            check_choice("distill", distill, ("last", "next", "later"))
        self._weights = weights
        self._distill = distill

    def check(self, exits: int) -> None:
        """Refuse weights for another number of exits.

        Raises:
            MisconfigurationException: If there are not as many as exits and one more.
        """
        if not isinstance(self._weights, str) and len(self._weights) != exits + 1:
            raise MisconfigurationException(
                f"`loss_weights` must have {exits + 1} numbers, one for each of {exits} exits and one for the network's"
                f" own head, got {len(self._weights)}."
            )

    def weights_of(self, exits: int, epoch: int, planned: int, heads_alone: bool) -> list[float]:
        """Return a weight for each exit, and one for the network's own loss.

        Args:
            exits: How many there are.
            epoch: Epochs of the task that are over.
            planned: Epochs of the task.
            heads_alone: Whether the network stands still.
        """
        if self._weights == "sdn":
            return depth_weights(exits, epoch, planned)
        if self._weights == "uniform":
            return [1 / (exits + (not heads_alone))] * (exits + 1)
        return list(self._weights)

    def of_exits(self, logits: Sequence[Tensor], targets: Tensor, weights: Sequence[float], by_row: bool) -> Tensor:
        """Return the weighed sum of the exits' losses.

        Args:
            logits: What each exit says of a batch, ``(batch, classes)``, the classification layer last.
            targets: The labels, ``(batch,)``.
            weights: One for each exit.
            by_row: Whether each row's loss is wanted, ``(batch,)``, or their mean.
        """
        total = torch.zeros((), device=targets.device)
        for position, (own, weight) in enumerate(zip(logits[:-1], weights, strict=False)):
            loss = F.cross_entropy(own, targets, reduction="none" if by_row else "mean")
            teachers = self._teachers(logits, position)
            if teachers:
                imitation = torch.stack([_distance(own, teacher) for teacher in teachers]).mean(0)
                loss = loss + (imitation if by_row else imitation.mean())
            total = total + weight * loss
        return total

    def _teachers(self, logits: Sequence[Tensor], position: int) -> Sequence[Tensor]:
        if self._distill is None:
            return []
        later = logits[position + 1 :]
        return {"last": later[-1:], "next": later[:1], "later": later}[self._distill]


def ensemble_loss(heads: ExitHeads, logits: Sequence[Tensor], targets: Tensor, by_row: bool) -> Tensor:
    """Return the mean cross-entropy of what the exits answer together, which trains the ensemble's weights alone."""
    reduction = "none" if by_row else "mean"
    answers = [heads.answer(logits[: position + 1]) for position in range(len(logits))]
    return torch.stack([F.cross_entropy(answer, targets, reduction=reduction) for answer in answers]).mean(0)


def _distance(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of each row's softened prediction from the teacher's, as gradients of labels have it."""
    wanted, own = (log_probabilities(part, _TEMPERATURE) for part in (teacher.detach(), logits))
    return _TEMPERATURE**2 * F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)
