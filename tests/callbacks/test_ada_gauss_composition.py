"""AdaGauss and its pieces beside the other callbacks of the suite, from Python and from YAML."""

import pytest
import torch
from command_line import OPTIONS
from feature_streams import Narrow, NarrowNoisy, ada_gauss, fit_images
from lightning.pytorch.callbacks import EarlyStopping
from numbered_streams import same, same_weights
from regularised_streams import Notes

from lightning_cl.callbacks import (
    AntiCollapse,
    ContinualMetrics,
    ElasticWeightConsolidation,
    GaussianClassifier,
    LearningWithoutForgetting,
    PoisonDetector,
    ProjectedDistillation,
    Replay,
    StabilityGapTracker,
    TaskEarlyStopping,
)
from lightning_cl.cli import main

OBSERVERS = {
    "StabilityGapTracker": lambda: StabilityGapTracker(probe_size=10),
    "compared heads": lambda: StabilityGapTracker(probe_size=10, compare_heads=True),
    "ContinualMetrics": lambda: ContinualMetrics(print_table=False, compare_heads=True),
}
SETS = {
    "AdaGauss": [ada_gauss],
    "AdaGauss and replay": [ada_gauss, lambda: Replay(20)],
    "AdaGauss and a detector": [ada_gauss, lambda: PoisonDetector(calibration_runs=2)],
    "both pieces": [AntiCollapse, lambda: ProjectedDistillation(expansion=4)],
    "LwF and anti-collapse": [LearningWithoutForgetting, AntiCollapse],
    "EWC and anti-collapse": [ElasticWeightConsolidation, AntiCollapse],
    "replay and distillation": [lambda: Replay(20), lambda: ProjectedDistillation(expansion=4)],
    "Gaussians and anti-collapse": [GaussianClassifier, AntiCollapse],
}
FAST = {"AdaGauss and replay", "both pieces", "LwF and anti-collapse"}


def _end(callbacks, module):
    states = {callback.state_key: callback.state_dict() for callback in callbacks}
    return dict(module.state_dict()), states, torch.get_rng_state()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("refresh", [pytest.param("task", marks=pytest.mark.slow), "epoch"])
def test_observers_do_not_disturb_it(name, refresh):
    runs = []
    for observers in ([], [OBSERVERS[name]()]):
        callback = ada_gauss(refresh=refresh)
        _, module = fit_images([callback, *observers], NarrowNoisy, limit_val_batches=1.0, max_epochs=2)
        runs.append(_end([callback], module))
    assert same(*runs)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SETS])
def test_any_order_of_callbacks_gives_the_same_end(name):
    runs = []
    for turn in (1, -1):
        metrics = ContinualMetrics(print_table=False)
        others = [EarlyStopping("val_acc", mode="max", patience=1), StabilityGapTracker(probe_size=10)]
        callbacks = [metrics, *(make() for make in SETS[name])]
        _, module = fit_images([*callbacks, *others][::turn], NarrowNoisy, limit_val_batches=1.0, max_epochs=3)
        runs.append(_end(callbacks, module))
    assert same(*runs)


def test_both_pieces_train_as_the_whole_does():
    pieces = [AntiCollapse(task_classes_only=True), ProjectedDistillation(expansion=4)]
    whole, parts = (fit_images(callbacks)[1] for callbacks in ([ada_gauss()], pieces))
    for name, weights in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "make", [LearningWithoutForgetting, ElasticWeightConsolidation], ids=lambda kind: kind.__name__
)
def test_terms_of_several_callbacks_add_up(make):
    gradients = []
    for callbacks in ([make()], [AntiCollapse()], [make(), AntiCollapse()], []):
        notes = Notes()
        fit_images([*callbacks, notes], lambda: Narrow(lr=0.0), max_epochs=1)
        gradients.append(notes.gradients[4])
    first, second, both, none = gradients
    for one, two, sum_of_both, own in zip(first, second, both, none, strict=True):
        torch.testing.assert_close(sum_of_both - one, two - own, rtol=1e-3, atol=1e-5)


def test_an_early_stopping_ends_a_task_and_the_gaussians_are_those_of_its_end():
    callback = ada_gauss()
    stopping = TaskEarlyStopping("val_acc", mode="min", patience=1, min_delta=2)
    trainer, _ = fit_images([callback, stopping], max_epochs=5, limit_val_batches=1.0)
    assert trainer.current_epoch == 6
    assert callback.gaussians.known.all()


def test_beside_a_memory_the_gaussians_are_of_the_tasks_own_images():
    callback = ada_gauss()
    fit_images([callback, Replay(20)])
    assert callback.gaussians.counts.tolist() == [48.0] * 6  # and their mirror images


def test_it_leaves_an_untouched_fit_where_it_has_no_weight():
    runs = []
    for callbacks in ([], [ProjectedDistillation(weight=0, task_classes_only=False), AntiCollapse(weight=0)]):
        runs.append(fit_images(callbacks, NarrowNoisy)[1])
    assert same_weights(*runs)


# ------------------------------------------------------------------ YAML

CONFIGS = {
    "AdaGauss": """
trainer:
  callbacks:
    - class_path: AdaGauss
      init_args:
        distillation: 10
        adapt: full
        classifier: bayes
        adapter_epochs: 3
        adapter_milestones: [0.3, 0.6, 0.9]
        samples: 200
""",
    "pieces": """
trainer:
  callbacks:
    - class_path: AntiCollapse
      init_args: {weight: 0.5}
    - class_path: ProjectedDistillation
      init_args: {weight: 10, expansion: 4, reduction: sum}
""",
}


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [["--trainer.fast_dev_run=true"], pytest.param([], marks=pytest.mark.slow)],
    ids=["dry run", "run"],
)
def test_a_configuration_runs(name, options, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIGS[name])
    main(["fit", f"--config={config}", *OPTIONS, "--model.bottleneck=5", *options])
