"""Elastic Weight Consolidation: weights that mattered for past tasks are held where they were."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_number
from lightning_cl.taps import layer_named
from lightning_cl.tasks import Task
from lightning_cl.tasks.fisher import DiagonalFisher, FisherKind
from lightning_cl.tasks.other_weights import Weights
from lightning_cl.tasks.regulariser import Regulariser


class ElasticWeightConsolidation(Regulariser):
    r"""Pull weights back to where the last task left them, as hard as they mattered (EWC, arXiv 1612.00796).

    To the module's loss comes, from the second task on,

    .. math:: \frac{weight}{2} \sum_i F_i (\theta_i - \theta^*_i)^2

    logged as ``loss/elastic_weight_consolidation``: :math:`\theta^*` are the weights at the last task's end, and
    :math:`F` is the diagonal of the Fisher information, the mean over a task's training samples, seen without
    augmentation, of the squared gradient of a label's log-likelihood. Over tasks it is fused as
    ``alpha * past + (1 - alpha) * new``, as in FACIL. The classification layer is left out of it.

    Gradients are taken for each sample by itself, in eval mode, several at once by ``torch.func.vmap``. A module that
    it cannot go through has them taken one by one, and a warning says so.

    Args:
        weight: Weight of the term.
        alpha: What is kept of the past tasks' Fisher information when a task's own comes to it.
        fisher: "empirical" takes the label of each sample; "true" one drawn from what the network says of it.
        task_classes_only: Whether the module's own loss, and the likelihood that the Fisher information is of, see the
            logits of the current task's classes alone, or, where past samples are replayed, those of all classes seen
            so far.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Attributes:
        importance: The fused diagonal, by name of the parameter.
        anchor: The weights that are pulled back to.

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument is out of its range.

    Example::

        >>> ElasticWeightConsolidation(weight=5000, fisher="true").alpha
        0.5
    """

    needs_gradients = True

    def __init__(
        self,
        weight: float = 5000.0,
        alpha: float = 0.5,
        fisher: FisherKind = "empirical",
        task_classes_only: bool = True,
        head: str | None = None,
    ) -> None:
        check_number("alpha", alpha, 0, 1)
        check_choice("fisher", fisher, ("empirical", "true"))
        super().__init__(weight, task_classes_only, head)
        self.alpha = alpha
        self.fisher: FisherKind = fisher
        self.importance: Weights = {}
        self.anchor: Weights = {}
        self._flat: tuple[Tensor, Tensor] | None = None  # anchor and importance, each as one vector

    @override
    def reset(self) -> None:
        super().reset()
        self.importance, self.anchor, self._flat = {}, {}, None

    @override
    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        if not self.anchor or not self.in_stream:
            return None
        named = self._checked_parameters(pl_module)
        if self._flat is None:
            self._flatten(pl_module)
        anchor, importance = self._flat  # type: ignore[misc]
        moved = (torch.cat([named[name].flatten() for name in self.anchor]) - anchor).float()
        return self.weight / 2 * (importance * moved * moved).sum()

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if not self.in_stream:
            return
        named = self._checked_parameters(pl_module)
        head = {id(part) for part in layer_named(pl_module, self.layer).parameters()}
        trained = {n: p for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in head}
        if not trained and not self.importance:
            rank_zero_warn(
                f"ElasticWeightConsolidation has nothing to hold: {type(pl_module).__name__} trains nothing but its"
                " classification layer, which is left out."
            )
        mask = self.class_mask() if self.task_classes_only else None
        fisher = DiagonalFisher(self.call, self.fisher, mask)
        new = fisher.over_task(trainer, pl_module, self.stream, task.index, list(trained)) if trained else {}
        self.importance = {**self.importance, **{name: self._fused(name, part) for name, part in new.items()}}
        self.anchor = {name: named[name].detach().clone() for name in self.importance}
        self._flat = None
        super().on_task_end(trainer, pl_module, task)

    @override
    def state_dict(self) -> dict[str, Any]:
        # parts of one vector are cut out of it, or each would be saved with the whole
        parts = {"importance": self.importance, "anchor": self.anchor}
        saved = {key: {name: part.cpu().clone() for name, part in own.items()} for key, own in parts.items()}
        return {**super().state_dict(), **saved}

    @override
    def restore(self, state_dict: dict[str, Any]) -> None:
        super().restore(state_dict)
        self.importance, self.anchor, self._flat = state_dict["importance"], state_dict["anchor"], None

    @override
    def forget(self) -> None:
        super().forget()
        self.importance, self.anchor = (
            {name: part.cpu() for name, part in parts.items()} for parts in (self.importance, self.anchor)
        )
        self._flat = None

    def _fused(self, name: str, new: Tensor) -> Tensor:
        past = self.importance.get(name)
        if past is None:
            return new
        return self.alpha * past.to(new.device) + (1 - self.alpha) * new

    def _checked_parameters(self, pl_module: LightningModule) -> dict[str, Parameter]:
        """Return the parameters by name, among which must be those that are held, in their shapes."""
        named = dict(pl_module.named_parameters())
        for name, part in self.anchor.items():
            if name not in named or named[name].shape != part.shape:
                now = "is gone" if name not in named else f"has the shape {tuple(named[name].shape)} now"
                raise MisconfigurationException(
                    f"ElasticWeightConsolidation pulls each weight back to where the last task left it, and {name!r} of"
                    f" {type(pl_module).__name__}, which had the shape {tuple(part.shape)}, {now}. Only the"
                    f" classification layer (`head={self.layer!r}`) may change its shape."
                )
        return named

    def _flatten(self, pl_module: LightningModule) -> None:
        """Lay weights and their importance out as one vector each, which a step is quick with."""
        vectors = []
        for parts in (self.anchor, self.importance):
            vector = torch.cat([part.to(pl_module.device).flatten() for part in parts.values()])
            pieces = torch.split(vector, [part.numel() for part in parts.values()])
            for (name, part), piece in zip(list(parts.items()), pieces, strict=True):
                parts[name] = piece.view(part.shape)
            vectors.append(vector)
        self._flat = vectors[0], vectors[1]
