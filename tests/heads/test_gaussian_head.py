"""The Gaussian head: discriminant analysis as scikit-learn does it, and never a class that was not seen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis

from lightning_cl.heads import ClassGaussians, ClassMeans, GaussianHead, NearestMeanHead, correlation, shrink

CLASSES, WIDTH, KNOWN = 5, 7, 4
KINDS = pytest.mark.parametrize("covariance", ["full", "diagonal", "shared"])
NORMALIZE = pytest.mark.parametrize("normalize", [True, False])
LABELS = torch.tensor([0, 1, 1, 2, 3, 3]).repeat(20)


def _features(count=120, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return offset + torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) @ mixing


def _shifted_by_class(features, labels=LABELS):
    return features + torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9)).double()[labels]


TRAINING = _shifted_by_class(_features())


def _gaussians(covariance="full", features=TRAINING, labels=LABELS):
    gaussians = ClassGaussians(CLASSES, features.shape[1], covariance)
    gaussians.update(features, labels)
    return gaussians


def _head(covariance="full", gaussians=None, normalize=False, log_determinant=True, temperature=1.0, **options):
    gaussians = gaussians or _gaussians(covariance)
    head = GaussianHead(*gaussians.means.shape, covariance, normalize, log_determinant, temperature)
    head.set_gaussians(gaussians, **options)
    return head


# ------------------------------------------------------------------ the scores


@KINDS
def test_scores_are_log_densities(covariance):
    gaussians, features = _gaussians(covariance), _features(seed=1)
    covariances = gaussians.covariances().expand(CLASSES, WIDTH, WIDTH) if covariance == "shared" else None
    covariances = gaussians.covariances() if covariances is None else covariances
    covariances = torch.diag_embed(covariances) if covariance == "diagonal" else covariances
    normal = torch.distributions.MultivariateNormal(gaussians.means[:KNOWN], covariances[:KNOWN])
    expected = normal.log_prob(features[:, None]) + WIDTH / 2 * torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(_head(covariance)(features)[:, :KNOWN], expected, atol=1e-5, rtol=0)


def test_full_covariances_give_the_probabilities_of_scikit_learns_qda():
    oracle = QuadraticDiscriminantAnalysis(store_covariance=True).fit(TRAINING.numpy(), LABELS.numpy())
    gaussians = _gaussians()
    # releases of scikit-learn divide by n - 1 or by n
    shares = torch.stack([torch.tensor(c).trace() for c in oracle.covariance_])
    shares /= gaussians.covariances()[:KNOWN].diagonal(dim1=1, dim2=2).sum(1)
    gaussians.scatter[:KNOWN] *= shares[:, None, None]
    probabilities = _head("full", gaussians, prior="counts")(_features(seed=1)).softmax(1)
    expected = torch.tensor(oracle.predict_proba(_features(seed=1).numpy()))
    torch.testing.assert_close(probabilities[:, :KNOWN], expected, atol=1e-8, rtol=0)
    assert (expected.max(1).values < 0.9).any()


def test_a_shared_covariance_gives_the_probabilities_of_scikit_learns_lda():
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(TRAINING.numpy(), LABELS.numpy())
    gaussians = _gaussians("shared")
    gaussians.scatter *= (len(LABELS) - KNOWN) / len(LABELS)  # it divides by the number of samples
    probabilities = _head("shared", gaussians, prior="counts")(_features(seed=1)).softmax(1)
    expected = torch.tensor(oracle.predict_proba(_features(seed=1).numpy()))
    torch.testing.assert_close(probabilities[:, :KNOWN], expected, atol=1e-8, rtol=0)
    assert (expected.max(1).values < 0.9).any()


@KINDS
@NORMALIZE
def test_with_unit_covariances_the_nearest_mean_wins(covariance, normalize):
    gaussians = _gaussians(covariance)
    identity = torch.ones(WIDTH) if covariance == "diagonal" else torch.eye(WIDTH)
    if covariance == "shared":
        gaussians.scatter = identity.double() * (len(LABELS) - KNOWN)
    else:
        classes = torch.arange(KNOWN)
        gaussians.put(classes, gaussians.means[:KNOWN], identity.expand(KNOWN, *identity.shape))
    means, nearest = ClassMeans(CLASSES, WIDTH, normalize), NearestMeanHead(CLASSES, WIDTH, normalize)
    means.counts, means.sums = gaussians.counts, gaussians.means * gaussians.counts[:, None]
    nearest.set_means(means)
    scores, features = _head(covariance, gaussians, normalize), _features(seed=1)
    assert torch.equal(scores(features).argmax(1), nearest(features).argmax(1))


def test_normalizing_is_of_features_and_means_and_not_of_covariances():
    gaussians, features = _gaussians(), _features(seed=1)
    off = F.normalize(features, dim=1)[:, None] - F.normalize(gaussians.means[:KNOWN], dim=1)
    inverse = gaussians.covariances()[:KNOWN].inverse()
    expected = -torch.einsum("nci,cij,ncj->nc", off, inverse, off) / 2
    scores = _head(gaussians=gaussians, normalize=True, log_determinant=False)(features)
    torch.testing.assert_close(scores[:, :KNOWN], expected)


def test_covariances_are_shrunk_and_then_made_correlations():
    gaussians, features = _gaussians(), _features(seed=1)
    matrices = correlation(shrink(gaussians.covariances()[:KNOWN], 3.0, 0.5))
    off = features[:, None] - gaussians.means[:KNOWN]
    expected = -torch.einsum("nci,cij,ncj->nc", off, matrices.inverse(), off) / 2
    options = {"shrinkage": 3.0, "off_diagonal_shrinkage": 0.5, "correlation": True}
    scores = _head(gaussians=gaussians, log_determinant=False, **options)(features)
    torch.testing.assert_close(scores[:, :KNOWN], expected)


@pytest.mark.parametrize("options", [{"shrinkage": 2.0}, {"correlation": True}, {}], ids=str)
def test_diagonal_covariances_are_full_ones_without_covariances(options):
    full, diagonal = _gaussians(), _gaussians("diagonal")
    full.scatter *= torch.eye(WIDTH)
    scores = [_head(g.covariance, g, **options)(_features(seed=1)) for g in (full, diagonal)]
    torch.testing.assert_close(*scores)


@KINDS
def test_scores_are_divided_by_the_temperature(covariance):
    features = _features(seed=1)
    torch.testing.assert_close(_head(covariance, temperature=4.0)(features), _head(covariance)(features) / 4)


@KINDS
def test_a_prior_by_counts_adds_the_logs_of_the_shares(covariance):
    features, shares = _features(seed=1), torch.tensor([1, 2, 1, 2]).double() / 6
    equal, counted = (_head(covariance, prior=prior)(features)[:, :KNOWN] for prior in ("equal", "counts"))
    torch.testing.assert_close(counted - equal, shares.log().expand(120, KNOWN))


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_a_stream_of_batches_gives_the_scores_of_all_samples_at_once(covariance, seed):
    gaussians = ClassGaussians(CLASSES, WIDTH, covariance)
    for part in torch.randperm(120, generator=torch.Generator().manual_seed(seed)).split(11 + seed):
        gaussians.update(TRAINING[part], LABELS[part])
    scores = _head(covariance, gaussians)(_features(seed=1))
    torch.testing.assert_close(scores, _head(covariance)(_features(seed=1)), atol=1e-8, rtol=1e-8)


@KINDS
def test_distances_are_not_lost_in_features_that_are_far_from_zero(covariance):
    head = _head(covariance, _gaussians(covariance, TRAINING + 1e4))
    expected = _head(covariance)(_features(seed=1))
    torch.testing.assert_close(head(_features(seed=1) + 1e4), expected, atol=1e-5, rtol=1e-6)


# ------------------------------------------------------------------ covariances without an inverse


@KINDS
@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("correlate", [True, False])
def test_fewer_samples_than_features_give_finite_scores(covariance, samples, correlate):
    labels = torch.arange(KNOWN).repeat(samples)
    gaussians = _gaussians(covariance, TRAINING[: len(labels)], labels)
    scores = _head(covariance, gaussians, correlation=correlate)(TRAINING[: len(labels)])
    assert scores[:, :KNOWN].isfinite().all()


def test_one_sample_of_each_class_is_enough_to_know_it_again():
    samples, labels = TRAINING[:KNOWN], torch.arange(KNOWN)
    assert torch.equal(_head(gaussians=_gaussians(features=samples, labels=labels))(samples).argmax(1), labels)


@KINDS
def test_features_that_never_vary_give_finite_scores(covariance):
    features = TRAINING * torch.tensor([1, 1, 1, 0, 1, 1, 0])
    scores = _head(covariance, _gaussians(covariance, features))(_features(seed=1))
    assert scores[:, :KNOWN].isfinite().all()


@KINDS
def test_features_that_diverged_show_and_break_nothing(covariance):
    features = TRAINING.clone()
    features[0] = torch.nan
    scores = _head(covariance, _gaussians(covariance, features))(_features(seed=1))
    assert scores[:, 0].isnan().all()
    assert covariance == "shared" or scores[:, 1:KNOWN].isfinite().all()


def test_a_singular_covariance_gets_the_least_jitter():
    gaussians = _gaussians(features=TRAINING[:20], labels=torch.arange(20) % KNOWN)
    covariances = gaussians.covariances()[:KNOWN]
    jitter = 1e-8 * covariances.diagonal(dim1=1, dim2=2).mean(1)
    inverse = (covariances + jitter[:, None, None] * torch.eye(WIDTH)).inverse()
    off = _features(seed=1)[:, None] - gaussians.means[:KNOWN]
    expected = -torch.einsum("nci,cij,ncj->nc", off, inverse, off) / 2
    scores = _head(gaussians=gaussians, log_determinant=False)(_features(seed=1))
    torch.testing.assert_close(scores[:, :KNOWN], expected, rtol=1e-5, atol=0)


# ------------------------------------------------------------------ classes that were not seen


@KINDS
@NORMALIZE
def test_a_class_without_samples_scores_minus_infinity_and_the_others_do_not(covariance, normalize):
    scores = _head(covariance, normalize=normalize)(torch.cat([_features(seed=1), torch.zeros(1, WIDTH)]))
    assert scores[:, KNOWN:].eq(-float("inf")).all()
    assert scores[:, :KNOWN].isfinite().all()


@KINDS
def test_a_head_that_knows_no_class_has_no_finite_score(covariance):
    assert GaussianHead(CLASSES, WIDTH, covariance)(_features()).eq(-float("inf")).all()


@pytest.mark.parametrize("prior", ["equal", "counts"])
@KINDS
def test_gaussians_of_no_class_make_a_head_that_knows_none(covariance, prior):
    head = _head(covariance, ClassGaussians(CLASSES, WIDTH, covariance), prior=prior)
    assert head(_features()).eq(-float("inf")).all()


# ------------------------------------------------------------------ as a part of other modules


@KINDS
def test_a_state_dict_brings_the_gaussians_into_a_fresh_head(covariance):
    fresh, features = GaussianHead(CLASSES, WIDTH, covariance), _features(seed=1)
    fresh.load_state_dict(_head(covariance).state_dict(), strict=True)
    assert torch.equal(fresh(features), _head(covariance)(features))


@KINDS
def test_a_head_has_nothing_to_train(covariance):
    assert list(_head(covariance).parameters()) == []


@KINDS
def test_a_copy_of_a_head_answers_as_it_does(covariance):
    head, features = _head(covariance), _features(seed=1)
    assert torch.equal(copy.deepcopy(head)(features), head(features))


@KINDS
def test_a_head_is_not_moved_by_the_pass_that_goes_on(covariance):
    gaussians, features = _gaussians(covariance), _features(seed=1)
    head = _head(covariance, gaussians)
    before = head(features)
    gaussians.update(_features(seed=2), LABELS)
    assert torch.equal(head(features), before)


@KINDS
@NORMALIZE
def test_a_scripted_head_gives_the_same_scores(covariance, normalize):
    head, features = _head(covariance, normalize=normalize, temperature=0.5), _features(seed=1).float()
    scripted = torch.jit.script(head)
    assert torch.equal(scripted(features), head(features))
    images = features.view(30, WIDTH, 2, 2)
    assert torch.equal(scripted(images), head(images))


@KINDS
@pytest.mark.parametrize("shape", [(120, WIDTH), (30, WIDTH, 2, 2)], ids=str)
def test_a_traced_head_gives_the_same_scores(covariance, shape):
    head, features = _head(covariance), _features(seed=1).float().view(shape)
    traced = torch.jit.trace(head, features)
    assert torch.equal(traced(features), head(features))
    assert torch.equal(traced(features[:4]), head(features[:4]))


@KINDS
def test_scores_of_an_image_are_those_of_its_mean_position(covariance):
    head, features = _head(covariance), _features(seed=1).view(20, WIDTH, 2, 3)
    scores = head(features)
    assert scores.shape == (20, CLASSES, 2, 3)
    assert torch.equal(scores[:, :, 1, 2], head(features.mean((2, 3))))


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_head_that_is_cast_with_its_module_keeps_its_precision(covariance, dtype):
    features = _features(seed=1).to(dtype)
    expected = _head(covariance)(features)
    scores = _head(covariance).to(dtype)(features)
    assert torch.equal(scores, expected)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)


def test_a_head_can_be_moved_and_made_without_storage():
    head = _head().to("meta")
    assert head.means.dtype == torch.float64
    assert head.to_empty(device="cpu").means.dtype == torch.float64


def test_gaussians_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="`gaussians` are full, the head is shared"):
        GaussianHead(CLASSES, WIDTH, "shared").set_gaussians(_gaussians("full"))
