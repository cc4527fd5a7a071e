"""Streams of numbered digits, and what tests of replay note about them."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from torch.utils.data import DataLoader, Dataset

from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import BatchStructure, ContinualCallback, TaskClock
from tests.modules import Plain, digits, quiet_trainer

IMAGES, LABELS = digits(0, 24)  # 24 of each of six digits: in tasks of two digits each, 48 samples, 3 batches of 16


class Numbered(Dataset):
    """Digits that know their number, in any form: ``form(image, label, number)`` makes a sample."""

    def __init__(self, form=lambda image, label, number: (image, label, number)):
        self.form = form
        self.targets = LABELS

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, number):
        return self.form(IMAGES[number], LABELS[number], number)


class DataOf(LightningDataModule):
    """Training batches of 16 of any data set."""

    def __init__(self, dataset=None, **settings):
        super().__init__()
        self.dataset = dataset or Numbered()
        self.settings = settings

    def train_dataloader(self):
        return DataLoader(self.dataset, **{"batch_size": 16, "shuffle": True, **self.settings})


class AnyBatch(Plain):
    """Trains on whatever has inputs and targets."""

    def losses(self, batch, reduction="mean"):
        structure = BatchStructure()
        images = structure.find_inputs(batch).flatten(1).float()
        return F.cross_entropy(self(images), structure.find_targets(batch), reduction=reduction)

    def training_step(self, batch, batch_idx):
        return self.losses(batch)


class PerSample(AnyBatch):
    def training_step(self, batch, batch_idx):
        return self.losses(batch, "none")


class Watch(Callback):
    """Notes each step: task, batch, and which of its rows are replayed."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = trainer.datamodule.replay_rows
        self.steps.append((trainer.datamodule.current_task.index, batch, None if rows is None else rows.clone()))

    def of_task(self, task):
        return [(batch, rows) for number, batch, rows in self.steps if number == task]


class Judge(ContinualCallback):
    """Refuses one task, or has it repeated as often as it has attempts in its list."""

    def __init__(self, task, attempts=None):
        self.task, self.attempts = task, attempts

    @property
    def wants_rollback(self):
        return True

    def accept_task(self, trainer, pl_module, task):
        if task.index != self.task or self.attempts == []:
            return True
        if self.attempts is not None:
            TaskClock.of(trainer).repeat_task(self.attempts.pop(0))
        return False


class SaveAfterSteps(Callback):
    """Saves ``<step>.ckpt`` after some optimizer steps, where Lightning's own `ModelCheckpoint` does."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit_stream(callbacks, module=None, data=None, sequence=None, ckpt_path=None, stream=None, **settings):
    """Train two digits at a time, and return the Trainer and the module."""
    seed_everything(1, verbose=False)
    if not isinstance(module, LightningModule):  # made after seeding, if it is to be made here
        module = (module or AnyBatch)()
    sequence = sequence or ClassIncremental(data or DataOf(), **{"num_tasks": 3, **(stream or {})})
    trainer = quiet_trainer(callbacks=callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **settings})
    trainer.fit(module, datamodule=sequence, ckpt_path=ckpt_path)
    return trainer, module


def numbers_of(images):
    """Find the numbers of images by their pixels."""
    hits = (images.flatten(1).float()[:, None] == IMAGES[None]).all(2)
    assert (hits.sum(1) == 1).all()
    return hits.int().argmax(1)


def same(first, second):
    """Compare nested containers of tensors (bit for bit) and plain values."""
    if isinstance(first, torch.Tensor):
        return first.shape == second.shape and torch.equal(first.nan_to_num(9e9), second.nan_to_num(9e9))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def same_weights(first, second):
    return same(dict(first.state_dict()), dict(second.state_dict()))


class Noisy(Numbered):
    """Samples with noise from all three generators."""

    def __getitem__(self, number):
        noise = torch.rand(()).item() + np.random.rand() + random.random()
        return IMAGES[number] + noise, LABELS[number], number
