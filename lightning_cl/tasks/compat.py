"""Every use of a name of Lightning that is not public, each with the reason beside it.

When Lightning changes, this file is the one to read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer; the attribute is public, but set where type checkers do not see it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Give a Trainer another list of callbacks; a loop that walks through the old one is not disturbed."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def ask_for_loaders_again(trainer: Trainer) -> None:
    """Make Lightning ask the DataModule for its train and validation loaders at their next use.

    The public ``reload_dataloaders_every_n_epochs`` counts epochs, so it would ask too often for the train loader, and
    not at all for a validation loader that is not used in the first epoch of a task.
    """
    fit_loop = trainer.fit_loop
    for loop in (fit_loop, fit_loop.epoch_loop.val_loop):
        if loop._data_fetcher is not None:
            loop._data_fetcher.teardown()  # ends persistent workers
            loop._data_fetcher = None
        loop._combined_loader = None


def processed_epochs(trainer: Trainer) -> int:
    """Count the epochs whose batches are all done.

    ``trainer.current_epoch`` lags by one inside ``on_train_epoch_end``, and whether a fit is over is decided by this.
    """
    processed: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return processed


def next_batch_index(trainer: Trainer) -> int:
    """Return the position in the epoch of the batch that is fetched next, also right after a restore."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def logged_step(trainer: Trainer) -> int:
    """Return the step at which ``self.log`` would log now, so that a logger's curves have one axis.

    ``trainer.global_step`` counts the steps of each optimizer, and a module may have several.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def repair_resume_after_batch(trainer: Trainer) -> None:
    """Let a checkpoint written in ``on_train_batch_end`` resume as the uninterrupted run went on.

    Lightning takes the validation that was due after such a batch for done. After the last batch of an epoch it even
    leaves out the end of the epoch and goes on with the next one. Called in ``on_train_start``, after the loops have
    read their restart stage.
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    if not (fit_loop.restarting and epoch_loop.restarted_on_train_batch_end):
        return
    validation_due = _validation_is_due(trainer)
    progress = epoch_loop.batch_progress
    last_batch = progress.is_last_batch and progress.current.ready >= trainer.num_training_batches
    if last_batch:
        # undo what `fit_loop.reset` counted: the epoch has not ended yet
        epochs: Any
        for epochs in (fit_loop.epoch_progress.current, fit_loop.epoch_progress.total):
            epochs.processed = epochs.completed = epochs.ready - 1
        batches: Any
        for batches in (progress.current, progress.total):
            batches.completed = batches.processed
        fit_loop._restart_stage = "restarted_mid_epoch"
        epoch_loop._restart_stage = "restarted_on_last"
        if not validation_due:
            epoch_loop._batches_that_stepped += 1
    elif validation_due and not epoch_loop._should_accumulate():
        # counted by `epoch_loop.reset`, and again when the batch's end is gone through for the validation
        epoch_loop._batches_that_stepped -= 1
    if validation_due:
        # "in the middle of an evaluation" is the one stage from which Lightning runs it; from its start, with this
        epoch_loop.val_loop._restart_stage = "restarted_mid_evaluation"
        epoch_loop.val_loop.restarting = False


def _validation_is_due(trainer: Trainer) -> bool:
    fit_loop = trainer.fit_loop
    fetcher = fit_loop._data_fetcher
    return fetcher is not None and fit_loop.epoch_loop._should_check_val_fx(fetcher)


def saves_at_epoch_end(trainer: Trainer, checkpoint: ModelCheckpoint) -> bool:
    """Return whether checkpoints are written when an epoch ends and not after its validation, as known in ``setup``."""
    if checkpoint._save_on_train_epoch_end is not None:
        return checkpoint._save_on_train_epoch_end
    return trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0


def dump_run(trainer: Trainer, keep: Callback) -> dict[str, Any]:
    """Return what a checkpoint file would hold, without the loops' progress and the callbacks that keep their state.

    ``Trainer.save_checkpoint`` only writes files.
    """
    with _callbacks_that_go_back(trainer, keep):
        checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    checkpoint.pop("loops")
    return checkpoint


def load_run(trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any], keep: Callback) -> None:
    """Put back what `dump_run` returned, in the order in which Lightning restores a file."""
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    try:
        with _callbacks_that_go_back(trainer, keep):
            connector.restore_model()
            connector.restore_datamodule()
            connector.restore_callbacks()
            connector.restore_precision_plugin_state()
            connector.restore_optimizers_and_schedulers()
    finally:
        connector._loaded_checkpoint = {}
    pl_module.zero_grad()


@contextmanager
def _callbacks_that_go_back(trainer: Trainer, keep: Callback) -> Iterator[None]:
    # a checkpoint callback's state describes files on the disk, which stay
    callbacks = callbacks_of(trainer)
    set_callbacks(trainer, [c for c in callbacks if c is not keep and not isinstance(c, Checkpoint)])
    try:
        yield
    finally:
        set_callbacks(trainer, callbacks)


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Bring a batch to the device through the same hooks and in the same order as Lightning's loops."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
