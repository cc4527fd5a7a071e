"""What is wrong with a tracker is said before training starts: the argument, what was got, what is allowed."""

from pathlib import Path

import pytest
import torch
from command_line import OPTIONS, error_of, options_for
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import DataOf, fit_stream
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.callbacks import ContinualMetrics, NearestMeanClassifier, Replay, StabilityGapTracker
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, TaskList
from tests.modules import DigitsData, Plain, TrainingDigits, TwoHeads, quiet_trainer


class NeverTrained(Plain):
    """Fails the test if a single batch is trained on: errors come before."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training had begun")


def _refused(callbacks, match, data=None, module=NeverTrained, **settings):
    with pytest.raises(MisconfigurationException, match=match) as caught:
        fit_stream(callbacks, module, data or DigitsData(), **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "`window` must be at least 2 evaluations.*got 1"),
        ({"window": 0}, "`window` must be at least 1, got 0|`window` must be at least 2 .*got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        ({"every_n_steps": -1}, "`every_n_steps` must be at least 1, got -1"),
        ({"probe_size": 0}, "`probe_size` must be at least 1, got 0"),
        ({"dense_steps": 0}, "`dense_steps` must be at least 1, got 0"),
        ({"nmc_refresh": 0}, "`nmc_refresh` must be at least 1, got 0"),
        ({"tasks": "past"}, "`tasks` must be one of 'seen', 'all', got 'past'"),
    ],
    ids=str,
)
def test_an_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        StabilityGapTracker(**arguments)


@pytest.mark.parametrize("argument", ["every_n_steps", "probe_size", "window", "dense_steps", "nmc_refresh"])
def test_counts_are_whole_numbers(argument):
    with pytest.raises(TypeError, match=f"`{argument}` must be a whole number, got 2.5"):
        StabilityGapTracker(**{argument: 2.5})


def test_only_dense_steps_may_be_none():
    StabilityGapTracker(dense_steps=None)
    for argument in ("every_n_steps", "probe_size", "window", "nmc_refresh"):
        with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
            StabilityGapTracker(**{argument: None})


def test_more_probes_than_validation_samples():
    message = _refused([StabilityGapTracker(probe_size=21)], r"`probe_size=21` .*20 validation samples of task 0")
    assert message.count(". ") == 1  # what is wrong, and what to do
    assert message.endswith("at most 20.")
    fit_stream([StabilityGapTracker(probe_size=20)], Plain, DigitsData())


def test_more_probes_than_the_validation_samples_of_a_later_task():
    class Fewer(DigitsData):
        def dataset(self, first, count):
            return super().dataset(first, count if first == 0 else 5)

    tracker = StabilityGapTracker(probe_size=31)
    _refused(
        [tracker], r"`probe_size=31` .*30 validation samples of task 1", sequence=TaskList([DigitsData(), Fewer()])
    )


def test_a_stream_without_validation_data():
    message = r"validation data, and task 0 .*has none.*`val_fraction=0.1`"
    _refused([StabilityGapTracker(probe_size=5)], message, TrainingDigits())


def test_held_out_training_data_are_validation_data():
    tracker = StabilityGapTracker(probe_size=4)
    fit_stream([tracker], Plain, TrainingDigits(), stream={"val_fraction": 0.1})
    assert tracker.curve.length > 0


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(64), torch.tensor(0))] * 4)


class IterableValidation(DigitsData):
    def val_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


def test_validation_data_that_can_only_be_iterated():
    sequence = TaskList([DigitsData(), IterableValidation()])
    message = r"draws its probes by index, and the validation data of task 1 .*only be iterated"
    _refused([StabilityGapTracker(probe_size=5)], message, sequence=sequence)


def test_a_fit_without_tasks():
    with pytest.raises(MisconfigurationException, match=r"this fit has no tasks.*`ClassIncremental\("):
        quiet_trainer(callbacks=[StabilityGapTracker()]).fit(NeverTrained(), datamodule=DigitsData())


@pytest.mark.parametrize(
    "callback",
    [StabilityGapTracker(probe_size=5, compare_heads=True), ContinualMetrics(compare_heads=True)],
    ids=lambda callback: type(callback).__name__,
)
@pytest.mark.parametrize("others", [[], [Replay(20)]], ids=["alone", "with replay"])
def test_comparing_heads_without_a_head_to_compare(callback, others):
    _refused([*others, callback], r"`compare_heads=True` .*`NearestMeanClassifier\(\)`.*there is none")


def test_comparing_heads_of_a_monitored_metric():
    with pytest.raises(ValueError, match="`compare_heads=True` compares accuracies, not `monitor='val_acc'`"):
        ContinualMetrics(monitor="val_acc", compare_heads=True)


def test_a_head_that_cannot_be_told_is_asked_for_by_name():
    class Untrained(TwoHeads):
        training_step = NeverTrained.training_step

    error = _refused([StabilityGapTracker(probe_size=5)], "`?head=", module=Untrained)
    assert "'main'" in error
    assert "'auxiliary'" in error


def test_the_head_that_is_named_is_measured():
    tracker = StabilityGapTracker(probe_size=5, head="main")
    fit_stream([tracker], TwoHeads, DigitsData())
    assert tracker.curve.length == 9


def test_resuming_with_another_number_of_heads_is_refused(tmp_path):
    def callbacks(compare_heads):
        return [Replay(20), NearestMeanClassifier(), StabilityGapTracker(probe_size=5, compare_heads=compare_heads)]

    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit_stream([*callbacks(False), checkpoint], Plain, DigitsData(), enable_checkpointing=True)
    _refused(callbacks(True), "`compare_heads", ckpt_path=tmp_path / "epoch=0.ckpt")


def test_figures_before_a_fit_are_none():
    assert StabilityGapTracker().figures == {}


# ------------------------------------------------------------------ the command line

FIT = [*OPTIONS, "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe_size": 9999}, "`probe_size=9999` of StabilityGapTracker is more than the "),
        ({"window": 1}, "`window` must be at least 2 evaluations"),
        ({"compare_heads": "true", "probe_size": 5}, "`compare_heads=True` compares a head"),
    ],
    ids=str,
)
def test_a_wrong_tracker_is_one_message(arguments, message, capsys):
    options = ["--data.val_fraction=0.2", *options_for("StabilityGapTracker", **arguments)]
    error = error_of(capsys, *FIT, *options)
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("config", ["probe_size: 9999", "window: 1"])
def test_a_wrong_tracker_in_a_config_is_one_message(config, capsys):
    callback = f"[{{class_path: StabilityGapTracker, init_args: {{{config}}}}}]"
    Path("run.yaml").write_text(f"trainer:\n  callbacks: {callback}\n")
    error = error_of(capsys, *FIT, "--data.val_fraction=0.2", "--config=run.yaml")
    assert config.partition(":")[0] in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("option", ["tasks=past", "every_n_steps=often"])
def test_a_choice_that_there_is_not_is_answered_by_the_parser(option, capsys):
    error = error_of(capsys, *FIT, *options_for("StabilityGapTracker"), f"--trainer.callbacks.{option}")
    assert option.partition("=")[0] in error
    assert option.partition("=")[2] in error


@pytest.mark.usefixtures("_elsewhere")
def test_a_run_from_the_command_line_writes_curve_and_figures():
    tracker = options_for(
        "StabilityGapTracker", every_n_steps=2, probe_size=16, window=5, dense_steps=1, compare_heads="true"
    )
    heads = [*options_for("Replay", size=50), *options_for("NearestMeanClassifier")]
    cli = main(["fit", *FIT, "--data.val_fraction=0.2", *heads, *tracker])
    folder = Path(cli.trainer.log_dir)
    assert {"stability_gap.csv", "stability_gap.json", "stability_gap.png"} <= {path.name for path in folder.iterdir()}
    tracked = next(c for c in cli.trainer.callbacks if isinstance(c, StabilityGapTracker))
    assert tracked.curve.trained.unique().tolist() == [0, 1, 2, 3, 4]
    assert "linear_wf_5" in tracked.figures


def test_the_sequence_may_be_any():
    """The tracker is refused where there is no stream, not where there is one of a single task."""
    tracker = StabilityGapTracker(probe_size=20)
    fit_stream([tracker], Plain, sequence=ClassIncremental(DigitsData(), num_tasks=1))
    assert tracker.curve.accuracies.shape == (9, 1, 1)
    assert torch.tensor(tracker.figures["gap"]).isnan()


def test_data_without_a_validation_loader_is_named():
    _refused([StabilityGapTracker(probe_size=5)], "task 0", DataOf())


def test_early_stopping_on_a_figure_of_task_ends():
    _refused(
        [StabilityGapTracker(probe_size=10), EarlyStopping("stability/gap")],
        "Early stopping cannot follow `monitor='stability/gap'`",
    )


def test_a_checkpoint_that_follows_a_gap_but_saves_each_epoch():
    keeper = ModelCheckpoint(monitor="stability/gap")
    match = r"`ModelCheckpoint\(monitor='stability/gap'\)`.*every_n_epochs=2"
    _refused([keeper, StabilityGapTracker(probe_size=10)], match, max_epochs=2, enable_checkpointing=True)


def test_a_checkpoint_that_follows_a_gap_is_written_at_task_ends(tmp_path):
    """There is no gap in the first task."""
    keeper = ModelCheckpoint(tmp_path, monitor="stability/gap", every_n_epochs=2)
    tracker = StabilityGapTracker(probe_size=10)
    fit_stream([keeper, tracker], Plain, DigitsData(), max_epochs=2, enable_checkpointing=True)
    assert len(list(tmp_path.iterdir())) == 1
    best = torch.load(keeper.best_model_path, weights_only=True)["callbacks"]["StabilityGapTracker"]["curve"]
    assert len(best["steps"]) == (12 if float(keeper.best_model_score) < tracker.figures["gap"] else 18)
