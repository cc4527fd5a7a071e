"""Learn how features moved while a task was trained."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lightning_cl.hashing import mix, mix_each
from lightning_cl.heads.anti_collapse import anti_collapse_loss
from lightning_cl.heads.feature_adapter import FeatureAdapter
from lightning_cl.tasks.random_state import forked_generators, seed_torch_generator
from lightning_cl.tasks.rank_rows import of_all_ranks, reduce_gradients

_SALT = 0xADA97
_CLIP = 1.0  # gradients are brought to this norm, as in the paper
_MOMENTUM = 0.9
_WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class AdapterTraining:
    """How an adapter is trained.

    Args:
        epochs: Passes over the task's features.
        lr: Learning rate of SGD with momentum 0.9 and weight decay 0.0005.
        milestones: Shares of the epochs after which the learning rate is a tenth.
        batch_size: Samples of a batch, over all ranks.
        anti_collapse: Weight of the anti-collapse loss of what the adapter puts out.
        bound: Spread beyond which a feature gains nothing in it.
        expansion: How many times wider than the features the hidden layer is.
    """

    epochs: int = 100
    lr: float = 0.01
    milestones: tuple[float, ...] = (0.45, 0.9)
    batch_size: int = 256
    anti_collapse: float = 1.0
    bound: float = 1.0
    expansion: int = 32

    def run(
        self,
        trainer: Trainer,
        before: Tensor,
        after: Tensor,
        seed: int,
        task: int,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> FeatureAdapter:
        """Return an adapter from features before a task to features after it; to be called on all ranks.

        Each rank computes its share of every batch, and all take the same steps: what comes out is the same on every
        rank, and, up to rounding, for every number of ranks. It depends on nothing but the features, the seed and the
        task.

        Args:
            trainer: The Trainer.
            before: Features ``(samples, width)`` before the task, the same on every rank.
            after: Features of the same samples after it.
            seed: Of the stream.
            task: Index of the task.
            progress: Walks through the epochs and shows how far they are.
        """
        rows, width = before.shape
        with forked_generators(), torch.enable_grad():
            seed_torch_generator(mix(seed, _SALT, task))
            adapter = FeatureAdapter(width, self.expansion).to(before.device)
            weights = list(adapter.parameters())
            optimizer = torch.optim.SGD(weights, lr=self.lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
            milestones = [max(1, math.ceil(share * self.epochs)) for share in self.milestones]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
            for epoch in progress(range(self.epochs)):
                order = mix_each((seed, _SALT, task, epoch), torch.arange(rows)).argsort(stable=True)
                for chosen in _batches(order, self.batch_size):
                    own = torch.tensor_split(chosen, trainer.world_size)[trainer.global_rank].to(before.device)
                    optimizer.zero_grad()
                    mapped = of_all_ranks(trainer, adapter(before[own]))
                    self._loss(mapped, after[chosen.to(after.device)]).backward()  # type: ignore[no-untyped-call]
                    reduce_gradients(trainer, weights, "sum")
                    clip_grad_norm_(weights, _CLIP)
                    optimizer.step()
                schedule.step()
        return adapter.requires_grad_(False).eval()

    def _loss(self, mapped: Tensor, wanted: Tensor) -> Tensor:
        loss = F.mse_loss(mapped, wanted)
        if self.anti_collapse and len(mapped) > mapped.shape[1]:
            loss = loss + self.anti_collapse * anti_collapse_loss(mapped, self.bound)
        return loss


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Divide samples into batches of about this size, all as large as one another up to a sample."""
    return list(torch.tensor_split(order, max(1, round(len(order) / size))))
