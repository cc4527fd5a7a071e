"""What is wrong with a nearest-mean head is said before training: the argument, what was got, what is allowed."""

from functools import partial

import pytest
import torch
from command_line import OPTIONS, error_of, options_for
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import AnyBatch, DataOf, fit_stream
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.callbacks import NearestMeanClassifier, Replay
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, TaskList
from tests.modules import BrightnessData, DigitsData, Plain, Regression, TwoHeads, quiet_trainer


def _refused(nearest, match, module=Plain, callbacks=(), error=MisconfigurationException, **settings):
    class NeverTrained(module):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training had begun")

    NeverTrained.__name__ = NeverTrained.__qualname__ = module.__name__
    with pytest.raises(error, match=match) as caught:
        fit_stream([nearest, *callbacks], NeverTrained, **settings)
    return str(caught.value)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prototypes": "exemplars"}, "`prototypes` must be one of 'memory.current', 'memory', 'all', got 'exemplars'"),
        ({"refresh": 0}, "`refresh` must be at least 1, got 0"),
        ({"refresh": -2}, "`refresh` must be at least 1, got -2"),
        ({"refresh": "step"}, "`refresh` must be 'epoch', 'task' or a number.*got 'step'"),
        ({"temperature": 0}, "`temperature` must be above 0, got 0"),
        ({"temperature": -1.5}, "`temperature` must be above 0, got -1.5"),
        ({"temperature": float("nan")}, "`temperature` must be above 0, got nan"),
    ],
    ids=str,
)
def test_an_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        NearestMeanClassifier(**arguments)


@pytest.mark.parametrize("refresh", [2.5, True, None], ids=str)
def test_steps_between_refreshes_are_a_whole_number(refresh):
    with pytest.raises((TypeError, ValueError), match="`refresh` must"):
        NearestMeanClassifier(refresh=refresh)


def test_what_refresh_may_be_beside_words_is_said():
    with pytest.raises(ValueError, match=r"steps|number"):
        NearestMeanClassifier(refresh="step")


# ------------------------------------------------------------------ the layer


class NoHead(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 12))


def test_no_layer_with_an_output_for_each_class():
    error = _refused(NearestMeanClassifier(), r"NearestMeanClassifier: .*of NoHead: No linear layer.*6 outputs", NoHead)
    assert "`head=...`" in error
    assert "'net.0' (Linear(in_features=64, out_features=24" in error
    assert "'net.2' (Linear(in_features=24, out_features=12" in error


def test_two_layers_that_fit():
    error = _refused(NearestMeanClassifier(), "More than one layer", TwoHeads)
    assert "'main', 'auxiliary'" in error
    assert "`head=...`" in error


class WithConvolutions(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.net(images.view(-1, 1, 8, 8))


def test_two_convolutions_that_fit():
    assert "'net.0', 'net.1'" in _refused(NearestMeanClassifier(), "More than one layer", WithConvolutions)


def test_a_name_that_is_no_layer():
    error = _refused(NearestMeanClassifier(head="fc"), r"NearestMeanClassifier: `head='fc'` names no layer of Plain")
    assert "'net.4'" in error


class Sequences(Plain):
    """Scores every pixel of a row for itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 6)

    def forward(self, images):
        return self.net(images.view(-1, 8, 8)).mean(1)


def test_a_layer_that_gets_several_rows_for_each_sample():
    error = _refused(NearestMeanClassifier(), "head", Sequences)
    assert "'net'" in error


class NeverCalled(Plain):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(24, 6)


def test_a_named_layer_through_which_no_batch_goes():
    assert "spare" in _refused(NearestMeanClassifier(head="spare"), "head", NeverCalled)


# ------------------------------------------------------------------ the stream


@pytest.mark.parametrize("callbacks", [list, lambda: [Replay()]], ids=["no replay", "replay that is off"])
def test_prototypes_from_a_memory_that_is_not_there(callbacks):
    message = r"`prototypes='memory'` of NearestMeanClassifier needs a replay memory. Add `Replay\(size=...\)`"
    _refused(NearestMeanClassifier(prototypes="memory"), message, callbacks=callbacks())


def test_a_fit_without_tasks():
    module = Plain()
    trainer = quiet_trainer(callbacks=[NearestMeanClassifier()])
    with pytest.raises(
        MisconfigurationException, match=r"NearestMeanClassifier .*no tasks.*`Joint\(your_datamodule\)`"
    ):
        trainer.fit(module, datamodule=DataOf())
    assert len(trainer.callbacks) == 1
    assert not any(layer._forward_hooks for layer in module.modules())


def test_evaluating_without_tasks_is_fine():
    quiet_trainer(callbacks=[NearestMeanClassifier()]).predict(Plain(), DataLoader(torch.zeros(3, 64)))


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(64), 0)] * 4)


class IterableTraining(DataOf):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


@pytest.mark.parametrize("place", [0, 1])
def test_data_that_can_only_be_iterated(place):
    bases = [DataOf(), DataOf()]
    bases[place] = IterableTraining()
    message = rf"NearestMeanClassifier .*the data of task {place} .*only be iterated"
    _refused(NearestMeanClassifier(head="net.4"), message, sequence=TaskList(bases))


def test_targets_that_are_no_classes():
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])
    message = r"NearestMeanClassifier.*(no class labels|no classes)"
    _refused(NearestMeanClassifier(), message, Regression, sequence=sequence)


def test_targets_that_are_no_classes_where_the_layer_is_named():
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])
    message = r"no class labels|no classes"
    nearest = NearestMeanClassifier(head="net.2")
    _refused(nearest, message, Regression, sequence=sequence, error=(MisconfigurationException, ValueError))


def test_labels_outside_the_layer():
    class Narrow(AnyBatch):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(24, 2)

    nearest = NearestMeanClassifier(head="net.4")
    error = _refused(nearest, "head", Narrow, error=(MisconfigurationException, ValueError))
    assert "'net.4'" in error
    assert "2 outputs" in error


# ------------------------------------------------------------------ the command line

FIT = [
    *OPTIONS,
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=false",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
]
head_options = partial(options_for, "NearestMeanClassifier")


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("refresh", [2, "task"])
def test_the_command_line_takes_words_and_steps(refresh):
    cli = main(["fit", *FIT, *head_options(refresh=refresh, temperature=0.1, normalize="false")])
    (nearest,) = [c for c in cli.trainer.callbacks if isinstance(c, NearestMeanClassifier)]
    assert (nearest.refresh, nearest.temperature, nearest.normalize) == (refresh, 0.1, False)
    assert nearest.classifier.known.all()


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("refresh", [2, "task"])
def test_a_configuration_file_takes_words_and_steps(refresh, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "    - class_path: Replay\n"
        "      init_args: {size: 20}\n"
        "    - class_path: NearestMeanClassifier\n"
        f"      init_args: {{refresh: {refresh}, prototypes: memory}}\n"
    )
    cli = main(["fit", "--config", str(tmp_path / "run.yaml"), *OPTIONS])
    (nearest,) = [c for c in cli.trainer.callbacks if isinstance(c, NearestMeanClassifier)]
    assert nearest.refresh == refresh
    assert nearest.classifier.known.all()


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refresh": 0}, "`refresh` must be at least 1, got 0"),
        ({"temperature": 0}, "`temperature` must be above 0, got 0"),
        ({"prototypes": "memory"}, "`prototypes='memory'` of NearestMeanClassifier needs a replay memory"),
        ({"head": "fc"}, "NearestMeanClassifier: `head='fc'` names no layer of ImageClassifier"),
    ],
    ids=str,
)
def test_a_wrong_head_is_one_message(arguments, message, capsys):
    error = error_of(capsys, *FIT, *head_options(**arguments))
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("option", ["prototypes=exemplars", "refresh=step", "temperature=warm"])
def test_a_choice_that_there_is_not_is_answered_by_the_parser(option, capsys):
    name, _, value = option.partition("=")
    error = error_of(capsys, *FIT, *head_options(), f"--trainer.callbacks.{option}")
    assert name in error
    assert value in error


@pytest.mark.usefixtures("_elsewhere")
def test_two_heads_of_one_kind_are_one_message(capsys):
    error = error_of(
        capsys,
        *FIT,
        *head_options(refresh="task"),
        *head_options(refresh=2),
    )
    assert error.startswith("error: `trainer.callbacks` has more than one NearestMeanClassifier. Take one out")
    assert error.count("\n") == 1


# ------------------------------------------------------------------ callbacks that do not go with a head


class LogsLoss(Plain):
    """Logs the loss of its validation, which is infinite where a class has no prototype."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
        super().validation_step(batch, batch_idx)


def _stream_with(stopping, nearest, **options):
    trainer = quiet_trainer(callbacks=[Replay(20), nearest, stopping])
    trainer.fit(LogsLoss(), datamodule=ClassIncremental(DigitsData(), num_tasks=3, **options))
    return trainer


@pytest.mark.parametrize(
    ("nearest", "options"),
    [
        ({"refresh": "task"}, {}),
        ({"refresh": 5}, {}),
        ({"prototypes": "memory"}, {}),
        ({}, {"eval_tasks": "all"}),
    ],
    ids=str,
)
def test_early_stopping_on_a_loss_that_is_infinite_for_want_of_prototypes(nearest, options):
    stopping = EarlyStopping("val_loss", patience=5)
    with pytest.raises(MisconfigurationException, match=r"Early stopping on 'val_loss'.*`check_finite=False`"):
        _stream_with(stopping, NearestMeanClassifier(**nearest), **options)


@pytest.mark.parametrize(
    ("stopping", "nearest"),
    [
        ({"monitor": "val_loss"}, {}),
        ({"monitor": "val_loss", "check_finite": False}, {"refresh": "task"}),
        ({"monitor": "val_acc", "mode": "max"}, {"refresh": "task"}),
    ],
    ids=str,
)
def test_early_stopping_lets_each_task_have_its_epochs_where_nothing_is_infinite(stopping, nearest):
    trainer = _stream_with(EarlyStopping(**stopping, patience=5), NearestMeanClassifier(**nearest))
    assert trainer.current_epoch == 6


def test_averaged_weights_which_prototypes_of_the_weights_in_training_would_not_fit():
    _refused(
        NearestMeanClassifier(), "NearestMeanClassifier .*WeightAveraging.*Take one out", callbacks=[WeightAveraging()]
    )
