"""Gaussian heads with modules, precisions and callbacks of all kinds."""

import pytest
import torch
from gaussian_streams import FrozenNet, fit_gaussian
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from nearest_means import NoisyNet, PredictingNet, features_of, predictions
from numbered_streams import IMAGES, LABELS, fit_stream, same, same_weights
from torch import nn

from lightning_cl.callbacks import (
    ContinualMetrics,
    Freeze,
    GaussianClassifier,
    LearningWithoutForgetting,
    Replay,
)
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import (
    CLASSIFIERS,
    DigitsData,
    Manual,
    Plain,
    PredictsLabels,
    TrainingDigits,
    WithoutValidation,
    quiet_trainer,
)


@pytest.mark.parametrize(
    ("module", "base"),
    [*CLASSIFIERS, (WithoutValidation, TrainingDigits), (Manual, DigitsData), (PredictsLabels, DigitsData)],
)
def test_the_head_tells_classes_apart_whatever_the_module(module, base):
    """After one step of each task the layer knows the last classes alone: the rest is what only the head can do."""
    seed_everything(0, verbose=False)
    metrics, gaussian = ContinualMetrics(print_table=False), GaussianClassifier(shrinkage=0.1)
    validated = {} if base is not TrainingDigits else {"val_fraction": 0.2}
    sequence = ClassIncremental(base(), num_tasks=3, **validated)
    trainer = quiet_trainer(callbacks=[Freeze(after_task=None), metrics, gaussian], max_epochs=1, limit_train_batches=1)
    trainer.fit(module(), datamodule=sequence)
    assert gaussian.classifier.known.all()
    assert metrics.matrix[2].mean() > 0.6


class Pointwise(PredictingNet):
    """Classifies by a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 12, 3, stride=2), nn.Tanh(), nn.Conv2d(12, 6, 1))

    def forward(self, images):
        return self.net(images.view(-1, 1, 8, 8)).mean((2, 3))


@pytest.mark.parametrize("classifier", ["bayes", "nearest_mean", "linear"])
def test_a_pointwise_convolution_is_a_classification_layer(classifier):
    gaussian = GaussianClassifier(classifier=classifier, samples_per_class=100)
    _, _, module = fit_gaussian(gaussian, Pointwise, [Freeze(after_task=None)])
    attached = gaussian.attach(module)
    with torch.no_grad():
        right = module.eval()(IMAGES).argmax(1) == LABELS
    attached.remove()
    assert right.float().mean() > 0.5  # a layer that has seen the last task alone knows a third


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("classifier", ["bayes", "linear"])
def test_the_head_answers_under_any_precision(precision, classifier):
    options = {"classifier": classifier, "shrinkage": 0.1, "samples_per_class": 100}
    _, trainer, module = fit_gaussian(GaussianClassifier(**options), precision=precision)
    _, exact, other = fit_gaussian(GaussianClassifier(**options))
    answers = predictions(trainer, module).argmax(1) == predictions(exact, other).argmax(1)
    assert answers.float().mean() > 0.8


def test_manual_optimisation_gives_the_head_that_the_automatic_one_does():
    heads = [fit_gaussian(module=module)[0].state_dict() for module in (Plain, Manual)]
    assert same(*heads)


def test_with_a_frozen_network_nothing_but_the_layer_moves_and_the_head_is_that_of_all_data():
    freeze, starts = Freeze(after_task=None), []

    class Starts(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            starts.append({name: value.clone() for name, value in pl_module.net[:4].state_dict().items()})

    gaussian, _, module = fit_gaussian(GaussianClassifier(covariance="full"), NoisyNet, [freeze, Starts()])
    assert same(starts[0], dict(module.net[:4].state_dict()))
    features = features_of(module, IMAGES)
    for label in range(6):
        own = features[label == LABELS]
        torch.testing.assert_close(gaussian.gaussians.means[label], own.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(gaussian.gaussians.covariances()[label], own.T.cov(), atol=1e-6, rtol=0)


def _companions(folder):
    return [
        ContinualMetrics(print_table=False),
        EarlyStopping("val_acc", mode="max", patience=1),
        ModelCheckpoint(folder, save_top_k=-1),
        Replay(20),
        LearningWithoutForgetting(),
        GaussianClassifier(),
    ]


def test_callbacks_in_any_order_give_the_same_run(tmp_path):
    ends = []
    for order in (1, -1):
        callbacks = _companions(tmp_path / str(order))[::order]
        settings = {"max_epochs": 2, "limit_val_batches": 1.0, "enable_checkpointing": True}
        _, module = fit_stream(callbacks, FrozenNet, DigitsData(), **settings)
        gaussian = next(c for c in callbacks if isinstance(c, GaussianClassifier))
        matrix = next(c for c in callbacks if isinstance(c, ContinualMetrics)).matrix
        ends.append((gaussian.state_dict(), matrix, module))
    assert same(ends[0][:2], ends[1][:2])
    assert same_weights(ends[0][2], ends[1][2])


def test_more_tasks_can_be_added_later(tmp_path):
    class Stops(ContinualCallback):
        def on_task_end(self, trainer, pl_module, task):
            if task.index == 1 and self.stops:
                trainer.should_stop = True

        stops = True

    stops = Stops()
    _, trainer, _ = fit_gaussian(others=[stops])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    stops.stops = False
    through, _, _ = fit_gaussian()
    resumed, _, _ = fit_gaussian(ckpt_path=tmp_path / "two.ckpt")
    assert same(resumed.state_dict(), through.state_dict())
