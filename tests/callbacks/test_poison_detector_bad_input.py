"""What is wrong with a poison detector is said before training: the argument, what was got, what is allowed."""

import math

import pytest
import torch
from command_line import OPTIONS, error_of, options_for
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import DataOf, fit_stream
from poison_streams import Pairs, fit_watched
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.callbacks import PoisonDetector
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, Joint, TaskList
from tests.modules import DigitsData, Plain, quiet_trainer


class NeverTrained(Plain):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training had begun")


def _refused(match, module=NeverTrained, data=None, **arguments):
    with pytest.raises(MisconfigurationException, match=match) as caught:
        fit_watched(PoisonDetector(**arguments), module, data=data)
    return str(caught.value)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistic": "degrees"}, "`statistic` must be one of 'angle', 'slope', got 'degrees'"),
        ({"space": "weights"}, "`space` must be one of 'activation', 'parameter', got 'weights'"),
        ({"threshold": -1}, "`threshold` must be from 0 to 90, got -1"),
        ({"threshold": 91}, "`threshold` must be from 0 to 90, got 91"),
        ({"threshold": -1.0, "statistic": "slope"}, "`threshold` must be 0 or more and finite, got -1.0"),
        ({"threshold": math.nan}, "`threshold` must be .*got nan"),
        ({"threshold": math.inf, "statistic": "slope"}, "`threshold` must be .*got inf"),
        ({"calibrate_task": -1}, "`calibrate_task` must be the index of a task, counted from 0, got -1"),
        ({"calibrate_task": 1.0}, "`calibrate_task` must be the index.*got 1.0"),
        ({"calibrate_task": True}, "`calibrate_task` must be the index.*got True"),
        ({"detect_from": -1}, "`detect_from` must be the index of a task, counted from 0, got -1"),
        ({"detect_from": "2"}, "`detect_from` must be the index.*got '2'"),
        ({"calibration_runs": 0}, "`calibration_runs` must be at least 1, got 0"),
        ({"aggregate": "mean"}, "`aggregate` must be one of 'p90', 'max', .*got 'mean'"),
        ({"action": "skip"}, "`action` must be one of 'rollback', 'warn', 'stop', got 'skip'"),
        ({"calibration": "once"}, "`calibration` must be one of 'repeats', 'history', got 'once'"),
        ({"margin": 0}, "`margin` must be above 0 and finite, got 0"),
        ({"margin": -2.0}, "`margin` must be above 0 and finite, got -2.0"),
        ({"margin": math.nan}, "`margin` must be above 0 and finite, got nan"),
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"detect_from": 1}, "`calibrate_task=1` must come before.*`detect_from=1`.*`threshold`"),
        ({"detect_from": 2, "calibrate_task": 3}, "`calibrate_task=3` must come before.*`detect_from=2`"),
    ],
    ids=str,
)
def test_an_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoisonDetector(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "backbone.*"}, "`layers` must be a list of layer names or patterns, got 'backbone"),
        ({"layers": [1]}, r"`layers` must be a list of layer names or patterns, got \[1\]"),
        ({"threshold": "30"}, "`threshold` must be a number, got '30'"),
        ({"threshold": True}, "`threshold` must be a number, got True"),
        ({"margin": None}, "`margin` must be a number, got None"),
        ({"calibration_runs": None}, "`calibration_runs` must be a whole number, got None"),
        ({"calibration_runs": 2.0}, "`calibration_runs` must be a whole number, got 2.0"),
        ({"samples": "all"}, "`samples` must be a whole number, got 'all'"),
    ],
    ids=str,
)
def test_an_argument_of_another_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        PoisonDetector(**arguments)


def test_a_threshold_needs_no_task_to_calibrate_on():
    assert PoisonDetector(threshold=30, calibrate_task=99, detect_from=0).detect_from == 0


# ------------------------------------------------------------------ layers


def test_a_pattern_without_a_layer():
    error = _refused(r"`layers` has 'backbone.\*', which matches no layer of NeverTrained", layers=["backbone.*"])
    assert "'net.0', 'net.4'" in error


@pytest.mark.parametrize(("layers", "found"), [(["net.4"], "'net.4'"), ([], "none")])
@pytest.mark.parametrize("space", ["activation", "parameter"])
def test_less_than_two_layers(layers, found, space):
    _refused(f"`layers=.*must match two layers at least.*it matches {found}", layers=layers, space=space)


def test_a_module_of_one_layer():
    class Linear(NeverTrained):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 6)

    _refused("`layers=None` must match two layers at least.*it matches 'net'", Linear)


class Spare(NeverTrained):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.pair = Pair()

    def forward(self, images):
        return super().forward(self.pair(images)[0])


class Pair(nn.Module):
    def forward(self, images):
        return images, images


@pytest.mark.parametrize("layer", ["spare", "pair"])
def test_a_layer_that_puts_out_no_tensor(layer):
    _refused(f"put out a tensor for a batch.*these do not: '{layer}'", Spare, layers=["net.0", "net.4", layer])


def test_a_layer_without_weights_where_weights_are_compared():
    _refused("two layers at least that have weights.*'net.2'", layers=["net.0", "net.2"], space="parameter")


# ------------------------------------------------------------------ the stream


def test_a_fit_without_a_stream():
    trainer = quiet_trainer(callbacks=[PoisonDetector()])
    with pytest.raises(MisconfigurationException, match=r"no stream of several.*`ClassIncremental"):
        trainer.fit(NeverTrained(), datamodule=DigitsData())


def test_a_stream_of_one_task():
    with pytest.raises(MisconfigurationException, match="no stream of several"):
        fit_stream([PoisonDetector()], NeverTrained, sequence=Joint(Pairs()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibrate_task": 3}, "`calibrate_task=3` of PoisonDetector is outside the stream, whose tasks are 0 to 2"),
        ({"calibrate_task": 2}, "The task after `calibrate_task=2` of PoisonDetector is outside.*Calibrate earlier"),
        ({"detect_from": 7}, "`detect_from=7` of PoisonDetector is outside the stream, whose tasks are 0 to 2"),
        ({"detect_from": 3, "threshold": 30}, "`detect_from=3` of PoisonDetector is outside the stream"),
    ],
    ids=str,
)
def test_a_task_that_there_is_not(arguments, message):
    _refused(message, **arguments)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.rand(64), index % 2) for index in range(4)])


class IterableTraining(DataOf):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


@pytest.mark.parametrize("place", [0, 1])
def test_data_that_can_only_be_iterated(place):
    bases = [Pairs(), Pairs()]
    bases[place] = IterableTraining()
    message = rf"PoisonDetector .*the data of task {place} .*only be iterated.*`space='parameter'`"
    with pytest.raises(MisconfigurationException, match=message):
        fit_stream([PoisonDetector(threshold=30)], NeverTrained, sequence=TaskList(bases))


def test_weights_are_compared_whatever_the_data_are():
    detector = PoisonDetector(threshold=89, space="parameter")
    fit_stream([detector], Plain, sequence=TaskList([IterableTraining(), IterableTraining()]))
    assert [entry["verdict"] for entry in detector.record] == ["clean"]


# ------------------------------------------------------------------ on the command line

FIT = [*OPTIONS, "--trainer.logger=false", "--trainer.enable_checkpointing=false"]


@pytest.mark.usefixtures("_elsewhere")
def test_a_detector_is_a_callback_of_a_config(capsys):
    detector = options_for(
        "PoisonDetector", threshold=89, samples=20, layers="[model.body.*, model.head]", action="stop"
    )
    main(["fit", *FIT, *detector])
    assert "PoisonDetector: none of 4 tasks looks poisoned" in capsys.readouterr().out


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "[nothing.*]"}, "`layers` has 'nothing.*', which matches no layer of ImageClassifier"),
        ({"threshold": 100}, "`threshold` must be from 0 to 90, got 100"),
    ],
    ids=str,
)
def test_a_wrong_detector_is_one_message(arguments, message, capsys):
    error = error_of(capsys, *FIT, *options_for("PoisonDetector", **arguments))
    assert message in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("_elsewhere")
def test_a_choice_that_there_is_not_is_answered_by_the_parser(capsys):
    error = error_of(capsys, *FIT, *options_for("PoisonDetector", aggregate="mean"))
    assert "aggregate" in error
    assert "mean" in error


def test_a_sequence_may_be_given_tuples_of_layers():
    assert PoisonDetector(layers=("net.0", "net.4")).layers == ["net.0", "net.4"]


def test_a_stream_of_two_tasks_calibrates_on_the_first():
    detector = PoisonDetector(calibrate_task=0, calibration_runs=2, margin=1e3)
    fit_stream([detector], Plain, sequence=ClassIncremental(Pairs(), num_tasks=2))
    assert [entry["verdict"] for entry in detector.record] == ["calibration", "clean"]
