"""Streams whose tasks are watched by a poison detector, and layers' shifts computed by hand."""

import copy

import torch
from nearest_means import NoisyNet
from numbered_streams import IMAGES, DataOf, fit_stream
from torch import nn

from lightning_cl.callbacks import PoisonDetector
from lightning_cl.tasks import ContinualCallback, TaskClock
from tests.modules import Plain

LAYERS = {"net.0": 0, "net.1": 1, "net.4": 4}  # those of `NoisyNet` with weights, and where they are in its `net`


def watching(**arguments):
    """Return a detector that judges every task, and keeps all it can."""
    return PoisonDetector(**{"threshold": 90, "detect_from": 0, "action": "warn", "samples": None, **arguments})


def fit_watched(detector, module=NoisyNet, others=(), data=None, **settings):
    """Train on three tasks of two digits, 48 images each, and return the Trainer and the module."""
    return fit_stream([*others, detector], module, data or Pairs(), **settings)


def form(image, label, number):
    return image, label


class Pairs(DataOf):
    """Training batches of 16 images and labels."""

    def __init__(self):
        super().__init__()
        self.dataset.form = form


class Networks(ContinualCallback):
    """Keeps copies of the network from the start and the end of each task."""

    observer = True

    def __init__(self):
        self.before, self.after = [], []

    def on_task_start(self, trainer, pl_module, task):
        self.before.append(copy.deepcopy(pl_module.net).eval())

    def accept_task(self, trainer, pl_module, task):
        self.after.append(copy.deepcopy(pl_module.net).eval())
        return True


def mean_outputs_by_hand(net, images):
    """Average what the layers put out over images, one image after another."""
    sums = dict.fromkeys(LAYERS, 0.0)
    with torch.no_grad():
        for image in images:
            value = image[None]
            for place, layer in enumerate(net):
                value = layer(value)
                for name in (name for name, own in LAYERS.items() if own == place):
                    sums[name] = sums[name] + value[0].double()
    return {name: total / len(images) for name, total in sums.items()}


def shifts_by_hand(before, after, images):
    first, second = mean_outputs_by_hand(before, images), mean_outputs_by_hand(after, images)
    return {name: float((second[name] - first[name]).norm()) for name in LAYERS}


def images_of(task):
    return IMAGES[48 * task : 48 * task + 48]


class Moves(Plain):
    """Is not trained at all; at the end of a task the bias of its last layer grows by a number that belongs to it."""

    steps = (0.0, 0.5, 2.0)

    def __init__(self):
        super().__init__(lr=0.0)

    def on_train_epoch_end(self):
        step = self.steps[self.trainer.datamodule.current_task.index]
        attempt = TaskClock.of(self.trainer).progress.attempt
        with torch.no_grad():
            self.net[4].bias += self.step_of(step, attempt)

    def step_of(self, step, attempt):
        return step


def moving(*steps):
    """Return the class of a module that moves by these numbers in its tasks."""
    return type("Moving", (Moves,), {"steps": steps})


class Widens(Plain):
    """Begins with a head for two classes, and gets two more outputs at the start of each later task."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.net[4] = nn.Linear(24, 2)

    def on_task_start(self, task):
        wide = nn.Linear(24, 2 * task.index + 2)
        with torch.no_grad():
            wide.weight[: self.net[4].out_features] = self.net[4].weight[: 2 * task.index + 2]
            wide.bias[: self.net[4].out_features] = self.net[4].bias[: 2 * task.index + 2]
        self.net[4] = wide
        self.trainer.strategy.setup_optimizers(self.trainer)
