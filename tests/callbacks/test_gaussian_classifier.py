"""Gaussian heads beside a training that does not notice them: exact where the backbone is frozen."""

import pytest
import torch
from gaussian_streams import TEST_IMAGES, DigitsToPredict, fit_gaussian
from nearest_means import (
    TEST_LABELS,
    features_of,
    predictions,
)
from numbered_streams import IMAGES, LABELS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis

from lightning_cl.callbacks import ContinualMetrics, GaussianClassifier
from lightning_cl.datamodules import ClassIncremental, Joint

KINDS = pytest.mark.parametrize("covariance", ["full", "diagonal", "shared"])
CLASSIFIERS = pytest.mark.parametrize("classifier", ["bayes", "nearest_mean", "linear"])
STREAMS = {
    "three tasks": {"num_tasks": 3},
    "another order": {"num_tasks": 3, "class_order": [5, 2, 0, 4, 1, 3]},
    "a task for each class": {"num_tasks": 6, "class_order": [3, 1, 4, 0, 5, 2]},
    "a large first task": {"first_task_classes": 4, "classes_per_task": 1},
}


def _sequence(stream):
    return Joint(DigitsToPredict()) if stream == "joint" else ClassIncremental(DigitsToPredict(), **STREAMS[stream])


# ------------------------------------------------------------------ exact where the backbone is frozen


@pytest.mark.parametrize("stream", [*STREAMS, "joint"])
def test_a_stream_gives_scikit_learns_lda_of_all_samples(stream):
    # which divides the scatter by the number of samples, and so has distances that are greater by as much
    gaussian = GaussianClassifier(shrinkage=0.0, prior="counts", temperature=138 / 144)
    _, _, module = fit_gaussian(gaussian, sequence=_sequence(stream))
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(features_of(module, IMAGES).numpy(), LABELS.numpy())
    tested = features_of(module, TEST_IMAGES)
    expected = torch.from_numpy(oracle.predict_proba(tested.numpy()))
    torch.testing.assert_close(gaussian.classifier(tested).softmax(1), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("stream", [*STREAMS, "joint"])
def test_a_stream_gives_scikit_learns_qda_of_all_samples(stream):
    gaussian = GaussianClassifier(covariance="full", shrinkage=0.0)
    _, _, module = fit_gaussian(gaussian, sequence=_sequence(stream))
    oracle = QuadraticDiscriminantAnalysis(store_covariance=True).fit(
        features_of(module, IMAGES).numpy(), LABELS.numpy()
    )
    means, covariances = gaussian.gaussians.means.numpy(), gaussian.gaussians.covariances()
    # releases of scikit-learn divide by n - 1 or by n
    share = float(oracle.covariance_[0][0, 0] / covariances[0, 0, 0])
    for label in range(6):
        expected = torch.from_numpy(oracle.covariance_[label]) / share
        torch.testing.assert_close(covariances[label], expected, atol=1e-8, rtol=0)
    assert means == pytest.approx(oracle.means_, abs=1e-8)


@KINDS
@CLASSIFIERS
def test_the_head_is_the_same_whatever_the_tasks_were(covariance, classifier):
    heads = []
    for stream in STREAMS:
        gaussian = GaussianClassifier(covariance=covariance, classifier=classifier, samples_per_class=20)
        gaussian, _, module = fit_gaussian(gaussian, sequence=_sequence(stream))
        scores = gaussian.classifier(features_of(module, TEST_IMAGES))
        heads.append(gaussian.gaussians.means if classifier == "linear" else scores)
    for head in heads[1:]:
        torch.testing.assert_close(head, heads[0], atol=1e-8, rtol=1e-8)


def test_predictions_are_those_of_the_head():
    gaussian, trainer, module = fit_gaussian()
    expected = gaussian.classifier(features_of(module, TEST_IMAGES).float())
    torch.testing.assert_close(predictions(trainer, module), expected)
    (tested,) = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    accuracy = float((expected.argmax(1) == TEST_LABELS).float().mean())
    assert tested["test_acc"] == pytest.approx(accuracy)
    assert accuracy > 0.7


@CLASSIFIERS
def test_each_classifier_is_better_than_the_layer_that_forgot(classifier):
    metrics = ContinualMetrics(print_table=False, compare_heads=True)
    fit_gaussian(GaussianClassifier(classifier=classifier), others=[metrics], limit_val_batches=1.0, max_epochs=3)
    assert metrics.matrix[-1].mean() > metrics.linear_matrix[-1].mean() + 0.2
