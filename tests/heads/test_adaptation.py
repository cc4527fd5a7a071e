import torch
from torch import nn

from lightning_cl.heads import ClassGaussians, FeatureAdapter, GaussianHead, adapt_gaussians

WIDTH = 6
SAMPLES = 20_000
ERROR = 4 / SAMPLES**0.5  # four standard errors of a mean of unit variance


def old_features(seed=1, classes=5, rows=400):
    """Draw features of five classes, with means and covariances of their own that the seed does not change."""
    of_classes, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    features, labels = [], []
    for label in range(classes):
        root = torch.randn(WIDTH, WIDTH, generator=of_classes, dtype=torch.float64) / WIDTH**0.5
        root += torch.diag(torch.linspace(0.2, 1.2, WIDTH, dtype=torch.float64))
        centre = 1.2 * torch.randn(WIDTH, generator=of_classes, dtype=torch.float64)
        features.append(torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) @ root.t() + centre)
        labels.append(torch.full((rows,), label))
    return torch.cat(features), torch.cat(labels)


def drift(seed=3):
    """A known change of the feature space: rotated, stretched and shifted."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 5
    matrix = torch.matrix_exp(turns - turns.t()) * torch.linspace(0.7, 1.5, WIDTH, dtype=torch.float64)
    shift = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return matrix, shift


def gaussians_of(features, labels):
    gaussians = ClassGaussians(num_classes=7, width=WIDTH)
    gaussians.update(features, labels)
    return gaussians


def adapted(adapt, adapter, **options):
    generator = torch.Generator().manual_seed(5)
    gaussians = gaussians_of(*old_features())
    return gaussians, adapt_gaussians(gaussians, adapter, adapt, SAMPLES, generator, **options)


def affine():
    matrix, shift = drift()
    return lambda features: features @ matrix.t().to(features) + shift.to(features)


def relative(error, wanted):
    return (error.norm() / wanted.norm()).item()


def test_an_adapter_that_changes_nothing_leaves_gaussians_up_to_the_sampling_error():
    gaussians, moved = adapted("full", nn.Identity())
    assert (moved.means - gaussians.means).abs().max() < ERROR * gaussians.covariances().diagonal(0, 1, 2).max().sqrt()
    assert relative(moved.covariances() - gaussians.covariances(), gaussians.covariances()) < ERROR
    assert torch.equal(moved.counts, gaussians.counts)


def test_full_adaptation_recovers_means_and_covariances_of_a_known_drift():
    matrix, shift = drift()
    gaussians, moved = adapted("full", affine())
    known = gaussians.known
    assert relative(moved.means[known] - (gaussians.means[known] @ matrix.t() + shift), gaussians.means) < ERROR
    wanted = matrix @ gaussians.covariances()[known] @ matrix.t()
    assert relative(moved.covariances()[known] - wanted, wanted) < ERROR


def test_adaptation_of_means_alone_keeps_covariances():
    matrix, shift = drift()
    gaussians, moved = adapted("mean", affine())
    known = gaussians.known
    torch.testing.assert_close(moved.means[known], gaussians.means[known] @ matrix.t() + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.covariances(), gaussians.covariances())


def test_diagonal_adaptation_takes_variances_and_keeps_correlations():
    matrix, _ = drift()
    gaussians, moved = adapted("diag", affine())
    known = gaussians.known
    wanted = (matrix @ gaussians.covariances()[known] @ matrix.t()).diagonal(0, 1, 2)
    assert relative(moved.covariances()[known].diagonal(0, 1, 2) - wanted, wanted) < ERROR

    def correlations(covariances):
        scales = covariances.diagonal(0, 1, 2).rsqrt()
        return covariances * scales[:, :, None] * scales[:, None, :]

    torch.testing.assert_close(correlations(moved.covariances()[known]), correlations(gaussians.covariances()[known]))


def test_no_adaptation_changes_nothing():
    gaussians, kept = adapted("none", affine())
    assert torch.equal(kept.means, gaussians.means)
    assert torch.equal(kept.scatter, gaussians.scatter)
    assert kept.means is not gaussians.means


def test_the_given_gaussians_stay_as_they_are():
    gaussians, _ = adapted("full", affine())
    again = gaussians_of(*old_features())
    assert torch.equal(gaussians.means, again.means)
    assert torch.equal(gaussians.scatter, again.scatter)


def test_shrinkage_adds_to_the_variances():
    _, plain = adapted("full", nn.Identity())
    _, shrunk = adapted("full", nn.Identity(), shrinkage=0.5)
    added = shrunk.covariances()[0] - plain.covariances()[0]
    mean = plain.covariances()[0].diagonal().mean()
    torch.testing.assert_close(added, 0.5 * mean * torch.eye(WIDTH, dtype=torch.float64))


def test_the_same_generator_gives_the_same_bits():
    assert torch.equal(adapted("full", affine())[1].scatter, adapted("full", affine())[1].scatter)


def test_gaussians_of_no_class_are_returned_as_they_are():
    empty = ClassGaussians(num_classes=3, width=WIDTH)
    assert not adapt_gaussians(empty, nn.Identity(), "full").known.any()


def test_old_classes_are_told_apart_the_better_the_more_is_adapted():
    matrix, shift = drift()
    test_features, labels = old_features(seed=2)
    moved_features = test_features @ matrix.t() + shift

    def accuracy(adapt):
        head = GaussianHead(num_classes=7, width=WIDTH)
        head.set_gaussians(adapted(adapt, affine())[1])
        return (head(moved_features).argmax(1) == labels).double().mean().item()

    none, mean, full = accuracy("none"), accuracy("mean"), accuracy("full")
    assert none + 0.1 < mean
    assert mean + 0.02 < full


def test_an_adapter_has_the_paper_s_shape():
    adapter = FeatureAdapter(width=64)
    assert [tuple(weight.shape) for weight in adapter.parameters()] == [(2048, 64), (2048,), (64, 2048), (64,)]
    assert isinstance(adapter.activation, nn.GELU)
