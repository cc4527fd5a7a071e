"""A detector watches modules as people write them, and leaves nothing on them."""

import pytest
import torch
from nearest_means import NoisyNet
from poison_streams import fit_watched, watching

from lightning_cl.callbacks import PoisonDetector
from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import (
    BrightnessData,
    DictDigits,
    DictModule,
    DigitsData,
    HuggingFaceDict,
    HuggingFaceLike,
    Manual,
    OwnTransfer,
    Plain,
    PredictsLabels,
    Regression,
    ShiftingDigits,
    TokenDigits,
    TorchvisionModule,
    TwoHeads,
    quiet_trainer,
)


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (DictModule, DictDigits),
        (HuggingFaceLike, TokenDigits),
        (HuggingFaceDict, TokenDigits),
        (Plain, ShiftingDigits),
        (OwnTransfer, DigitsData),
        (Manual, DigitsData),
        (PredictsLabels, DigitsData),
        (TwoHeads, DigitsData),
        (TorchvisionModule, DigitsData),
    ],
)
def test_an_unchanged_module_is_watched_and_its_last_task_undone(module, data):
    detector = PoisonDetector(threshold=0.0, detect_from=1)
    trainer = quiet_trainer(callbacks=[detector], max_epochs=1, limit_train_batches=1)
    trainer.fit(module(), datamodule=ClassIncremental(data(), num_tasks=2))
    [entry] = detector.record
    assert (entry["verdict"], entry["kept"]) == ("poisoned", False)
    assert len(entry["shifts"]) >= 2


def test_a_regression_is_watched():
    detector = PoisonDetector(threshold=89.9)
    trainer = quiet_trainer(callbacks=[detector], max_epochs=1)
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg], eval_loaders="per_task")
    trainer.fit(Regression(), datamodule=sequence)
    assert [entry["verdict"] for entry in detector.record] == ["clean"]


# ------------------------------------------------------------------ nothing is left


class Breaks(ContinualCallback):
    """Raises in the second task, in one hook."""

    def __init__(self, hook):
        setattr(self, hook, self._break)

    def _break(self, trainer, *args):
        if trainer.datamodule.current_task.index == 1:
            raise RuntimeError("broken")
        return True


def _traces(module):
    hooks = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]
    return [
        {name: [len(getattr(layer, hook)) for hook in hooks] for name, layer in module.named_modules()},
        {name: frozenset(vars(layer)) for name, layer in module.named_modules() if name},
        {name for name, value in vars(module).items() if callable(value) and name != "_trainer"},
        {name: layer.training for name, layer in module.named_modules()},
        {name: (id(parameter), parameter.requires_grad) for name, parameter in module.named_parameters()},
    ]


@pytest.mark.parametrize("space", ["activation", "parameter"])
def test_nothing_is_left_on_the_module_after_a_fit(space):
    module = NoisyNet()
    before = _traces(module)
    fit_watched(PoisonDetector(calibration_runs=2, margin=1e-6, space=space), module)
    assert _traces(module) == before


@pytest.mark.parametrize("hook", ["on_task_start", "on_train_batch_end", "accept_task", "on_task_end"])
def test_nothing_is_left_on_the_module_after_an_exception(hook):
    module, detector = NoisyNet(), PoisonDetector(calibration_runs=2)
    before = _traces(module)
    with pytest.raises(RuntimeError, match="broken"):
        fit_watched(detector, module, others=[Breaks(hook)])
    assert _traces(module) == before
    with pytest.raises(RuntimeError, match="outside a fit"):
        _ = detector.stream


class BreaksInside(Plain):
    """Raises while its outputs are looked at, in the second task."""

    def forward(self, images):
        if self.trainer.datamodule.current_task.index == 1 and not self.training:
            raise RuntimeError("broken")
        return super().forward(images)


def test_nothing_is_left_after_an_exception_in_the_measurement():
    module = BreaksInside()
    before = _traces(module)
    with pytest.raises(RuntimeError, match="broken"):
        fit_watched(PoisonDetector(threshold=30), module)
    assert _traces(module) == before


def test_after_an_exception_the_same_detector_fits_again():
    detector = watching()
    with pytest.raises(RuntimeError, match="broken"):
        fit_watched(detector, others=[Breaks("on_task_end")])
    fit_watched(detector)
    assert [entry["task"] for entry in detector.record] == [0, 1, 2]


def test_the_network_that_was_compared_with_is_let_go_after_a_fit():
    detector = watching()
    fit_watched(detector)
    assert detector.state_dict()["before"] == {}
