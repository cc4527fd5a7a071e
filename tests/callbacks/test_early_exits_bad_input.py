"""What is wrong with exits is said before the first step: the argument, what was got, what is allowed."""

import re

import pytest
import torch
from command_line import OPTIONS, error_of, options_for
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import fit_stream
from torch import nn

from lightning_cl.callbacks import EarlyExits, NearestMeanClassifier, Replay
from lightning_cl.cli import main
from lightning_cl.datamodules import DomainIncremental
from tests.modules import BrightnessData, DigitsData, Manual, Plain, Regression, TwoHeads, quiet_trainer


def _refused(exits, match, module=Plain, callbacks=(), **settings):
    class NeverTrained(module):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training had begun")

    NeverTrained.__name__ = NeverTrained.__qualname__ = module.__name__
    with pytest.raises(MisconfigurationException, match=match) as caught:
        fit_stream([exits, *callbacks], NeverTrained, **{"data": DigitsData(), "max_epochs": 2, **settings})
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, r"`layers` must be a list of layer names, or as in 'auto:3', got \[\]"),
        ({"layers": "net.0"}, "`layers` must be a list of layer names, or as in 'auto:3', got 'net.0'"),
        ({"layers": "auto:0"}, "`layers` must be a list of layer names, or as in 'auto:3', got 'auto:0'"),
        ({"regime": "both"}, "`regime` must be one of 'disjoint', 'joint', 'mixed', got 'both'"),
        ({"head": "big"}, "`head` must be one of 'pool', 'conv', 'linear', got 'big'"),
        ({"loss_weights": "deep"}, "`loss_weights` must be one of 'uniform', 'sdn', got 'deep'"),
        ({"loss_weights": [1.0, -0.5]}, r"`loss_weights` must be 0 or more and finite, got \[1.0, -0.5\]"),
        ({"loss_weights": [1.0, float("nan")]}, r"`loss_weights` must be 0 or more and finite, got \[1.0, nan\]"),
        ({"threshold": 1.1}, "`threshold` must be from 0 to 1, got 1.1"),
        ({"threshold": -0.1}, "`threshold` must be from 0 to 1, got -0.1"),
        ({"threshold": float("nan")}, "`threshold` must be from 0 to 1, got nan"),
        ({"confidence": "margin"}, "`confidence` must be one of 'max_softmax', 'entropy', 'patience', got 'margin'"),
        ({"phase_epochs": [3]}, r"`phase_epochs` must have 2 numbers from 1 for `regime='mixed'`.*got \[3\]"),
        ({"phase_epochs": [3, 0]}, r"`phase_epochs` must have 2 numbers from 1 .*got \[3, 0\]"),
        ({"regime": "joint", "phase_epochs": [1, 1]}, "`phase_epochs` must have 1 numbers from 1 for `regime='joint'`"),
    ],
    ids=str,
)
def test_an_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyExits(**{"layers": ["net.0"], **arguments})


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("layers", [3], "a list of layer names, or as in 'auto:3'"),
        ("layers", 3, "a list of layer names, or as in 'auto:3'"),
        ("loss_weights", None, "'uniform', 'sdn' or a list of numbers"),
        ("loss_weights", 0.5, "'uniform', 'sdn' or a list of numbers"),
        ("loss_weights", [1.0, "2"], "'uniform', 'sdn' or a list of numbers"),
        ("phase_epochs", 5, "a list of whole numbers, one for each phase, or None"),
        ("phase_epochs", [2.5, 1], "a list of whole numbers, one for each phase, or None"),
        ("phase_epochs", [True, 1], "a list of whole numbers, one for each phase, or None"),
        ("threshold", True, "a number from 0 to 1, None, or as in 'auto:0.5pp'"),
        ("threshold", [0.5], "a number from 0 to 1, None, or as in 'auto:0.5pp'"),
    ],
)
def test_an_argument_of_another_kind(argument, value, allowed):
    with pytest.raises(TypeError, match=re.escape(f"`{argument}` must be {allowed}, got {value!r}.")):
        EarlyExits(**{"layers": ["net.0"], argument: value})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["nett.0"], r"EarlyExits: `layers`: 'nett.0' matches no layer of Plain\. Nearest names: 'net.0'"),
        (["net.4"], "`layers`: 'net.4' is the classification layer"),
        (["net.0", "net"], "`layers`: 'net' comes after the classification layer 'net.4'"),
    ],
    ids=str,
)
def test_layers_that_can_have_no_exit(layers, message):
    _refused(EarlyExits(layers), message)


class Totals(Plain):
    def __init__(self):
        super().__init__()
        self.total = nn.Flatten(0)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.net(images + 0 * self.total(images).sum())


def test_more_exits_than_there_are_places():
    _refused(EarlyExits("auto:4"), "EarlyExits: `layers='auto:4'` asks for 4 exits, and Plain has 1 places")


@pytest.mark.parametrize(("layer", "reason"), [("total", "puts out no row for each of 8"), ("unused", "is not called")])
def test_a_layer_that_puts_out_no_rows_or_nothing(layer, reason):
    _refused(EarlyExits([layer]), f"EarlyExits: `layers`: '{layer}' {reason}", Totals)


def test_two_layers_that_could_be_the_classifier():
    error = _refused(EarlyExits(["net.0"]), "More than one layer", TwoHeads)
    assert "'main', 'auxiliary'" in error
    assert "Name it with `classifier=...`" in error


def test_a_classifier_that_there_is_not():
    _refused(EarlyExits(["net.0"], classifier="fc"), "EarlyExits: `classifier='fc'` names no layer of Plain")


def test_targets_that_are_no_classes():
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])
    _refused(EarlyExits(["net.0"]), "EarlyExits: .*no class labels", Regression, sequence=sequence)


def test_a_head_of_ones_own_for_other_features():
    exits = EarlyExits(["net.0"], head=nn.Linear(16, 6))
    _refused(exits, r"EarlyExits: `head` \(Linear\) does not take features of shape \(batch, 24\): .*2x24 and 16x6")


def test_patience_with_one_exit():
    _refused(EarlyExits(["net.0"], confidence="patience"), "`confidence='patience'` .*at least 2 exits, got 1")


def test_weights_for_another_number_of_heads():
    _refused(EarlyExits(["net.0"], loss_weights=[1.0]), "`loss_weights` must have 2 numbers, .*got 1")


@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_tasks_too_short_for_the_phases(regime):
    _refused(EarlyExits(["net.0"], regime), f"`regime='{regime}'` needs 2 epochs.* task 0 has 1", max_epochs=1)


def test_phases_that_do_not_add_up():
    exits = EarlyExits(["net.0"], phase_epochs=[2, 3])
    _refused(exits, r"`phase_epochs=\[2, 3\]` adds up to 5 epochs, and task 0 has 4", max_epochs=4)


def test_phases_of_tasks_that_are_counted_in_steps():
    exits = EarlyExits(["net.0"])
    _refused(exits, "trains in phases, and the epochs of task 0 are unknown", max_epochs=-1, max_steps=6)


@pytest.mark.parametrize("callbacks", [[], [EarlyStopping("val_acc")]], ids=["alone", "early stopping"])
def test_tasks_that_may_end_before_their_heads_are_trained(callbacks):
    message = "`regime='mixed'` trains in phases of epochs, and `max_steps` may end a task before"
    _refused(EarlyExits(["net.0"]), message, callbacks=callbacks, max_steps=4)


class HasTheName(Plain):
    early_exits = None


def test_a_module_that_has_the_attribute():
    _refused(EarlyExits(["net.0"]), "has an attribute 'early_exits' already", HasTheName)


def test_manual_optimisation():
    _refused(EarlyExits(["net.0"]), "Manual optimises manually", Manual)


def test_a_fit_without_tasks():
    trainer = quiet_trainer(callbacks=[EarlyExits(["net.0"])])
    with pytest.raises(MisconfigurationException, match=r"EarlyExits .* this fit has no tasks.*Joint"):
        trainer.fit(Plain(), datamodule=DigitsData())


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        ([], "of a run without EarlyExits"),
        ([EarlyExits(["net.1"], "joint")], r"exits with layers=\['net.1'\], this .*\['net.0'\]"),
    ],
    ids=["no exits", "other exits"],
)
def test_a_checkpoint_of_another_run(saved, match, tmp_path):
    trainer, _ = fit_stream(saved, Plain, DigitsData(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    _refused(EarlyExits(["net.0"], "joint"), match, ckpt_path=tmp_path / "other.ckpt")


def test_averaged_weights():
    _refused(
        EarlyExits(["net.0"]), "WeightAveraging copies the module before EarlyExits", callbacks=[WeightAveraging()]
    )


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"correction": "tlc"}], ids=str)
def test_two_that_would_answer(options):
    message = "EarlyExits and NearestMeanClassifier would both answer"
    _refused(EarlyExits(["net.0"], **options), message, callbacks=[NearestMeanClassifier()])


class LooksAcross(Plain):
    """Takes the mean over the batch away after its first layer."""

    def forward(self, images):
        hidden = self.net[0](images)
        hidden = hidden - hidden.mean(0)
        return self.net[1:](hidden)


class Skips(Plain):
    """Goes around its first layer."""

    def __init__(self):
        super().__init__()
        self.around = nn.Linear(64, 24)

    def forward(self, images):
        return self.net[1:](self.net[0](images) + self.around(images))


@pytest.mark.parametrize("module", [LooksAcross, Skips])
def test_rows_that_cannot_be_taken_out_stay_with_a_warning_that_names_the_layer(module):
    exits = EarlyExits(["net.0", "net.2"], "joint", threshold=0.3)
    with pytest.warns(UserWarning, match="Samples cannot leave the batch at 'net.0'"):
        trainer, _ = fit_stream([Replay(20), exits], module, DigitsData(), limit_val_batches=1.0)
    assert exits.network.mixing_layer == "net.0"
    assert float(trainer.callback_metrics["val_acc"]) >= 0


# ------------------------------------------------------------------ on the command line


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 2}, "`threshold` must be from 0 to 1, got 2"),
        ({"layers": "[model.hidden]"}, "EarlyExits: `layers`: 'model.hidden' matches no layer of ImageClassifier"),
        ({"regime": "mixed"}, "`regime='mixed'` needs 2 epochs, one for each phase, and task 0 has 1"),
    ],
    ids=str,
)
def test_wrong_exits_are_one_message(arguments, message, capsys):
    arguments = {"layers": "[model.body.1]", "regime": "joint", **arguments}
    error = error_of(capsys, *OPTIONS, *options_for("EarlyExits", **arguments))
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
def test_a_configuration_file_takes_all_arguments(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "    - class_path: Replay\n"
        "      init_args: {size: 50}\n"
        "    - class_path: EarlyExits\n"
        "      init_args:\n"
        "        layers: ['model.body.1', 'model.body.3']\n"
        "        regime: mixed\n"
        "        loss_weights: [1.0, 1.0, 2.0]\n"
        "        phase_epochs: [1, 2]\n"
        "        threshold: 0.8\n"
        "        confidence: patience\n"
        "        head: linear\n"
    )
    cli = main(["fit", *OPTIONS, "--config", str(tmp_path / "run.yaml"), "--trainer.max_epochs=3"])
    (exits,) = [c for c in cli.trainer.callbacks if isinstance(c, EarlyExits)]
    assert exits.network.spec["layers"] == ["model.body.1", "model.body.3"]
    assert exits.loss_weights == [1.0, 1.0, 2.0]


@pytest.mark.usefixtures("_elsewhere")
def test_a_head_of_ones_own_comes_from_a_configuration_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "    - class_path: EarlyExits\n"
        "      init_args:\n"
        "        layers: ['model.body.1']\n"
        "        regime: joint\n"
        "        head: {class_path: torch.nn.LazyLinear, init_args: {out_features: 10}}\n"
    )
    cli = main(["fit", *OPTIONS, "--config", str(tmp_path / "run.yaml")])
    (exits,) = [c for c in cli.trainer.callbacks if isinstance(c, EarlyExits)]
    assert isinstance(exits.heads[0], nn.Linear)
