"""The nearest-mean head: the class whose prototype is nearest, and never one that was not seen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_cl.heads import ClassMeans, NearestMeanHead, pool_positions

CLASSES, WIDTH = 5, 7
BOTH = pytest.mark.parametrize("normalize", [True, False])


def _features(count=60, seed=0, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _head(normalize=True, labels=range(CLASSES), temperature=1.0, features=None):
    """A head whose prototypes come from random features of some classes."""
    features = _features(40, seed=1) if features is None else features
    labels = torch.tensor(list(labels)).repeat(len(features))[: len(features)]
    means = ClassMeans(CLASSES, features.shape[1], normalize)
    means.update(features, labels)
    head = NearestMeanHead(CLASSES, features.shape[1], normalize, temperature)
    head.set_means(means)
    return head


# ------------------------------------------------------------------ the scores


def test_prototypes_have_length_one():
    torch.testing.assert_close(_head().prototypes.norm(dim=1), torch.ones(CLASSES), atol=1e-6, rtol=0)


@BOTH
def test_the_score_is_minus_the_squared_distance(normalize):
    head, features = _head(normalize), _features()
    rows = F.normalize(features, dim=1) if normalize else features
    distances = (rows[:, None] - head.prototypes).square().sum(2)
    torch.testing.assert_close(head(features), -distances, atol=1e-5, rtol=0)


def test_the_nearest_prototype_has_the_largest_cosine():
    head, features = _head(), _features()
    cosines = F.cosine_similarity(features[:, None], head.prototypes[None], dim=2)
    assert torch.equal(head(features).argmax(1), cosines.argmax(1))


@BOTH
def test_the_nearest_prototype_has_the_smallest_distance(normalize):
    head, features = _head(normalize), _features()
    rows = F.normalize(features, dim=1) if normalize else features
    distances = torch.cdist(rows.double(), head.prototypes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(head(features).argmax(1), distances.argmin(1))


def test_distances_are_not_lost_in_features_that_are_far_from_zero():
    head = _head(normalize=False, features=_features(40, seed=1) + 1000)
    features = _features() + 1000
    distances = torch.cdist(features.double(), head.prototypes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(head(features).argmax(1), distances.argmin(1))


def test_predictions_are_the_same_for_features_scaled_by_any_positive_factor():
    head, features = _head(), _features()
    factors = 10 ** torch.linspace(-6, 6, len(features))[:, None]
    assert torch.equal(head(features * factors).argmax(1), head(features).argmax(1))


def test_prototypes_are_the_same_for_features_scaled_by_any_positive_factor():
    features = _features(40, seed=1)
    scaled = features * 10 ** torch.linspace(-3, 3, len(features))[:, None]
    torch.testing.assert_close(_head(features=scaled).prototypes, _head(features=features).prototypes)


def test_without_normalizing_the_length_of_a_feature_counts():
    head, features = _head(normalize=False), _features()
    assert not torch.equal(head(features * 100).argmax(1), head(features).argmax(1))


@BOTH
def test_scores_are_divided_by_the_temperature(normalize):
    features = _features()
    expected = _head(normalize)(features) / 4
    torch.testing.assert_close(_head(normalize, temperature=4.0)(features), expected)


@BOTH
def test_well_separated_clusters_are_told_apart_with_one_exemplar_of_each(normalize):
    centres = 10 * torch.eye(CLASSES, WIDTH)
    head = _head(normalize, features=centres + 0.5 * _features(CLASSES, seed=2))
    labels = torch.arange(200) % CLASSES
    features = centres[labels] + 0.5 * _features(200)
    assert torch.equal(head(features).argmax(1), labels)


# ------------------------------------------------------------------ classes that were not seen


@BOTH
def test_a_class_without_samples_scores_minus_infinity_and_the_others_do_not(normalize):
    scores = _head(normalize, labels=[0, 3])(_features())
    assert scores[:, [1, 2, 4]].eq(-float("inf")).all()
    assert scores[:, [0, 3]].isfinite().all()


@BOTH
def test_a_class_without_samples_is_never_predicted(normalize):
    """Zeros in the place of its prototype would be nearer than any prototype to features near zero."""
    head = _head(normalize, labels=[0, 3], features=_features(40, seed=1).abs() + 5)
    features = torch.cat([_features() * 1e-3, -10 * _features().abs(), torch.zeros(1, WIDTH)])
    assert set(head(features).argmax(1).tolist()) <= {0, 3}


def test_a_head_that_knows_no_class_has_no_finite_score():
    assert NearestMeanHead(CLASSES, WIDTH)(_features()).eq(-float("inf")).all()


def test_a_probability_of_a_class_without_samples_is_zero():
    probabilities = _head(labels=[0, 3])(_features()).softmax(1)
    assert not probabilities[:, [1, 2, 4]].any()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(60))


# ------------------------------------------------------------------ taking means


def test_classes_without_samples_in_a_pass_keep_their_prototypes():
    head, means = _head(), ClassMeans(CLASSES, WIDTH)
    before = head.prototypes.clone()
    means.update(_features(10, seed=9), torch.full((10,), 2))
    head.set_means(means)
    assert head.known.all()
    assert torch.equal(head.prototypes[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    assert not torch.equal(head.prototypes[2], before[2])


@BOTH
def test_taking_the_same_means_twice_changes_nothing(normalize):
    means = ClassMeans(CLASSES, WIDTH, normalize)
    means.update(_features(40), torch.arange(40) % 3)
    once, twice = NearestMeanHead(CLASSES, WIDTH, normalize), NearestMeanHead(CLASSES, WIDTH, normalize)
    once.set_means(means)
    twice.set_means(means)
    twice.set_means(means)
    assert torch.equal(once.prototypes, twice.prototypes)
    assert torch.equal(once.known, twice.known)


def test_prototypes_are_not_those_of_the_pass_that_goes_on():
    means = ClassMeans(CLASSES, WIDTH, normalize=False)
    means.update(_features(40), torch.arange(40) % CLASSES)
    head = NearestMeanHead(CLASSES, WIDTH, normalize=False)
    head.set_means(means)
    before = head.prototypes.clone()
    means.sums += 5
    assert torch.equal(head.prototypes, before)


# ------------------------------------------------------------------ as a part of other modules


class Parent(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        self.backbone = nn.Linear(4, WIDTH)
        self.classifier = nn.ModuleDict({"nearest": head or NearestMeanHead(CLASSES, WIDTH)})

    def forward(self, images):
        return self.classifier["nearest"](self.backbone(images))


def test_a_parents_state_dict_brings_the_prototypes_into_a_fresh_parent():
    trained, fresh, images = Parent(_head(labels=[0, 3])), Parent(), _features(width=4)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh(images), trained(images))


def test_a_loaded_head_does_not_share_its_prototypes():
    trained, fresh = _head(), NearestMeanHead(CLASSES, WIDTH)
    fresh.load_state_dict(trained.state_dict())
    before = fresh.prototypes.clone()
    trained.prototypes.zero_()
    assert torch.equal(fresh.prototypes, before)


def test_a_loaded_head_that_takes_new_means_is_saved_with_them():
    parent, means = Parent(), ClassMeans(CLASSES, WIDTH)
    parent.load_state_dict(Parent(_head(labels=[0])).state_dict())
    means.update(_features(40), torch.arange(40) % CLASSES)
    parent.classifier["nearest"].set_means(means)
    assert parent.state_dict()["classifier.nearest.known"].all()


def test_a_head_has_nothing_to_train():
    assert list(_head().parameters()) == []


def test_a_copy_of_a_head_answers_as_it_does():
    head, features = _head(labels=[0, 3]), _features()
    assert torch.equal(copy.deepcopy(head)(features), head(features))


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_scripted_head_gives_the_same_scores(normalize, temperature):
    head, features = _head(normalize, [0, 3], temperature), _features()
    scripted = torch.jit.script(head)
    assert torch.equal(scripted(features), head(features))
    images = _features(12).view(3, WIDTH, 2, 2)
    assert torch.equal(scripted(images), head(images))


@BOTH
@pytest.mark.parametrize("shape", [(60, WIDTH), (15, WIDTH, 2, 2)], ids=str)
def test_a_traced_head_gives_the_same_scores(normalize, shape):
    head, features = _head(normalize, [0, 3]), _features().view(shape)
    traced = torch.jit.trace(head, features)
    assert torch.equal(traced(features), head(features))
    assert torch.equal(traced(features[:4]), head(features[:4]))


# ------------------------------------------------------------------ kinds of features


def test_in_place_of_a_pointwise_convolution_scores_keep_the_shape_of_its_output():
    head, features = _head(), _features(4 * 6).view(4, WIDTH, 2, 3)
    convolution = nn.Conv2d(WIDTH, CLASSES, 1)
    assert head(features).shape == convolution(features).shape


def test_scores_of_an_image_are_those_of_its_mean_position():
    head, features = _head(), _features(4 * 6).view(4, WIDTH, 2, 3)
    scores = head(features)
    torch.testing.assert_close(scores[:, :, 1, 2], head(features.mean((2, 3))))
    # what comes next in such networks: pooling, which must not change them
    torch.testing.assert_close(F.adaptive_avg_pool2d(scores, 1).flatten(1), head(features.mean((2, 3))))


def test_pooling_leaves_rows_as_they_are():
    features = _features()
    assert torch.equal(pool_positions(features), features)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_another_precision_are_scored_as_their_values_are(normalize, dtype):
    head, features = _head(normalize), _features().to(dtype)
    torch.testing.assert_close(head(features), head(features.float()), check_dtype=False)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_head_that_is_cast_with_its_module_still_scores(normalize, dtype):
    head, features = _head(normalize), _features()
    expected = head(features)
    torch.testing.assert_close(head.to(dtype)(features.to(dtype)).float(), expected, atol=0.3, rtol=0.05)


@BOTH
def test_autocast_does_not_round_the_scores(normalize):
    """Of cosines near one, half precision leaves three digits: classes that are told apart would be ties."""
    head, features = _head(normalize), _features()
    expected = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(features)
    torch.testing.assert_close(scores.float(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, WIDTH + 1), (3, WIDTH - 1), (3, 4, WIDTH), (WIDTH, 4, WIDTH)], ids=str)
@BOTH
def test_features_of_another_shape_are_an_error(normalize, shape):
    with pytest.raises((RuntimeError, ValueError)):
        _head(normalize)(torch.zeros(shape))


@BOTH
def test_means_of_another_shape_are_an_error(normalize):
    means = ClassMeans(CLASSES + 1, WIDTH, normalize)
    means.update(_features(12), torch.arange(12) % (CLASSES + 1))
    with pytest.raises((RuntimeError, ValueError)):
        NearestMeanHead(CLASSES, WIDTH, normalize).set_means(means)


@BOTH
def test_means_that_were_normalized_otherwise_are_an_error(normalize):
    means = ClassMeans(CLASSES, WIDTH, not normalize)
    means.update(_features(10), torch.arange(10) % CLASSES)
    with pytest.raises(ValueError, match="`normalize"):
        NearestMeanHead(CLASSES, WIDTH, normalize).set_means(means)
