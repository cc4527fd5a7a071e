"""Look at a model in the middle of a fit without changing a bit of the run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_cl.taps import own_outputs
from lightning_cl.tasks import compat
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.random_state import forked_generators
from lightning_cl.tasks.sampler import Draw
from lightning_cl.tasks.stream import DataSplit, ReplayStream


@contextmanager
def evaluating(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Hold the module in eval mode, without gradients and under the precision of the fit.

    Afterwards every layer's mode, the random states, the buffers and the Trainer's stage are as they were. In it,
    ``trainer.validating`` is true, so that a DataModule's hooks do not augment. Under DDP all ranks use the buffers of
    the first, as DDP does when it validates.
    """
    precision = trainer.precision_plugin.forward_context
    with held_still(trainer, pl_module), precision():
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for buffer in pl_module.buffers():
                if buffer.numel() > 0:
                    torch.distributed.broadcast(buffer.data, src=0)
        yield


@contextmanager
def held_still(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Do what `evaluating` does on one rank and in the module's own precision, for use before training is set up."""
    modes = [(module, module.training) for module in pl_module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers() if buffer.numel() > 0]
    stage = trainer.state.stage
    pl_module.eval()
    trainer.state.stage = RunningStage.VALIDATING
    try:
        with forked_generators(), torch.no_grad():
            yield
    finally:
        trainer.state.stage = stage
        for module, training in modes:
            module.training = training
        for buffer, values in buffers:
            buffer.data.copy_(values)


def device_batches(
    trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any], limit: int | float | None = None
) -> Iterator[Any]:
    """Yield the batches of a loader on the module's device, at most ``limit`` (a count, or a share) of them."""
    if isinstance(limit, float):
        limit = None if limit == 1.0 else max(1, int(len(loader) * limit))  # type: ignore[arg-type]
    for batch in islice(loader, limit):
        yield compat.to_device(trainer, pl_module, batch)


def sample_batches(
    trainer: Trainer,
    pl_module: LightningModule,
    stream: ReplayStream,
    task: int,
    indices: Tensor,
    split: DataSplit = "train",
    every_rank: bool = False,
) -> Iterator[tuple[list[int], Any]]:
    """Yield samples of a task as an evaluation sees them, shared out over the ranks; for use in `evaluating`.

    Where there are fewer samples than ranks, the first rank gets them all.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        stream: The tasks.
        task: The task that the samples belong to.
        indices: Which samples.
        split: Whose samples.
        every_rank: Whether each rank gets all of them.

    Yields:
        Positions in ``indices``, and the batch with a row for each of them, on the device.
    """
    if not every_rank and len(indices) < trainer.world_size:  # a loader needs a sample for each rank
        if not trainer.is_global_zero:
            return
        every_rank = True
    draws: deque[Draw] = deque()
    loader = stream.samples_loader(task, split, indices, draws.append, every_rank)
    for batch in device_batches(trainer, pl_module, loader):
        yield draws.popleft().ids, batch


def find_call(
    trainer: Trainer, pl_module: LightningModule, stream: ReplayStream, **options: Any
) -> tuple[ModuleCall, Any]:
    """Find out how to call a module for logits, on a few samples of the current task.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        stream: The tasks.
        **options: Those of `ModuleCall.find`; ``num_outputs`` is the stream's number of classes by default.

    Returns:
        The call, and the batch that it was tried on.
    """
    task = stream.current_task.index  # the data of earlier ones may be gone
    few = torch.arange(min(8, stream.samples_of(task) or 0))
    options.setdefault("num_outputs", stream.num_classes)
    with evaluating(trainer, pl_module), own_outputs():
        _, batch = next(sample_batches(trainer, pl_module, stream, task, few, every_rank=True))
        return ModuleCall.find(pl_module, batch, stream.structure, **options), batch


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
    with evaluating(trainer, pl_module), own_outputs():
        for ids, batch in sample_batches(trainer, pl_module, stream, task, indices, every_rank=not shared):
            places.extend(ids)
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
