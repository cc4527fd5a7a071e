"""What tests of AdaGauss and of its pieces share: images of digits, and a network with a bottleneck of features."""

import torch
from numbered_streams import fit_stream
from torch import nn
from torch.utils.data import TensorDataset

from lightning_cl.callbacks import AdaGauss
from tests.modules import DigitsData, Plain, digits

WIDTH = 5


class Images(DigitsData):
    """Digits as images of one channel, in batches of 16; to predict too."""

    def dataset(self, first, count):
        images, labels = digits(first, count)
        return TensorDataset(images.view(-1, 1, 8, 8), labels)

    def predict_dataloader(self):
        return self.loader("test")


class Narrow(Plain):
    """Has five features before its classification layer."""

    def __init__(self, dropout=0.0, **settings):
        super().__init__(**{"lr": 0.05, **settings})
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, WIDTH), nn.Linear(WIDTH, 6)
        )

    def features(self, images):
        return self.net[:-1](images)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class NarrowNoisy(Narrow):
    """Draws random numbers while it trains, and has buffers that training moves."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.net[2] = nn.BatchNorm1d(12)


def ada_gauss(**options):
    """Return an `AdaGauss` that is quick."""
    return AdaGauss(**{"expansion": 4, "adapter_epochs": 3, "samples": 40, "warmup": 0.0, **options})


def fit_images(callbacks, module=Narrow, data=None, **settings):
    """Train two digits at a time, and return the Trainer and the module."""
    return fit_stream(callbacks, module, data or Images(), **settings)


def end_of(callback, module):
    """Everything that a run ends with."""
    return dict(module.state_dict()), callback.state_dict(), torch.get_rng_state()
