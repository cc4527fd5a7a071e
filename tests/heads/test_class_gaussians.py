"""Means and covariances by class: one pass, whatever the batches, is as good as all samples at once."""

import pytest
import torch

from lightning_cl.heads import ClassGaussians

CLASSES, WIDTH = 5, 6
KINDS = pytest.mark.parametrize("covariance", ["full", "diagonal", "shared"])
LABELS = torch.arange(60) % 4  # no samples of the last class


def _features(count=60, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return offset + torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) @ mixing


def _gaussians(covariance="full", features=None, labels=LABELS, weights=None):
    gaussians = ClassGaussians(CLASSES, WIDTH, covariance)
    gaussians.update(_features() if features is None else features, labels, weights)
    return gaussians


def _reference_covariances(covariance, features, labels):
    """Every class by itself, with all its samples at hand."""
    if covariance == "shared":
        off = torch.cat([features[labels == label] - features[labels == label].mean(0) for label in labels.unique()])
        return off.T @ off / (len(labels) - len(labels.unique()))
    each = torch.zeros(CLASSES, WIDTH, WIDTH, dtype=torch.float64)
    for label in labels.unique():
        each[label] = features[labels == label].T.cov()
    return each if covariance == "full" else each.diagonal(dim1=1, dim2=2)


def _assert_close(first, second, tolerance=1e-8):
    for name in ("counts", "means", "scatter"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ the values


@KINDS
def test_covariances_are_the_unbiased_ones(covariance):
    gaussians = _gaussians(covariance)
    torch.testing.assert_close(gaussians.covariances(), _reference_covariances(covariance, _features(), LABELS))


def test_means_and_counts_are_those_of_the_samples():
    gaussians = _gaussians()
    assert gaussians.counts.tolist() == [15, 15, 15, 15, 0]
    assert gaussians.known.tolist() == [True] * 4 + [False]
    for label in range(4):
        torch.testing.assert_close(gaussians.means[label], _features()[label == LABELS].mean(0))


@KINDS
def test_a_class_of_a_single_sample_has_no_covariance(covariance):
    gaussians = _gaussians(covariance, _features(1), torch.tensor([2]))
    assert not gaussians.covariances().any()
    assert torch.equal(gaussians.means[2], _features(1)[0])


@KINDS
def test_without_samples_nothing_is_known_and_nothing_fails(covariance):
    gaussians = ClassGaussians(CLASSES, WIDTH, covariance)
    gaussians.update(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.long))
    assert not gaussians.known.any()
    assert not gaussians.covariances().any()


@KINDS
def test_a_weight_is_how_many_samples_a_row_stands_for(covariance):
    weights = torch.tensor([1, 2, 3]).repeat(20)
    repeated = _gaussians(covariance, _features().repeat_interleave(weights, 0), LABELS.repeat_interleave(weights))
    _assert_close(_gaussians(covariance, weights=weights), repeated)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_less_precision_are_taken_as_their_values_are(dtype):
    features = _features().to(dtype)
    _assert_close(_gaussians(features=features), _gaussians(features=features.double()), 0)


# ------------------------------------------------------------------ one pass


@KINDS
@pytest.mark.parametrize("seed", range(5))
def test_any_split_into_batches_gives_what_all_samples_at_once_give(covariance, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(60, generator=generator)
    cuts = torch.randperm(59, generator=generator)[: 3 + 4 * seed].add(1).sort().values
    gaussians = ClassGaussians(CLASSES, WIDTH, covariance)
    for part in order.tensor_split(cuts):
        gaussians.update(_features()[part], LABELS[part])
    _assert_close(gaussians, _gaussians(covariance))


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_passes_over_parts_are_merged_to_a_pass_over_all(covariance, seed):
    total = ClassGaussians(CLASSES, WIDTH, covariance)
    for part in torch.randperm(60, generator=torch.Generator().manual_seed(seed)).split(17):
        total.add(_gaussians(covariance, _features()[part], LABELS[part]))
    _assert_close(total, _gaussians(covariance))


@KINDS
def test_passes_over_different_classes_are_put_side_by_side(covariance):
    low = LABELS < 2
    total = _gaussians(covariance, _features()[low], LABELS[low])
    total.add(_gaussians(covariance, _features()[~low], LABELS[~low]))
    _assert_close(total, _gaussians(covariance))


@KINDS
def test_features_far_from_zero_lose_no_digits(covariance):
    """Sums of squares would: they leave nothing of a variance of 1 beside a mean of 1e8."""
    gaussians = ClassGaussians(CLASSES, WIDTH, covariance)
    for part in torch.arange(60).split(7):
        gaussians.update(_features(offset=1e8)[part], LABELS[part])
    expected = _gaussians(covariance, _features(offset=1e8) - 1e8)
    torch.testing.assert_close(gaussians.covariances(), expected.covariances(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("covariance", ["full", "shared"])
def test_scatter_is_symmetric_to_the_bit(covariance):
    total = ClassGaussians(CLASSES, WIDTH, covariance)
    for part in torch.arange(60).split(7):
        total.update(_features()[part], LABELS[part])
    total.add(_gaussians(covariance, _features(seed=1)))
    assert torch.equal(total.scatter, total.scatter.mT)


def test_another_kind_is_not_added():
    with pytest.raises(ValueError, match="`other` has diagonal covariances"):
        _gaussians("full").add(_gaussians("diagonal"))


# ------------------------------------------------------------------ other values


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_what_was_put_is_what_there_is(covariance):
    gaussians, other = _gaussians(covariance), _gaussians(covariance, _features(seed=3))
    classes = torch.tensor([1, 3])
    before = _gaussians(covariance)
    gaussians.put(classes, other.means[classes], other.covariances()[classes])
    assert torch.equal(gaussians.means[classes], other.means[classes])
    torch.testing.assert_close(gaussians.covariances()[classes], other.covariances()[classes])
    assert torch.equal(gaussians.counts, before.counts)
    assert torch.equal(gaussians.scatter[[0, 2]], before.scatter[[0, 2]])


def test_a_matrix_that_is_put_becomes_symmetric():
    gaussians = _gaussians()
    gaussians.put(torch.tensor([0]), torch.zeros(1, WIDTH), torch.rand(1, WIDTH, WIDTH))
    assert torch.equal(gaussians.scatter, gaussians.scatter.mT)


def test_classes_without_samples_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"`classes` must have samples, and some of \[4\] have none"):
        _gaussians().put(torch.tensor([4]), torch.zeros(1, WIDTH), torch.zeros(1, WIDTH, WIDTH))


def test_a_shared_covariance_cannot_be_replaced():
    with pytest.raises(ValueError, match="these share one"):
        _gaussians("shared").put(torch.tensor([0]), torch.zeros(1, WIDTH), torch.zeros(1, WIDTH, WIDTH))


def test_values_of_another_shape_cannot_be_put():
    with pytest.raises(ValueError, match=r"`means` and `covariances` .*\(1, 6\) and \(1, 6, 6\), got .*\(1, 6\)"):
        _gaussians().put(torch.tensor([0]), torch.zeros(1, WIDTH), torch.zeros(1, WIDTH))


@KINDS
def test_what_is_drawn_has_the_gaussian_of_its_class(covariance):
    gaussians = _gaussians(covariance)
    drawn = gaussians.draw(2, 40_000, torch.Generator().manual_seed(0))
    expected = gaussians.covariances()
    expected = expected if covariance == "shared" else expected[2]
    expected = expected.diag() if covariance == "diagonal" else expected
    torch.testing.assert_close(drawn.mean(0), gaussians.means[2], atol=0.1, rtol=0)
    assert (drawn.T.cov() - expected).norm() < 0.05 * expected.norm()


def test_draws_of_a_class_without_covariance_are_its_mean():
    gaussians = _gaussians(features=_features(1), labels=torch.tensor([2]))
    assert torch.equal(gaussians.draw(2, 3, torch.Generator()), _features(1).expand(3, WIDTH))


# ------------------------------------------------------------------ saved


@KINDS
def test_what_was_saved_is_loaded_to_the_bit(covariance):
    gaussians = _gaussians(covariance)
    loaded = ClassGaussians.from_state(gaussians.state_dict())
    _assert_close(loaded, gaussians, 0)


@pytest.mark.parametrize(("covariance", "numbers"), [("full", 6 + 21), ("diagonal", 6 + 6), ("shared", 6)])
def test_a_state_holds_no_more_numbers_than_it_says(covariance, numbers):
    gaussians = _gaussians(covariance)
    state = gaussians.state_dict()
    assert gaussians.numbers_per_class == numbers
    shared = 21 if covariance == "shared" else 0
    held = sum(state[name].untyped_storage().nbytes() for name in ("means", "scatter"))
    assert held == 8 * (4 * numbers + shared)


@KINDS
def test_a_saved_state_is_not_moved_by_what_comes_later(covariance):
    gaussians = _gaussians(covariance)
    state = gaussians.state_dict()
    gaussians.update(_features(seed=1), LABELS)
    _assert_close(ClassGaussians.from_state(state), _gaussians(covariance), 0)


def test_loading_replaces_all_that_there_was():
    gaussians = _gaussians(features=_features(10), labels=torch.full((10,), 4))
    gaussians.load_state_dict(_gaussians().state_dict())
    _assert_close(gaussians, _gaussians(), 0)


def test_a_state_of_another_kind_is_not_loaded():
    with pytest.raises(ValueError, match=r"`state` is of .*'diagonal', 5, 6.*'full', 5, 6"):
        _gaussians("full").load_state_dict(_gaussians("diagonal").state_dict())


# ------------------------------------------------------------------ bad input


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="`covariance` must be one of 'full', 'diagonal', 'shared', got 'half'"):
        ClassGaussians(CLASSES, WIDTH, "half")


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"`features` must have the shape \(batch, 6\)"):
        _gaussians(features=torch.zeros(3, 4), labels=torch.zeros(3))


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(ValueError, match=f"`labels` must be from 0 to 4, got {label} to {label}"):
        _gaussians(features=torch.zeros(1, WIDTH), labels=torch.tensor([label]))
