"""What AdaGauss and its pieces refuse, in a sentence that says what to do."""

import re

import pytest
import torch
from feature_streams import WIDTH, Images, Narrow, ada_gauss, fit_images
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import same_weights
from torch import nn
from torch.utils.data import TensorDataset

from lightning_cl.callbacks import (
    AdaGauss,
    AntiCollapse,
    EarlyExits,
    GaussianClassifier,
    NearestMeanClassifier,
    ProjectedDistillation,
    Replay,
)
from lightning_cl.datamodules import ClassIncremental, Joint, TaskList
from tests.modules import BrightnessData, DigitsData, Plain, Regression, quiet_trainer

PIECES = {"AdaGauss": ada_gauss, "AntiCollapse": AntiCollapse, "ProjectedDistillation": ProjectedDistillation}
EVERY_KIND = pytest.mark.parametrize("make", PIECES.values(), ids=PIECES)
WITH_SPREAD = pytest.mark.parametrize("make", [ada_gauss, AntiCollapse], ids=["AdaGauss", "AntiCollapse"])


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("distillation", -1, ValueError),
        ("distillation", "10", TypeError),
        ("anti_collapse", -0.1, ValueError),
        ("anti_collapse", None, TypeError),
        ("bound", 0, ValueError),
        ("adapt", "all", ValueError),
        ("adapt", True, ValueError),
        ("classifier", "svm", ValueError),
        ("shrinkage", -1, ValueError),
        ("shrinkage", float("nan"), ValueError),
        ("expansion", 0, ValueError),
        ("expansion", 1.5, TypeError),
        ("adapter_epochs", 0, ValueError),
        ("adapter_epochs", "3", TypeError),
        ("adapter_lr", 0, ValueError),
        ("adapter_milestones", (0.5, 2), ValueError),
        ("adapter_milestones", 0.5, TypeError),
        ("adapter_milestones", ("a",), TypeError),
        ("samples", 0, ValueError),
        ("samples", None, TypeError),
        ("adapter_epochs", None, TypeError),
        ("expansion", None, TypeError),
        ("reduction", "none", ValueError),
        ("warmup", 1.5, ValueError),
        ("warmup", -0.1, ValueError),
        ("refresh", "step", ValueError),
    ],
)
def test_an_argument_out_of_its_range_is_named(argument, value, error):
    with pytest.raises(error, match=f"`{argument}"):
        AdaGauss(**{argument: value})


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: AntiCollapse(weight=-1), "weight"),
        (lambda: AntiCollapse(weight="1"), "weight"),
        (lambda: AntiCollapse(bound=0), "bound"),
        (lambda: ProjectedDistillation(weight=-1), "weight"),
        (lambda: ProjectedDistillation(expansion=0), "expansion"),
        (lambda: ProjectedDistillation(reduction="max"), "reduction"),
    ],
)
def test_an_argument_of_a_piece_is_named_as_the_user_wrote_it(make, argument):
    with pytest.raises((ValueError, TypeError), match=f"`{argument}"):
        make()


@WITH_SPREAD
def test_a_batch_that_is_not_larger_than_the_features_is_refused_before_the_first_step(make):
    class Wide(Narrow):
        def __init__(self):
            super().__init__()
            self.net[4], self.net[5] = nn.Linear(12, 16), nn.Linear(16, 6)

        def training_step(self, batch, batch_idx):
            raise AssertionError("a step was taken")

    message = r"in task 0 .* a batch has 16 samples, while `head='net.5'` gets 16 features. Use a larger `batch_size`"
    with pytest.raises(MisconfigurationException, match=message):
        fit_images([make()], Wide)


@WITH_SPREAD
def test_a_task_with_fewer_samples_than_features_is_refused_before_the_first_step(make):
    class Few(Images):
        def dataset(self, first, count):
            images, labels = super().dataset(first, count).tensors
            kept = torch.ones(len(labels), dtype=torch.bool)
            kept[(labels == 5).nonzero()[WIDTH:]] = False
            return TensorDataset(images[kept], labels[kept])

    sequence = ClassIncremental(Few(), classes_per_task=[5, 1])
    with pytest.raises(MisconfigurationException, match=f"in task 1 .* a batch has {WIDTH} samples.* {WIDTH} features"):
        fit_images([make()], sequence=sequence)


def test_fewer_samples_than_features_are_refused_before_the_first_step():
    with pytest.raises(MisconfigurationException, match=f"`samples={WIDTH}` of AdaGauss .* {WIDTH} features"):
        fit_images([ada_gauss(samples=WIDTH)])


@EVERY_KIND
def test_a_head_that_is_not_there_is_named_with_those_that_are(make):
    callback = make()
    for part in (callback, getattr(callback, "regulariser", callback)):
        part.head = "fc"
    with pytest.raises(MisconfigurationException, match=rf"{type(callback).__name__}: .*'fc'.*'net.5'"):
        fit_images([callback])


@EVERY_KIND
def test_a_head_that_cannot_be_told_is_asked_for(make):
    class Twins(Narrow):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(WIDTH, 6)

    with pytest.raises(MisconfigurationException, match=rf"{type(make()).__name__}: .*`head=...`"):
        fit_images([make()], Twins)


@EVERY_KIND
def test_a_step_that_does_not_call_the_head_is_refused(make):
    class Other(Narrow):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(WIDTH, 7)

        def training_step(self, batch, batch_idx):
            return self.other(self.features(batch[0])).square().mean()

    with pytest.raises(ValueError, match=rf"{type(make()).__name__} reads .*`training_step` did not call that layer"):
        fit_images([make()], Other)


@EVERY_KIND
def test_regression_is_refused(make):
    with pytest.raises(MisconfigurationException, match=f"{type(make()).__name__} needs class labels"):
        fit_images([make()], Regression, sequence=TaskList([BrightnessData(), BrightnessData()]))


def test_flips_of_what_is_no_image_are_refused():
    class Flat(Plain):
        def __init__(self):
            super().__init__()
            self.net[0], self.net[4] = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 6)

    with pytest.raises(MisconfigurationException, match="`flips=True` of AdaGauss mirrors images"):
        fit_images([ada_gauss()], Flat, DigitsData())
    fit_images([ada_gauss(flips=False)], Flat, DigitsData())


# ------------------------------------------------------------------ combinations


@pytest.mark.parametrize("other", [NearestMeanClassifier, GaussianClassifier], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("turn", [1, -1])
def test_another_head_is_refused(other, turn):
    callbacks = [ada_gauss(), other()]
    with pytest.raises(MisconfigurationException, match="One head can stand in") as caught:
        fit_images([Replay(20), *callbacks[::turn]])
    assert {"AdaGauss", other.__name__} <= set(re.findall(r"\w+", str(caught.value)))


@EVERY_KIND
@pytest.mark.parametrize("turn", [1, -1])
def test_early_exits_are_refused(make, turn):
    callbacks = [make(), EarlyExits(layers=["net.2"], regime="joint")]
    with pytest.raises(MisconfigurationException, match=r"exits"):
        fit_images(callbacks[::turn])


def test_a_piece_beside_the_whole_is_refused():
    for piece in (AntiCollapse, ProjectedDistillation):
        with pytest.raises(MisconfigurationException, match=f"AdaGauss.*{piece.__name__}"):
            fit_images([ada_gauss(), piece()])


# ------------------------------------------------------------------ without tasks


@WITH_SPREAD
def test_a_fit_without_a_task_sequence_is_told_to_have_one(make):
    trainer = quiet_trainer(callbacks=[make()], max_epochs=1)
    with pytest.raises(MisconfigurationException, match=rf"{type(make()).__name__} .*`Joint\(your_datamodule\)`"):
        trainer.fit(Narrow(), datamodule=Images())


def test_a_fit_without_a_task_sequence_has_nothing_to_distil():
    runs = []
    for callbacks in ([], [ProjectedDistillation()]):
        torch.manual_seed(1)
        module = Narrow()
        quiet_trainer(callbacks=callbacks, max_epochs=1).fit(module, datamodule=Images())
        runs.append(module)
    assert same_weights(*runs)


@EVERY_KIND
def test_a_joint_fit_is_one_task(make):
    notes = make()
    fit_images([notes], sequence=Joint(Images()))
    assert getattr(notes, "regulariser", notes).classes == tuple(range(6))


def test_an_adapter_that_diverges_is_an_error_that_names_its_learning_rate():
    with pytest.raises(ValueError, match=r"AdaGauss cannot bring Gaussians along with task 1 .* smaller `adapter_lr`"):
        fit_images([ada_gauss(adapter_lr=1e30, adapter_epochs=5)])


def test_a_count_of_samples_for_a_linear_head_must_be_one():
    with pytest.raises(TypeError, match="`samples_per_class` must be a whole number, got None"):
        AdaGauss(classifier="linear", samples_per_class=None)
