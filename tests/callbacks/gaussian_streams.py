"""What tests of Gaussian heads share: streams to fit, and Gaussians computed by hand."""

import torch
from nearest_means import TEST_IMAGES, DigitsToPredict, NoisyNet, PredictingNet, features_of
from numbered_streams import IMAGES, LABELS, fit_stream
from torch import nn

from lightning_cl.callbacks import GaussianClassifier

__all__ = ["TEST_IMAGES", "DigitsToPredict", "FrozenNet", "NoisyNet", "PredictingNet", "by_hand", "fit_gaussian"]


class FrozenNet(PredictingNet):
    """Only its last layer is trained, on features that vary in every direction."""

    def __init__(self):
        super().__init__()
        self.net[0] = nn.Linear(64, 10).requires_grad_(False)
        self.net[2] = nn.Tanh()
        self.net[4] = nn.Linear(10, 6)


def fit_gaussian(gaussian=None, module=FrozenNet, others=(), **settings):
    """Train on digits with a head, and return head callback, Trainer and module."""
    gaussian = gaussian or GaussianClassifier()
    settings = {"data": DigitsToPredict(), **settings}
    trainer, module = fit_stream([gaussian, *others], module, **settings)
    return gaussian, trainer, module


def by_hand(module, numbers=None):
    """Return means and covariances of features of the digits with some numbers, class by class."""
    numbers = torch.arange(len(LABELS)) if numbers is None else torch.as_tensor(numbers)
    features, labels = features_of(module, IMAGES[numbers]), LABELS[numbers]
    classes = labels.unique()
    parts = [features[labels == label] for label in classes]
    return torch.stack([p.mean(0) for p in parts]), torch.stack([p.T.cov() for p in parts])
