"""Look at a model in the middle of a fit without changing a bit of the run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_cl.tasks import compat
from lightning_cl.tasks.stream import ReplayStream


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


def evaluate_samples(
    trainer: Trainer,
    pl_module: LightningModule,
    stream: ReplayStream,
    task: int,
    indices: Tensor,
    call: Callable[[Any], Tensor],
) -> Tensor:
    """Call the module on training samples as an evaluation sees them, shared out over the ranks.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        stream: The tasks.
        task: The task that the samples belong to.
        indices: Which samples.
        call: Returns one row for each sample of a batch.

    Returns:
        The rows in the order of ``indices``, ``(samples, width)``, on the CPU and the same on every rank.
    """
    places: list[int] = []
    rows: list[Tensor] = []
    # a rank must not be without a sample
    shared = trainer.world_size > 1 and len(indices) >= trainer.world_size
    loader = stream.training_view_loader(task, indices, lambda draw: places.extend(draw.ids), every_rank=not shared)
    with evaluating(trainer, pl_module):
        for batch in device_batches(trainer, pl_module, loader):
            rows.append(call(batch).detach().flatten(1).float())
    order, values = torch.tensor(places), torch.cat(rows)
    if len(order) != len(values):
        raise ValueError(
            f"{len(order)} samples of task {task} gave {len(values)} rows. Let the collate function and the"
            " DataModule's transfer hooks keep one row per sample."
        )
    if shared:
        order, values = gather_rows(trainer, order, values)
    values = values.cpu()[order.argsort()]
    # a module may put out something else on each rank
    return values if shared else trainer.strategy.broadcast(values)


def gather_rows(trainer: Trainer, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids and rows of all ranks, which may have different numbers of them, on the CPU of each."""
    if trainer.world_size > 1:
        ids, rows = (torch.cat(gather_all_tensors(part)) for part in (ids.to(rows.device), rows.contiguous()))
    return ids.cpu(), rows.cpu()


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
