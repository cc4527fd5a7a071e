"""Look at a model in the middle of a fit without changing a bit of the run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_cl.tasks import compat


@contextmanager
def evaluating(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Hold the module in eval mode, without gradients and under the precision of the fit.

    Afterwards every layer's mode, the random states, the buffers and the Trainer's stage are as they were. In it,
    ``trainer.validating`` is true, so that a DataModule's hooks do not augment. Under DDP all ranks use the buffers of
    the first, as DDP does when it validates.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    stage = trainer.state.stage
    precision = trainer.precision_plugin.forward_context
    pl_module.eval()
    trainer.state.stage = RunningStage.VALIDATING
    try:
        with isolate_rng(), torch.no_grad(), precision(), _first_ranks_buffers(pl_module):
            yield
    finally:
        trainer.state.stage = stage
        for module, training in modes:
            module.training = training


def device_batches(
    trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any], limit: int | float | None = None
) -> Iterator[Any]:
    """Yield the batches of a loader on the module's device, at most ``limit`` (a count, or a share) of them."""
    if isinstance(limit, float):
        limit = None if limit == 1.0 else max(1, int(len(loader) * limit))  # type: ignore[arg-type]
    for batch in islice(loader, limit):
        yield compat.to_device(trainer, pl_module, batch)


@contextmanager
def _first_ranks_buffers(module: nn.Module) -> Iterator[None]:
    buffers = [buffer for buffer in module.buffers() if buffer.numel() > 0]
    own: list[Tensor] = [buffer.detach().clone() for buffer in buffers]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in buffers:
            torch.distributed.broadcast(buffer.data, src=0)
    try:
        yield
    finally:
        for buffer, values in zip(buffers, own, strict=True):
            buffer.data.copy_(values)
