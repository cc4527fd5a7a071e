"""Means of features by class: every sample counts once, whatever the batches and processes."""

import pytest
import torch

from lightning_cl.heads import ClassMeans

BOTH = pytest.mark.parametrize("normalize", [True, False])


def _samples(count=97, classes=5, width=7):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator) * 10 ** torch.rand(count, 1, generator=generator)
    return features.double(), torch.randint(classes, (count,), generator=generator)


def _summed(parts, normalize=True, classes=5, width=7):
    means = ClassMeans(classes, width, normalize)
    for features, labels in parts:
        means.update(features, labels)
    return means


def _split(features, labels, sizes):
    return list(zip(features.split(sizes), labels.split(sizes), strict=True))


def _reference_means(features, labels, normalize, classes=5):
    rows = features.double()
    if normalize:
        rows = rows / rows.norm(dim=1, keepdim=True)
    means = torch.stack([rows[labels == label].mean(0) for label in range(classes)])
    return means / means.norm(dim=1, keepdim=True) if normalize else means


@BOTH
def test_means_are_those_of_each_class(normalize):
    features, labels = _samples()
    means = _summed([(features, labels)], normalize).compute()
    torch.testing.assert_close(means, _reference_means(features, labels, normalize), atol=1e-12, rtol=0)


@BOTH
@pytest.mark.parametrize("sizes", [[1] * 97, [90, 7], [1, 64, 32], [50, 0, 47], [97]], ids=len)
def test_batches_of_any_sizes_give_the_means_of_one_pass(normalize, sizes):
    features, labels = _samples()
    order = labels.argsort()  # so that a class is in few batches, of very different numbers
    parts = _split(features[order], labels[order], sizes)
    expected = _reference_means(features, labels, normalize)
    torch.testing.assert_close(_summed(parts, normalize).compute(), expected, atol=1e-12, rtol=0)


@BOTH
@pytest.mark.parametrize("sizes", [[1] * 97, [90, 7], [50, 0, 47]], ids=len)
def test_features_in_single_precision_are_summed_without_rounding(normalize, sizes):
    features, labels = _samples()
    one_pass = _summed([(features.float(), labels)], normalize).compute()
    in_batches = _summed(_split(features.float(), labels, sizes), normalize).compute()
    torch.testing.assert_close(in_batches, one_pass, atol=1e-12, rtol=0)
    torch.testing.assert_close(one_pass, _reference_means(features, labels, normalize), atol=1e-6, rtol=0)


@BOTH
@pytest.mark.parametrize("sizes", [[96, 1], [60, 30, 7], [49, 0, 48]], ids=str)
def test_sums_of_several_processes_give_the_means_of_one(normalize, sizes):
    features, labels = _samples()
    total = _summed([], normalize)
    for part in _split(features, labels, sizes):
        total.add(_summed([part], normalize))
    assert torch.equal(total.counts, labels.bincount(minlength=5))
    torch.testing.assert_close(total.compute(), _reference_means(features, labels, normalize), atol=1e-12, rtol=0)


def test_adding_leaves_the_other_sums_as_they_are():
    features, labels = _samples()
    other = _summed([(features, labels)])
    before = other.state_dict()
    total = _summed([(features, labels)])
    total.add(other)
    total.update(features, labels)
    assert torch.equal(other.sums, before["sums"])
    assert torch.equal(other.counts, before["counts"])


def test_normalized_means_have_length_one():
    features, labels = _samples()
    lengths = _summed([(features, labels)]).compute().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(5, dtype=torch.float64), atol=1e-14, rtol=0)


def test_a_long_feature_weighs_as_much_as_a_short_one_where_features_are_normalized():
    features, labels = _samples()
    factors = torch.linspace(0.01, 100, len(labels))[:, None]
    scaled, plain = (_summed([(rows, labels)]).compute() for rows in (features * factors, features))
    torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=0)


def test_without_normalizing_a_long_feature_weighs_more():
    means = _summed([(torch.tensor([[0.0, 9.0], [1.0, 0.0]]), torch.zeros(2).long())], False, 1, 2)
    assert means.compute().tolist() == [[0.5, 4.5]]


@BOTH
def test_a_class_without_samples_has_zeros_and_no_count(normalize):
    means = _summed([(torch.ones(3, 7), torch.tensor([0, 0, 4]))], normalize)
    assert means.counts.tolist() == [2, 0, 0, 0, 1]
    assert not means.compute()[1:4].any()


def test_means_of_nothing_are_zeros():
    assert torch.equal(_summed([]).compute(), torch.zeros(5, 7, dtype=torch.float64))


def test_computing_changes_nothing():
    means = _summed([_samples()])
    assert torch.equal(means.compute(), means.compute())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_in_double_precision_whatever_the_features(dtype):
    features = torch.full((2000, 1), 0.1, dtype=dtype)  # in half precision the sum would stand still long before
    means = _summed([(features, torch.zeros(2000).long())], False, 1, 1).compute()
    assert means.dtype == torch.float64
    torch.testing.assert_close(means[0, 0], features[0, 0].double(), atol=1e-12, rtol=0)


def test_features_are_not_kept_for_backward():
    features = torch.ones(2, 7, requires_grad=True) * 2
    means = _summed([(features, torch.tensor([0, 1]))])
    assert not means.sums.requires_grad


def test_features_and_labels_are_left_as_they_are():
    features, labels = _samples()
    copies = features.clone(), labels.clone()
    _summed([(features, labels)])
    assert torch.equal(features, copies[0])
    assert torch.equal(labels, copies[1])


@BOTH
def test_a_saved_pass_goes_on_as_if_it_had_not_been_interrupted(normalize):
    first, second = _split(*_samples(), [40, 57])
    through = _summed([first, second], normalize)
    again = ClassMeans(5, 7, normalize)
    again.load_state_dict(_summed([first], normalize).state_dict())
    again.update(*second)
    assert torch.equal(again.sums, through.sums)
    assert torch.equal(again.counts, through.counts)


def test_a_saved_state_is_not_moved_by_the_pass_that_goes_on():
    features, labels = _samples()
    means = _summed([(features, labels)])
    state = means.state_dict()
    loaded = ClassMeans(5, 7)
    loaded.load_state_dict(state)
    sums, counts = state["sums"].clone(), state["counts"].clone()
    means.update(features, labels)
    loaded.update(features, labels)
    assert torch.equal(state["sums"], sums)
    assert torch.equal(state["counts"], counts)


@pytest.mark.parametrize(
    ("features", "labels"),
    [((3, 6), (3,)), ((3, 8), (3,)), ((3, 7), (4,)), ((3, 7), (3, 1)), ((7,), (1,)), ((3, 7, 1, 1), (3,))],
    ids=str,
)
def test_shapes_that_do_not_go_together_are_shown(features, labels):
    with pytest.raises(
        ValueError, match=r"`features` must have the shape \(batch, 7\) and `labels` \(batch,\)"
    ) as error:
        ClassMeans(5, 7).update(torch.zeros(features), torch.zeros(labels).long())
    assert f"got {features} and {labels}" in str(error.value)


@pytest.mark.parametrize("labels", [[0, 5], [-1, 4]], ids=str)
def test_labels_outside_the_classes_are_refused_before_anything_is_added(labels):
    means = ClassMeans(5, 7)
    with pytest.raises(ValueError, match=rf"`labels` must be from 0 to 4, got {min(labels)} to {max(labels)}"):
        means.update(torch.ones(2, 7), torch.tensor(labels))
    assert not means.sums.any()
    assert not means.counts.any()


def test_a_weight_says_for_how_many_samples_one_stands():
    features, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 4])
    copies = torch.tensor([3, 1, 2, 2, 5, 1])
    weighed, repeated = ClassMeans(5, 4), ClassMeans(5, 4)
    weighed.update(features, labels, copies)
    repeated.update(features.repeat_interleave(copies, 0), labels.repeat_interleave(copies))
    torch.testing.assert_close(weighed.compute(), repeated.compute())
    assert torch.equal(weighed.counts, repeated.counts)


def test_weights_below_one_make_the_same_means():
    features, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 4])
    whole, parts = ClassMeans(5, 4, normalize=False), ClassMeans(5, 4, normalize=False)
    whole.update(features, labels)
    parts.update(features, labels, torch.full((6,), 0.01))
    torch.testing.assert_close(parts.compute(), whole.compute())
