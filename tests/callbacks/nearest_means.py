"""What tests of the nearest-mean classifier share: streams to fit, and prototypes computed by hand."""

import random

import numpy as np
import torch
from lightning.pytorch import Callback
from numbered_streams import IMAGES, LABELS, fit_stream

from lightning_cl.callbacks import NearestMeanClassifier, Replay
from lightning_cl.tasks import ContinualCallback
from tests.modules import DigitsData, Plain, ShiftingDigits, digits

VAL_IMAGES, VAL_LABELS = digits(24, 10)
TEST_IMAGES, TEST_LABELS = digits(34, 10)


class DigitsToPredict(DigitsData):
    """With test images to predict."""

    def predict_dataloader(self):
        return self.loader("test")


class PredictingNet(Plain):
    """Says in ``predict_step`` what it would in ``forward``."""

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class NoisyNet(PredictingNet):
    """Draws from every generator while it trains, and has buffers that training moves."""

    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        images = images + 0.01 * torch.randn_like(images) + 0.01 * np.random.rand() + 0.01 * random.random()
        return super().training_step((images, labels), batch_idx)


class RestlessNet(NoisyNet):
    """Draws and counts in evaluation too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        noise = 0.01 * np.random.rand() + 0.01 * random.random()
        return super().forward(images + 0.01 * torch.randn_like(images) + noise)


def fit_nearest(nearest=None, replay=20, module=PredictingNet, data=None, others=(), **settings):
    """Train on digits with a head, and return head callback, Trainer and module."""
    nearest = nearest or NearestMeanClassifier()
    memory = [Replay(replay)] if isinstance(replay, int) else [] if replay is None else [replay]
    trainer, module = fit_stream([*memory, nearest, *others], module, data or DigitsToPredict(), **settings)
    return nearest, trainer, module


def predictions(trainer, module, **settings):
    """Return the scores of all test images, as the Trainer's ``predict`` gives them."""
    return torch.cat(trainer.predict(module, datamodule=trainer.datamodule, **settings))


# ------------------------------------------------------------------ by hand


def features_of(module, images):
    """Features of images, as ``Plain`` makes them in evaluation."""
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    with torch.no_grad():
        features = module.net[:4](images).double()
    for layer, training in modes.items():
        layer.training = training
    return features


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


class MeansByHand:
    """Sums of features by class, added up one sample after another."""

    def __init__(self):
        self.features = {}

    def add(self, module, numbers, shifted=False, weights=None):
        images = IMAGES[numbers] * 2 - 1 if shifted else IMAGES[numbers]
        rows = unit(features_of(module, images))
        for label, row, weight in zip(LABELS[numbers].tolist(), rows, weights or [1] * len(rows), strict=True):
            self.features.setdefault(label, []).append(weight * row)
        return self

    @property
    def prototypes(self):
        """Prototypes by class."""
        return {label: unit(torch.stack(rows).mean(0)[None])[0] for label, rows in self.features.items()}

    def predict(self, module, images):
        prototypes = self.prototypes
        labels = sorted(prototypes)
        distances = torch.cdist(unit(features_of(module, images)), torch.stack([prototypes[k] for k in labels]))
        return torch.tensor(labels)[distances.argmin(1)]


def numbers_of_task(task):
    return list(range(48 * task, 48 * task + 48))


def remembered(memory, without=None):
    """Numbers of the samples in a memory."""
    pairs = zip(memory.tasks.tolist(), memory.indices.tolist(), strict=True)
    return [48 * task + index for task, index in pairs if task != without]


def assert_prototypes(nearest, by_hand):
    """Compare the head's prototypes with those made by hand."""
    expected = by_hand.prototypes
    assert nearest.classifier.known.nonzero().flatten().tolist() == sorted(expected)
    for label, prototype in expected.items():
        torch.testing.assert_close(nearest.classifier.prototypes[label].double(), prototype, atol=1e-6, rtol=0)


# ------------------------------------------------------------------ photographs


class Photographs(Callback):
    """Photographs a run after each step and at its end."""

    def __init__(self):
        self.steps, self.end = [], None

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(photograph(pl_module))

    def on_train_end(self, trainer, pl_module):
        replay = trainer.datamodule.replay
        self.end = [
            photograph(pl_module),
            dict(pl_module.state_dict()),
            trainer.optimizers[0].state_dict(),
            None if replay is None else replay.memory.state_dict(),
            trainer.global_step,
        ]


def photograph(module):
    """Random states, modes, buffers and gradients."""
    name, keys, *rest = np.random.get_state()
    return [
        [torch.get_rng_state(), [name, keys.tolist(), *rest], random.getstate()],
        {name: layer.training for name, layer in module.named_modules()},
        {name: buffer.clone() for name, buffer in module.named_buffers()},
        [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()],
        torch.is_grad_enabled(),
    ]


class AtTaskEnds(ContinualCallback):
    """Calls a function when a task was committed, and keeps what it returns."""

    observer = True

    def __init__(self, function):
        self.function, self.seen = function, []

    def on_task_end(self, trainer, pl_module, task):
        self.seen.append(self.function(trainer, pl_module, task.index))


class AfterSteps(Callback):
    """Calls a function after each batch, and keeps what it returns."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(self.function(trainer))


class Augmented(ShiftingDigits):
    """Noise while training, and pixels from -1 to 1 always; test images to predict."""

    def predict_dataloader(self):
        return self.loader("test")
