"""Layers are frozen beside other callbacks, in fits without tasks and from the command line."""

from types import SimpleNamespace

import pytest
import torch
from command_line import OPTIONS, error_of, options_for
from exit_streams import Deep
from frozen_streams import HEAD, Decays, States, fit_frozen
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import fit_stream, same

from lightning_cl.callbacks import (
    ContinualMetrics,
    DarkExperienceReplay,
    EarlyExits,
    ElasticWeightConsolidation,
    Freeze,
    LearningWithoutForgetting,
    NearestMeanClassifier,
    Replay,
    StabilityGapTracker,
)
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, Joint
from lightning_cl.tasks import TaskClock
from tests.modules import (
    DigitsData,
    Plain,
    TwoHeads,
    quiet_trainer,
)

# ------------------------------------------------------------------ beside other callbacks


@pytest.mark.parametrize(
    "others",
    [
        lambda: [Replay(20), NearestMeanClassifier()],
        lambda: [DarkExperienceReplay(20)],
        lambda: [LearningWithoutForgetting()],
        lambda: [ElasticWeightConsolidation()],
        lambda: [StabilityGapTracker(probe_size=10), EarlyStopping("val_acc", mode="max", patience=1)],
    ],
    ids=["Replay", "DER", "LwF", "EWC", "observers"],
)
def test_others_go_with_it_in_any_order(others):
    runs = []
    for turn in (1, -1):
        metrics, states = ContinualMetrics(print_table=False), States()
        callbacks = [Freeze(), metrics, *others()][::turn]
        _, module = fit_stream([*callbacks, states], Decays, DigitsData(), limit_val_batches=1.0)
        assert states.moved == [HEAD, HEAD]
        runs.append((dict(module.state_dict()), metrics.matrix))
    assert same(*runs)


@pytest.mark.parametrize("regime", ["joint", "disjoint"])
@pytest.mark.parametrize("layers", [None, "*"])
def test_exit_heads_are_trained_on_frozen_layers_in_any_order(regime, layers):
    runs = []
    for turn in (1, -1):
        states, exits = States(), EarlyExits(["net.1", "net.4"], regime, threshold=0.6, print_table=False)
        callbacks = [Freeze(layers), exits][::turn]
        _, module = fit_stream([*callbacks, states], Deep, DigitsData(), max_epochs=2)
        later = set().union(*states.moved[1:])
        head = {"net.6.weight", "net.6.bias"} if layers is None else set()
        assert {name for name in later if not name.startswith("early_exits")} == head
        assert any(name.startswith("early_exits") for name in later)
        assert all(layer.training for layer in module.modules())
        runs.append(states.epochs)
    assert same(*runs)


def test_a_callback_that_differentiates_by_what_layers_put_out_can_do_so():
    class Differentiates(LearningWithoutForgetting):
        needs_gradients = True

        def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
            logits = pl_module.net[4](pl_module.net[:4](batch[0]))
            (gradient,) = torch.autograd.grad(logits.sum(), pl_module.net[0].weight)
            return 0 * gradient.sum()

    moved, _ = fit_frozen(Freeze(), Differentiates())
    assert moved == [HEAD, HEAD]


def test_a_network_frozen_whole_has_a_head_that_knows_all_classes():
    nearest = NearestMeanClassifier()
    moved, _ = fit_frozen(Freeze("*"), nearest, Replay(60))
    assert moved == [set(), set()]
    assert nearest.classifier.known.all()


# ------------------------------------------------------------------ ordinary fits, bad input


def test_an_ordinary_fit_freezes_from_the_start():
    module, states = Decays(), States()
    quiet_trainer(callbacks=[Freeze("net.[01]", after_task=None), states], max_epochs=2).fit(module, DigitsData())
    assert states.moved == [HEAD]


@pytest.mark.parametrize(
    ("callback", "sequence", "message"),
    [
        (Freeze(), DigitsData, "no task comes after task 0, since its tasks are 1 in number"),
        (Freeze(), lambda: Joint(DigitsData()), "no task comes after task 0, since its tasks are 1 in number"),
    ],
    ids=["ordinary", "joint"],
)
def test_a_fit_without_a_later_task_is_told_that_nothing_is_frozen(callback, sequence, message):
    states = States()
    with pytest.warns(UserWarning, match=f"Freeze freezes nothing in this fit: {message}"):
        quiet_trainer(callbacks=[callback, states]).fit(Decays(), datamodule=sequence())
    assert states.moved == [set(states.epochs[0])]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": []}, ValueError, r"`layers` must be the name of a layer, a pattern, or a list of them, got \[\]"),
        ({"layers": ""}, ValueError, "`layers` must be .*, got ''"),
        ({"layers": 3}, TypeError, "`layers` must be .*, got 3"),
        ({"layers": ["net", 3]}, TypeError, r"`layers` must be .*, got \['net', 3\]"),
        ({"after_task": -1}, ValueError, "`after_task` must be 0 or more, or None for the start, got -1"),
        ({"after_task": 0.5}, TypeError, "`after_task` must be a whole number or None, got 0.5"),
        ({"after_task": True}, TypeError, "`after_task` must be a whole number or None, got True"),
    ],
    ids=str,
)
def test_values_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        Freeze(**arguments)


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (
            Freeze(["net.0", "layer?"]),
            Plain,
            "`layers` has 'layer\\?', which matches no layer of Plain.*'net.0', 'net.4'",
        ),
        (Freeze(), TwoHeads, r"Cannot tell the classification layer of TwoHeads: More than one layer.*`head=\.\.\.`"),
        (Freeze(head="fc"), Plain, "`head='fc'` names no layer of Plain"),
    ],
    ids=["layers", "two heads", "head"],
)
def test_layers_that_cannot_be_found_are_named_before_training(callback, module, message):
    class NeverTrained(module):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training had begun")

    NeverTrained.__name__ = module.__name__
    with pytest.raises(MisconfigurationException, match=f"Freeze: {message}"):
        fit_stream([callback], NeverTrained, DigitsData())


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_cuts_the_weights_is_refused(strategy):
    # neither runs on a CPU: `setup` gets what it looks at
    trainer = quiet_trainer()
    TaskClock.install(trainer, stream=ClassIncremental(DigitsData(), num_tasks=3))
    sharded = SimpleNamespace(callbacks=trainer.callbacks, strategy=object.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"Freeze holds whole layers still.*{strategy.__name__}"):
        Freeze().setup(sharded, Plain(), "fit")


# ------------------------------------------------------------------ on the command line


@pytest.mark.usefixtures("_elsewhere")
def test_layers_come_from_yaml(tmp_path):
    (tmp_path / "freeze.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "    - class_path: Freeze\n"
        "      init_args:\n"
        '        layers: ["model.body.[0-9]"]\n'
        "        after_task: null\n"
    )
    cli = main(["fit", *OPTIONS, "--config", str(tmp_path / "freeze.yaml"), "--trainer.limit_train_batches=1"])
    (freeze,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, Freeze)]
    assert (freeze.layers, freeze.after_task) == (["model.body.[0-9]"], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "model.hidden"}, "Freeze: `layers` has 'model.hidden', which matches no layer of ImageClassifier"),
        ({"after_task": -1}, "`after_task` must be 0 or more"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_elsewhere")
def test_wrong_layers_are_one_message(arguments, message, capsys):
    assert message in error_of(capsys, *OPTIONS, *options_for("Freeze", **arguments))
