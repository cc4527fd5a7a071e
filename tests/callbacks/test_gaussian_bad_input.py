"""What is wrong with a Gaussian head is said before training: the argument, what was got, what is allowed."""

from functools import partial

import pytest
import torch
from command_line import OPTIONS, error_of, options_for
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import DataOf, fit_stream
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.callbacks import GaussianClassifier, NearestMeanClassifier, TaskEarlyStopping
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, TaskList
from tests.modules import BrightnessData, DigitsData, Plain, Regression, TwoHeads, quiet_trainer


def _refused(gaussian, match, module=Plain, callbacks=(), **settings):
    class NeverTrained(module):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training had begun")

    NeverTrained.__name__ = NeverTrained.__qualname__ = module.__name__
    with pytest.raises(MisconfigurationException, match=match) as caught:
        fit_stream([gaussian, *callbacks], NeverTrained, **settings)
    return str(caught.value)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"covariance": "tied"}, "`covariance` must be one of 'full', 'diagonal', 'shared', got 'tied'"),
        ({"prior": "uniform"}, "`prior` must be one of 'equal', 'counts', got 'uniform'"),
        ({"classifier": "svm"}, "`classifier` must be one of 'bayes', 'nearest_mean', 'linear', got 'svm'"),
        ({"refresh": "step"}, "`refresh` must be one of 'task', 'epoch', got 'step'"),
        ({"shrinkage": -0.1}, "`shrinkage` must be 0 or more and finite, got -0.1"),
        ({"off_diagonal_shrinkage": -1}, "`off_diagonal_shrinkage` must be 0 or more and finite, got -1"),
        ({"temperature": 0}, "`temperature` must be above 0 and finite, got 0"),
        ({"samples_per_class": 0}, "`samples_per_class` must be at least 1, got 0"),
        (
            {"covariance": "diagonal", "off_diagonal_shrinkage": 1.0},
            "`off_diagonal_shrinkage=1.0` has nothing to shrink where `covariance='diagonal'`",
        ),
    ],
    ids=str,
)
def test_an_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianClassifier(**arguments)


@pytest.mark.parametrize("arguments", [{"shrinkage": "much"}, {"temperature": None}, {"samples_per_class": 2.5}])
def test_an_argument_of_another_type(arguments):
    (name,) = arguments
    with pytest.raises(TypeError, match=f"`{name}` must be a"):
        GaussianClassifier(**arguments)


# ------------------------------------------------------------------ module, data and other callbacks


def test_two_layers_that_fit():
    error = _refused(GaussianClassifier(), "GaussianClassifier: .*More than one layer", TwoHeads)
    assert "'main', 'auxiliary'" in error


def test_a_name_that_is_no_layer():
    error = _refused(GaussianClassifier(head="fc"), r"GaussianClassifier: `head='fc'` names no layer of Plain")
    assert "'net.4'" in error


def test_mirror_images_of_what_is_no_image():
    message = r"`flips=True` of GaussianClassifier mirrors images.*Tensor\(1, 64\) float32.*`flips=False`"
    _refused(GaussianClassifier(flips=True), message)


@pytest.mark.parametrize("order", [1, -1])
def test_two_heads_in_one_run_are_one_error_that_names_both(order):
    heads = [GaussianClassifier(), NearestMeanClassifier()][::order]
    error = _refused(heads[0], "One head can stand in", callbacks=heads[1:])
    assert "GaussianClassifier" in error
    assert "NearestMeanClassifier" in error


def test_averaged_weights_which_gaussians_of_the_weights_in_training_would_not_fit():
    _refused(GaussianClassifier(), "GaussianClassifier .*WeightAveraging.*Take one out", callbacks=[WeightAveraging()])


def test_a_fit_without_tasks():
    module, trainer = Plain(), quiet_trainer(callbacks=[GaussianClassifier()])
    with pytest.raises(MisconfigurationException, match=r"GaussianClassifier .*no tasks.*`Joint\(your_datamodule\)`"):
        trainer.fit(module, datamodule=DataOf())
    assert len(trainer.callbacks) == 1
    assert not any(layer._forward_hooks for layer in module.modules())


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(64), 0)] * 4)


class IterableTraining(DataOf):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


def test_data_that_can_only_be_iterated():
    message = r"GaussianClassifier .*the data of task 1 .*only be iterated"
    _refused(GaussianClassifier(head="net.4"), message, sequence=TaskList([DataOf(), IterableTraining()]))


def test_targets_that_are_no_classes():
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])
    _refused(GaussianClassifier(), r"GaussianClassifier.*(no class labels|no classes)", Regression, sequence=sequence)


# ------------------------------------------------------------------ early stopping


class LogsLoss(Plain):
    """Logs the loss of its validation, which is infinite where a class has no Gaussian."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
        super().validation_step(batch, batch_idx)


def _stream_with(stopping, gaussian, **options):
    trainer = quiet_trainer(callbacks=[gaussian, stopping])
    trainer.fit(LogsLoss(), datamodule=ClassIncremental(DigitsData(), num_tasks=3, **options))
    return trainer


@pytest.mark.parametrize("stopping", [EarlyStopping, TaskEarlyStopping])
@pytest.mark.parametrize(("refresh", "options"), [("task", {}), ("epoch", {"eval_tasks": "all"})])
def test_early_stopping_on_a_loss_that_is_infinite_for_want_of_gaussians(refresh, options, stopping):
    with pytest.raises(MisconfigurationException, match=r"Early stopping on 'val_loss'.*`check_finite=False`"):
        _stream_with(stopping("val_loss", patience=5), GaussianClassifier(refresh=refresh), **options)


@pytest.mark.parametrize(
    ("stopping", "refresh"),
    [
        ({"monitor": "val_loss"}, "epoch"),
        ({"monitor": "val_loss", "check_finite": False}, "task"),
        ({"monitor": "val_acc", "mode": "max"}, "task"),
    ],
    ids=str,
)
def test_early_stopping_lets_each_task_have_its_epochs_where_nothing_is_infinite(stopping, refresh):
    trainer = _stream_with(TaskEarlyStopping(**stopping, patience=5), GaussianClassifier(refresh=refresh))
    assert trainer.current_epoch == 6


# ------------------------------------------------------------------ the command line

FIT = [
    *OPTIONS,
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=false",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
]
head_options = partial(options_for, "GaussianClassifier")


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_elsewhere")
def test_a_configuration_file_takes_all_options(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "    - class_path: GaussianClassifier\n"
        "      init_args:\n"
        "        {covariance: full, shrinkage: 3, correlation: true, normalize: true, log_determinant: false,\n"
        "         prior: counts, temperature: 0.5, flips: true, refresh: epoch}\n"
    )
    cli = main(["fit", "--config", str(tmp_path / "run.yaml"), *FIT])
    (gaussian,) = [c for c in cli.trainer.callbacks if isinstance(c, GaussianClassifier)]
    assert gaussian.options == {
        "covariance": "full",
        "shrinkage": 3.0,
        "off_diagonal_shrinkage": 0.0,
        "correlation": True,
        "normalize": True,
        "log_determinant": False,
        "prior": "counts",
        "temperature": 0.5,
        "classifier": "bayes",
    }
    assert gaussian.classifier.known.all()


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shrinkage": -1}, "`shrinkage` must be 0 or more and finite, got -1"),
        ({"head": "fc"}, "GaussianClassifier: `head='fc'` names no layer of ImageClassifier"),
    ],
    ids=str,
)
def test_a_wrong_head_is_one_message(arguments, message, capsys):
    error = error_of(capsys, *FIT, *head_options(**arguments))
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("option", ["covariance=tied", "classifier=svm", "prior=uniform"])
def test_a_choice_that_there_is_not_is_answered_by_the_parser(option, capsys):
    name, _, value = option.partition("=")
    error = error_of(capsys, *FIT, *head_options(), f"--trainer.callbacks.{option}")
    assert name in error
    assert value in error
