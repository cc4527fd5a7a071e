"""What tests of Gaussian heads share: streams to fit, and Gaussians computed by hand."""

import torch
from nearest_means import DigitsToPredict, PredictingNet, features_of
from numbered_streams import IMAGES, LABELS, fit_stream
from torch import nn

from lightning_cl.callbacks import GaussianClassifier


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


def assert_gaussians(gaussians, features, labels):
    """Compare full Gaussians with those of features, taken class by class."""
    assert gaussians.known.nonzero().flatten().tolist() == labels.unique().tolist()
    for label in labels.unique():
        own = features[labels == label]
        assert gaussians.counts[label] == len(own)
        torch.testing.assert_close(gaussians.means[label], own.mean(0), atol=1e-8, rtol=0)
        torch.testing.assert_close(gaussians.covariances()[label], own.T.cov(), atol=1e-8, rtol=0)


def features_of_tasks(module, *tasks):
    """Return features and labels of the training samples of tasks of two digits, under the weights of now."""
    numbers = [number for task in tasks for number in range(48 * task, 48 * task + 48)]
    return features_of(module, IMAGES[numbers]), LABELS[numbers]
