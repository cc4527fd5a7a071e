"""A head stands in for whatever layer has the name: a new one, a compiled one; and says when it cannot."""

import warnings

import pytest
import torch
from lightning.pytorch import seed_everything
from nearest_means import TEST_IMAGES, AtTaskEnds, PredictingNet, fit_nearest, predictions
from numbered_streams import fit_stream
from torch import nn

from lightning_cl.callbacks import ContinualMetrics, NearestMeanClassifier, Replay, StabilityGapTracker
from tests.modules import DigitsData, quiet_trainer


class RenewsItsLayer(PredictingNet):
    """Begins each task with a new classification layer, as some methods do."""

    def on_task_start(self, task):
        self.net[4] = nn.Linear(24, 6)


class ConstantLayer(RenewsItsLayer):
    """Its new layers always answer 5."""

    def on_task_start(self, task):
        super().on_task_start(task)
        with torch.no_grad():
            self.net[4].weight.zero_()
            self.net[4].bias.copy_(torch.eye(6)[5])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.2)


def test_a_module_that_renews_its_layer_is_measured_with_both_heads():
    seed_everything(0, verbose=False)
    tracker = StabilityGapTracker(probe_size=10, compare_heads=True)
    metrics = ContinualMetrics(print_table=False, compare_heads=True)
    callbacks = [Replay(20), NearestMeanClassifier(), tracker, metrics]
    fit_stream(callbacks, ConstantLayer, DigitsData(), limit_val_batches=1.0)
    assert metrics.linear_matrix.tril()[0, 0] == 0  # the layer answers 5
    assert metrics.matrix[0, 0] > 0.5
    assert (tracker.curve.accuracies[:3, 1, 0] == 0).all()
    assert tracker.curve.accuracies[2, 0, 0] > 0.5


def test_after_the_fit_nothing_is_left_on_the_new_layer_or_the_old():
    layers = []
    record = AtTaskEnds(lambda trainer, module, task: layers.append(module.net[4]))
    _, _, module = fit_nearest(module=RenewsItsLayer, others=[record])
    assert len({id(layer) for layer in [*layers, module.net[4]]}) == 3
    assert not any(layer._forward_hooks for layer in layers)


class Compiled(PredictingNet):
    """Counts how often its network is compiled."""

    def __init__(self):
        super().__init__()
        self.graphs = 0
        self.compiled = torch.compile(self.answer, backend=self.count)

    def count(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def answer(self, images):
        return self.net[4](self.net[2](self.net[0](images)))

    def forward(self, images):
        return self.compiled(images)


class NotCompiled(Compiled):
    def forward(self, images):
        return self.answer(images)


def test_a_compiled_network_is_not_compiled_again_for_each_head():
    torch.compiler.reset()
    tracker = StabilityGapTracker(probe_size=10, compare_heads=True)
    _, _, module = fit_nearest(module=Compiled, others=[tracker], max_epochs=1, limit_val_batches=1.0)
    assert 0 < module.graphs < torch._dynamo.config.cache_size_limit  # there compiling ends, with a warning
    plain = StabilityGapTracker(probe_size=10, compare_heads=True)
    fit_nearest(module=NotCompiled, others=[plain], max_epochs=1, limit_val_batches=1.0)
    torch.testing.assert_close(tracker.curve.accuracies, plain.curve.accuracies, equal_nan=True)


@pytest.mark.parametrize("call", ["test", "predict"])
def test_a_callback_that_has_learnt_nothing_says_that_the_layer_answers(call):
    _, trainer, module = fit_nearest()
    fresh = quiet_trainer(callbacks=[NearestMeanClassifier()])
    with pytest.warns(UserWarning, match="NearestMeanClassifier has no head yet.*`ckpt_path"):
        getattr(fresh, call)(module, datamodule=trainer.datamodule)


def test_a_callback_that_has_a_head_says_nothing():
    _, trainer, module = fit_nearest()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no head yet.*")
        scores = predictions(trainer, module)
    assert scores.shape == (len(TEST_IMAGES), 6)
