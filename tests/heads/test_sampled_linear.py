"""A linear head trained on what is drawn from Gaussians."""

import pytest
import torch

from lightning_cl.heads import ClassGaussians
from lightning_cl.heads.sampled_linear import LinearHead, fit_linear

CLASSES, WIDTH = 4, 6


def _clusters(covariance="full", labels=(0, 1, 3)):
    labels = torch.tensor(labels).repeat(40)
    features = 4 * torch.eye(CLASSES, WIDTH)[labels]
    features = features + torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(0))
    gaussians = ClassGaussians(CLASSES, WIDTH, covariance)
    gaussians.update(features, labels)
    return gaussians, features, labels


def _fit(covariance="full", seed=0):
    return fit_linear(_clusters(covariance)[0], 60, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("covariance", ["full", "diagonal", "shared"])
def test_it_tells_classes_apart_whose_samples_it_never_saw(covariance):
    _, features, labels = _clusters()
    assert (_fit(covariance)(features).argmax(1) == labels).float().mean() > 0.95


def test_a_class_without_samples_has_no_weight_and_a_logit_of_minus_infinity():
    head = _fit()
    assert not head.weight[2].any()
    assert head(torch.randn(5, WIDTH))[:, 2].eq(-float("inf")).all()


def test_the_generator_alone_decides():
    torch.manual_seed(1)
    first = _fit()
    torch.manual_seed(2)
    assert torch.equal(_fit().weight, first.weight)
    assert not torch.equal(_fit(seed=1).weight, first.weight)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    _fit()
    LinearHead(3, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_learns_where_gradients_are_switched_off_and_in_mixed_precision():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        head = _fit()
    assert torch.equal(head.weight, _fit().weight)


def test_nothing_of_it_is_left_to_train():
    assert not any(parameter.requires_grad for parameter in _fit().parameters())


def test_features_that_diverged_show_and_break_nothing():
    gaussians, _, _ = _clusters()
    gaussians.update(torch.full((1, WIDTH), torch.nan), torch.tensor([0]))
    assert fit_linear(gaussians, 10, torch.Generator())(torch.zeros(1, WIDTH))[:, 0].isnan()


def test_gaussians_of_no_class_give_no_finite_logit():
    head = fit_linear(ClassGaussians(CLASSES, WIDTH), 10, torch.Generator())
    assert head(torch.zeros(1, WIDTH)).eq(-float("inf")).all()


def test_scores_of_an_image_are_those_of_its_mean_position():
    head, features = _fit(), torch.randn(3, WIDTH, 2, 2)
    assert torch.equal(head(features)[:, :, 1, 0], head(features.mean((2, 3))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_takes_features_of_another_precision(dtype):
    assert _fit()(torch.zeros(1, WIDTH, dtype=dtype)).dtype == dtype
