"""Gaussian heads beside a training that does not notice them: exact where the backbone is frozen."""

from functools import lru_cache

import pytest
import torch
from gaussian_streams import FrozenNet, assert_gaussians, features_of_tasks, fit_gaussian
from lightning.pytorch import Callback
from nearest_means import (
    TEST_IMAGES,
    TEST_LABELS,
    VAL_IMAGES,
    VAL_LABELS,
    AfterSteps,
    AtTaskEnds,
    DigitsToPredict,
    NoisyNet,
    Photographs,
    RestlessNet,
    features_of,
    predictions,
)
from numbered_streams import IMAGES, LABELS, DataOf, Numbered, fit_stream, same
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis

from lightning_cl.callbacks import ContinualMetrics, GaussianClassifier, Replay
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, Joint
from lightning_cl.heads import ClassGaussians, GaussianHead
from lightning_cl.tasks import BatchStructure

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
def test_the_head_is_the_same_whatever_the_tasks_were(covariance):
    heads = []
    for stream in STREAMS:
        gaussian, _, module = fit_gaussian(GaussianClassifier(covariance=covariance), sequence=_sequence(stream))
        heads.append(gaussian.classifier(features_of(module, TEST_IMAGES)))
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


# ------------------------------------------------------------------ training does not notice


def _run(callbacks, **settings):
    photographs = Photographs()
    settings = {"max_epochs": 2, "limit_val_batches": 1.0, "data": DigitsToPredict(), **settings}
    fit_stream([*callbacks, photographs], RestlessNet, **settings)
    return photographs.steps, photographs.end


@lru_cache
def _without_head():
    return _run([])


@CLASSIFIERS
@pytest.mark.parametrize("refresh", ["task", "epoch"])
def test_training_is_the_same_to_the_bit_with_and_without_the_head(classifier, refresh):
    head = GaussianClassifier(classifier=classifier, refresh=refresh, samples_per_class=20)
    assert same(_run([head]), _without_head())


def test_the_memory_of_a_replay_is_that_of_a_run_without_the_head():
    states = []
    for heads in ([], [GaussianClassifier(refresh="epoch")]):
        replay = Replay(20)
        fit_stream([replay, *heads], NoisyNet, DigitsToPredict())
        states.append(replay.state_dict())
    assert same(*states)


# ------------------------------------------------------------------ which samples, and when


def test_gaussians_of_past_tasks_stay_as_they_were_at_their_tasks_end():
    def compare(trainer, module, task):
        parts.append(features_of_tasks(module, task))
        features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        assert_gaussians(gaussian.gaussians, features, labels)

    gaussian, parts = GaussianClassifier(covariance="full"), []
    fit_gaussian(gaussian, NoisyNet, [AtTaskEnds(compare)], max_epochs=2)
    assert len(parts) == 3


def test_a_class_that_comes_again_is_merged_into_its_gaussian():
    sequence = DomainIncremental(DigitsToPredict(), [None, torch.Tensor.neg])
    gaussian, _, module = fit_gaussian(GaussianClassifier(covariance="full"), sequence=sequence)
    features = torch.cat([features_of(module, IMAGES), features_of(module, -IMAGES)])
    assert_gaussians(gaussian.gaussians, features, torch.cat([LABELS, LABELS]))


class Images(FrozenNet):
    """Takes images of a channel, in batches of any structure."""

    def forward(self, images):
        return super().forward(images.flatten(1))

    def training_step(self, batch, batch_idx):
        structure = BatchStructure()
        return torch.nn.functional.cross_entropy(self(structure.find_inputs(batch)), structure.find_targets(batch))

    def predict_step(self, batch, batch_idx):
        return self(BatchStructure().find_inputs(batch))


@pytest.mark.parametrize(
    "form", [lambda x, y, n: (x.view(1, 8, 8), y), lambda x, y, n: {"y": y, "image": x.view(1, 8, 8)}]
)
def test_mirror_images_are_samples_too(form):
    data = DataOf(Numbered(form))
    gaussian, _, module = fit_gaussian(GaussianClassifier(covariance="full", flips=True), Images, data=data)
    mirrored = IMAGES.view(-1, 8, 8).flip(-1).flatten(1)
    features = torch.cat([features_of(module, IMAGES), features_of(module, mirrored)])
    assert_gaussians(gaussian.gaussians, features, torch.cat([LABELS, LABELS]))


def _known_after_batches(refresh):
    def known(_):
        return None if gaussian.classifier is None else int(gaussian.classifier.known.sum())

    gaussian = GaussianClassifier(refresh=refresh)
    steps = AfterSteps(known)
    fit_gaussian(gaussian, others=[steps], max_epochs=2)
    return steps.seen


def test_a_head_is_made_at_each_tasks_end():
    assert _known_after_batches("task") == [None] * 6 + [2] * 6 + [4] * 6


def test_or_after_each_epoch_too():
    assert _known_after_batches("epoch") == [None] * 2 + [2] * 6 + [4] * 6 + [6] * 4


def test_what_is_known_of_a_task_after_an_epoch_is_not_kept():
    gaussian = GaussianClassifier(refresh="epoch")
    counts = AfterSteps(lambda _: 0 if gaussian.gaussians is None else int(gaussian.gaussians.counts.sum()))
    fit_gaussian(gaussian, others=[counts], max_epochs=2)
    assert counts.seen == [0] * 6 + [48] * 6 + [96] * 6


def test_both_ways_end_with_the_same_head():
    ends = [fit_gaussian(GaussianClassifier(refresh=refresh), NoisyNet)[0] for refresh in ("task", "epoch")]
    assert same(*(gaussian.state_dict() for gaussian in ends))


def test_validation_after_an_epoch_uses_the_gaussians_of_that_moment():
    class Validates(Callback):
        logged, expected = (), ()

        def on_validation_end(self, trainer, pl_module):
            task = trainer.datamodule.current_task.index
            gaussians = ClassGaussians(6, 24, "diagonal")
            for past, features in enumerate([*ends.seen[:task], features_of_tasks(pl_module, task)[0]]):
                gaussians.update(features, LABELS[48 * past : 48 * past + 48])
            head = GaussianHead(6, 24, "diagonal")
            head.set_gaussians(gaussians, shrinkage=1e-4)
            seen = 2 * (task + 1) > VAL_LABELS
            predicted = head(features_of(pl_module, VAL_IMAGES[seen])).argmax(1)
            self.logged = (*self.logged, float(trainer.callback_metrics["val_acc"]))
            self.expected = (*self.expected, float((predicted == VAL_LABELS[seen]).float().mean()))

    ends, validates = AtTaskEnds(lambda trainer, module, task: features_of_tasks(module, task)[0]), Validates()
    gaussian = GaussianClassifier(covariance="diagonal", refresh="epoch")
    fit_gaussian(gaussian, NoisyNet, [validates, ends], max_epochs=2, limit_val_batches=1.0)
    assert len(validates.logged) == 6
    assert validates.logged == pytest.approx(validates.expected, abs=0.02)


def test_classes_that_were_not_seen_are_never_predicted():
    def predict(trainer, module, task):
        module.eval()
        with torch.no_grad():
            scores = module(torch.cat([TEST_IMAGES, torch.zeros(1, 64), -9 * TEST_IMAGES]))
        module.train()
        assert scores[:, 2 * task + 2 :].eq(-float("inf")).all()
        assert scores[:, : 2 * task + 2].isfinite().all()

    ends = AtTaskEnds(predict)
    fit_gaussian(others=[ends])
    assert len(ends.seen) == 3


# ------------------------------------------------------------------ moving what is past


class Moves(GaussianClassifier):
    """Moves past means by 1 and keeps what it saw."""

    seen = ()

    def adapt(self, trainer, pl_module, task):
        known = [] if self.gaussians is None else self.gaussians.known.nonzero().flatten().tolist()
        self.seen = (*self.seen, (task.index, known))
        if self.gaussians is not None:
            self.gaussians.means[known] += 1


def test_past_gaussians_can_be_moved_before_the_finished_tasks_are_added():
    moves, _, _ = fit_gaussian(Moves())
    assert moves.seen == ((0, []), (1, [0, 1]), (2, [0, 1, 2, 3]))
    still, _, _ = fit_gaussian()
    moved = (moves.gaussians.means - still.gaussians.means).mean(1)
    torch.testing.assert_close(moved, torch.tensor([2, 2, 1, 1, 0, 0]).double())
    assert torch.equal(moves.classifier.means, moves.gaussians.means)


def test_how_many_numbers_are_kept_of_a_class_is_known():
    for covariance, numbers in (("full", 10 + 55), ("diagonal", 20), ("shared", 10)):
        gaussian = GaussianClassifier(covariance=covariance)
        assert gaussian.memory_per_class == 0
        fit_gaussian(gaussian)
        assert gaussian.memory_per_class == numbers
