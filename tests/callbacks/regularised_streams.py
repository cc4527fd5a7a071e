"""What tests of the callbacks share that hold a network to its past without exemplars."""

import copy

import torch
from torch import nn

from lightning_cl.callbacks import ElasticWeightConsolidation, LearningWithoutForgetting, LearningWithoutMemorizing
from lightning_cl.tasks import ContinualCallback
from tests.modules import Manual, Plain

REGULARISERS = [LearningWithoutForgetting, ElasticWeightConsolidation, LearningWithoutMemorizing]
HIDDEN = -1e4


def hidden(logits, classes):
    """Logits as the module's own loss gets them."""
    out = torch.full_like(logits, HIDDEN)
    out[:, classes] = logits[:, classes]
    return out


class Notes(ContinualCallback):
    """Keeps the network of each task's end, each term, and each step's gradients and logits' classes."""

    observer = True

    def __init__(self, name=None):
        self.name = name
        self.networks, self.terms, self.gradients, self.before = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(copy.deepcopy(pl_module.net))

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append([parameter.grad.clone() for parameter in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        term = trainer.callback_metrics.get(f"loss/{self.name}")
        self.terms.append(None if term is None else float(term))

    def on_task_end(self, trainer, pl_module, task):
        self.networks.append(copy.deepcopy(pl_module.net))


class Frozen(Plain):
    """Does not move."""

    def __init__(self, **settings):
        super().__init__(lr=0.0, **settings)


class Batches(ContinualCallback):
    """Keeps the batches."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(batch)


class Convolved(Plain):
    """A small network that looks at images; what comes after its maps is not linear."""

    def __init__(self, lr=0.2, dropout=0.0, batch_norm=False):
        super().__init__(lr)
        self.net = convolutions(dropout, batch_norm)


class ConvolvedManual(Manual):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.net = convolutions()


def convolutions(dropout=0.0, batch_norm=False):
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(96, 12),
        nn.Tanh(),
        nn.Linear(12, 6),
    )


def network_for(kind, **settings):
    """A module that a regulariser can hold."""
    return (Convolved if kind is LearningWithoutMemorizing else Plain)(**settings)


def manual_for(kind, **settings):
    return (ConvolvedManual if kind is LearningWithoutMemorizing else Manual)(**settings)
