"""The diagonal of the Fisher information: how much each weight matters for what a network says of a task."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.func import grad, vmap

from lightning_cl.hashing import mix_each
from lightning_cl.taps import ClassMask, own_outputs
from lightning_cl.tasks.batches import as_labels, take_rows
from lightning_cl.tasks.evaluation import evaluating, sample_batches
from lightning_cl.tasks.other_weights import Weights, WithWeights
from lightning_cl.tasks.stream import ReplayStream

FisherKind = Literal["empirical", "true"]

_CHUNK_BYTES = 1 << 26  # of gradients that are taken at once
_FEW = 16  # samples are enough to try a run out
_SALT = 0xF15BE2


class DiagonalFisher:
    """Take the mean over a task's samples of squared gradients of the log-likelihood of a label.

    Each sample's gradient is squared by itself. Gradients of several samples are taken at once by ``torch.func.vmap``;
    a module that it cannot go through (control flow that depends on values, inputs that are no tensors, operations
    without a batching rule), or one so large that a chunk is a single sample, takes them one by one.

    Args:
        call: Calls the module for logits, with any weights.
        kind: "empirical" takes the sample's own label; "true" one drawn from what the network says, by a hash of the
            stream's seed, the task and the sample.
        mask: Hides classes that the likelihood leaves out; none if ``None``.
    """

    def __init__(self, call: WithWeights, kind: FisherKind, mask: ClassMask | None = None) -> None:
        self._call = call
        self._kind = kind
        self._mask = mask
        self._one_by_one = False

    def over_task(
        self, trainer: Trainer, pl_module: LightningModule, stream: ReplayStream, task: int, names: list[str]
    ) -> Weights:
        """Return the diagonal over the training samples of a task, as an evaluation sees them.

        The samples are shared out over the ranks, all of which must call it; each gets the whole. A ``fast_dev_run``
        looks at a few of them.

        Args:
            trainer: The Trainer.
            pl_module: The module, which is left as it was.
            stream: The tasks.
            task: Index of the task.
            names: The parameters that are wanted.
        """
        named = dict(pl_module.named_parameters())
        weights = {name: named[name].detach() for name in names}
        totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        count = stream.samples_of(task) or 0
        samples = torch.arange(min(count, _FEW) if trainer.fast_dev_run else count)  # type: ignore[attr-defined]
        with evaluating(trainer, pl_module), own_outputs(), torch.autocast(pl_module.device.type, enabled=False):
            for ids, batch in sample_batches(trainer, pl_module, stream, task, samples):
                labels = as_labels(stream.structure.find_targets(batch)).to(pl_module.device)
                if len(labels) != len(ids):
                    raise ValueError(
                        f"{len(ids)} samples of task {task} gave {len(labels)} rows. Let the collate function and the"
                        " DataModule's transfer hooks keep one row per sample."
                    )
                if self._kind == "true":  # 23 bits are exact in single precision, and so stay below 1
                    hashes = mix_each((stream.seed, _SALT, task), samples[ids]) >> 40
                    labels = (hashes.float() / 2**23).to(pl_module.device)
                self._add_squares(totals, weights, batch, labels)
        summed = trainer.strategy.reduce(_flat(totals), reduce_op="sum") / max(1, len(samples))
        parts = torch.split(summed, [total.numel() for total in totals.values()])
        return {name: part.view_as(totals[name]).clone() for name, part in zip(totals, parts, strict=True)}

    def _add_squares(self, totals: Weights, weights: Weights, batch: Any, targets: Tensor) -> None:
        rows = len(targets)
        size = max(1, _CHUNK_BYTES // max(1, 4 * sum(weight.numel() for weight in weights.values())))
        for start in range(0, rows, size):
            chosen = slice(start, min(rows, start + size))
            self._add_chunk(totals, weights, take_rows(batch, chosen, rows), targets[chosen])

    def _add_chunk(self, totals: Weights, weights: Weights, batch: Any, targets: Tensor) -> None:
        rows = len(targets)
        if not self._one_by_one and rows > 1:
            try:
                gradients = self._at_once(weights, batch, targets)
            except Exception as error:
                self._one_by_one = True
                said = (str(error).splitlines() or [""])[0]
                rank_zero_warn(
                    "ElasticWeightConsolidation takes gradients sample by sample, since `torch.func.vmap` does not go"
                    f" through {type(self._call.module).__name__}: {type(error).__name__}: {said}"
                )
            else:
                for name, gradient in gradients.items():
                    totals[name] += gradient.float().square().sum(0)
                return
        for row in range(rows):
            some = slice(row, row + 1)
            for name, gradient in self._of_one(weights, take_rows(batch, some, rows), targets[row]).items():
                totals[name] += gradient.float().square()

    def _at_once(self, weights: Weights, batch: Any, targets: Tensor) -> Weights:
        parts, rebuild = _rows_of(batch, len(targets))

        def loss(own: Weights, sample: list[Tensor], target: Tensor) -> Tensor:
            return self._loss(own, rebuild([part.unsqueeze(0) for part in sample]), target)

        each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
        return each(weights, parts, targets)  # type: ignore[no-any-return]

    def _of_one(self, weights: Weights, sample: Any, target: Tensor) -> Weights:
        with torch.enable_grad():
            own = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            gradients = torch.autograd.grad(self._loss(own, sample, target), list(own.values()), allow_unused=True)
        return {name: gradient for name, gradient in zip(own, gradients, strict=True) if gradient is not None}

    def _loss(self, weights: Weights, sample: Any, target: Tensor) -> Tensor:
        """Return minus the log-likelihood of a batch of one sample."""
        logits = self._call.with_weights(weights, sample)
        scores = (logits if self._mask is None else self._mask(logits)).float().log_softmax(1).squeeze(0)
        if self._kind == "true":
            shares = scores.detach().exp().cumsum(0)
            target = (shares <= target * shares[-1]).sum()
        return -scores.gather(0, target.unsqueeze(0)).squeeze(0)


def _flat(parts: Weights) -> Tensor:
    return torch.cat([part.flatten() for part in parts.values()])


def _rows_of(batch: Any, rows: int) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """Return the tensors of a batch that have a row for each sample, and what puts others in their places."""
    found: list[Tensor] = []

    def keep(part: Tensor) -> Tensor:
        if part.ndim > 0 and len(part) == rows:
            found.append(part)
        return part

    apply_to_collection(batch, Tensor, keep)

    def rebuild(others: list[Tensor]) -> Any:
        rest = iter(others)
        return apply_to_collection(batch, Tensor, lambda p: next(rest) if p.ndim > 0 and len(p) == rows else p)

    return found, rebuild
