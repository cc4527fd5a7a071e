"""Rows and gradients of a batch that is spread over the ranks."""

from collections.abc import Iterable
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors


def of_all_ranks(trainer: Trainer, rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks; gradients reach this rank's own.

    A loss that all ranks compute of them has, summed over the ranks, the gradient that one process would have.
    """
    if trainer.world_size == 1:
        return rows
    parts = gather_all_tensors(rows.detach().contiguous())
    parts[trainer.global_rank] = rows
    return torch.cat(parts)


def reduce_gradients(trainer: Trainer, parameters: Iterable[nn.Parameter], operation: Literal["mean", "sum"]) -> None:
    """Give every rank the mean or the sum of all ranks' gradients, of parameters that DDP does not know of.

    A parameter must have a gradient on all ranks or on none.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if trainer.world_size == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)  # the strategy's `reduce` waits at a barrier first, in each step
    if operation == "mean":
        flat /= trainer.world_size
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
