"""Beside a Gaussian head, the tracker measures at each step what the head would say, and leaves it alone."""

import pytest
import torch
from gaussian_streams import FrozenNet, fit_gaussian
from nearest_means import NoisyNet, features_of
from numbered_streams import IMAGES, LABELS, fit_stream, same
from probed_streams import SIZE, Snapshots, assert_same_curve, curve_by_hand, fit_tracked

from lightning_cl.callbacks import GaussianClassifier, StabilityGapTracker
from lightning_cl.heads import ClassGaussians, GaussianHead
from tests.modules import DigitsData


def _tracker(**options):
    return StabilityGapTracker(**{"probe_size": SIZE, **options})


@pytest.mark.parametrize("module", [FrozenNet, NoisyNet])
def test_the_curve_is_that_of_past_gaussians_and_a_fixed_sample_of_the_task_after_each_step(module):
    def predict_at(step, images):
        like = snapshots.module(step, module())
        gaussians = ClassGaussians(6, gaussian.shape[1], "diagonal")
        for task in range(snapshots.tasks[step]):
            past = snapshots.module(6 * task + 6, module())
            numbers = range(48 * task, 48 * task + 48)
            gaussians.update(features_of(past, IMAGES[numbers]), LABELS[numbers])
        sample = snapshots.current(step)
        weights = torch.tensor(list(sample.values()))
        gaussians.update(features_of(like, IMAGES[list(sample)]), LABELS[list(sample)], weights)
        head = GaussianHead(6, gaussian.shape[1], "diagonal")
        head.set_gaussians(gaussians, 1e-2)
        return head(features_of(like, images)).argmax(1)

    snapshots, gaussian = Snapshots(), GaussianClassifier(covariance="diagonal", shrinkage=1e-2)
    tracker, _, _ = fit_tracked(_tracker(), [gaussian, snapshots], module, max_epochs=2)
    rows = [step for step in snapshots.tasks if step % 6]  # at a task's end its own Gaussians are there
    expected = curve_by_hand(snapshots, predict_at)
    measured = tracker.curve.accuracies[:, 0]
    at = torch.tensor(rows) - 1
    assert_same_curve(measured[at], expected[at])


@pytest.mark.parametrize("refresh", ["task", "epoch"])
@pytest.mark.parametrize("classifier", ["bayes", "linear"])
def test_run_and_head_are_those_of_a_run_without_the_tracker(refresh, classifier):
    ends = []
    for trackers in ([], [_tracker(compare_heads=True, nmc_refresh=3)]):
        gaussian = GaussianClassifier(refresh=refresh, classifier=classifier, samples_per_class=10)
        settings = {"max_epochs": 2, "limit_val_batches": 1.0}
        trainer, module = fit_stream([gaussian, *trackers], NoisyNet, DigitsData(), **settings)
        ends.append([gaussian.state_dict(), dict(module.state_dict()), trainer.callback_metrics["val_acc"]])
    assert same(*ends)


def test_a_sample_of_a_task_is_not_counted_beside_its_gaussians():
    """At a task's end the head has all of its data, of which the tracker's sample would be a second count."""

    class Learns(GaussianClassifier):
        counts = ()

        def on_task_end(self, trainer, pl_module, task):
            super().on_task_end(trainer, pl_module, task)
            rows = [(torch.zeros(2, 10), torch.tensor([0, 0]), torch.ones(2))]
            again = self.learn_from(trainer, rows)
            self.counts = (*self.counts, same(dict(again.state_dict()), dict(self.classifier.state_dict())))

    learns, _, _ = fit_gaussian(Learns())
    assert learns.counts == (True, True, True)
