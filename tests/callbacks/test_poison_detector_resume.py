"""A run that a detector watches is resumed to the bit, wherever it was cut off."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nearest_means import DigitsToPredict, NoisyNet
from numbered_streams import Judge, SaveAfterSteps, fit_stream, same, same_weights
from poison_streams import Pairs, fit_watched, moving

from benchmarks.resume import differences
from lightning_cl.callbacks import PoisonDetector
from lightning_cl.datamodules import ClassIncremental
from tests.distributed.poison_runs import everything
from tests.modules import quiet_trainer


class Poisoned(NoisyNet):
    """Its fourth task is far from all others."""

    def training_step(self, batch, batch_idx):
        images, labels = batch
        poisoned = self.trainer.datamodule.current_task.index == 3
        loss = super().training_step((images, labels), batch_idx)
        return loss * 400 if poisoned else loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


# Five tasks of two epochs, each of 24 images, that is of two steps; the second task is trained three times. So 28 steps
# are 4 of task 0, 12 of task 1 (its third training is kept), and 4 each of tasks 2, 3 (poisoned) and 4.
PLACES = {
    "2.ckpt": "before anything is measured",
    "5.ckpt": "first attempt",
    "6.ckpt": "last batch of an epoch of the first attempt",
    "epoch=2.ckpt": "between the epochs of the first attempt",
    "8.ckpt": "last batch of the first attempt",
    "epoch=3.ckpt": "first undoing",
    "9.ckpt": "second attempt",
    "12.ckpt": "last batch of the second attempt",
    "epoch=5.ckpt": "second undoing",
    "13.ckpt": "attempt that is kept",
    "16.ckpt": "last batch of the attempt that is kept",
    "epoch=7.ckpt": "end of the calibration",
    "19.ckpt": "clean task",
    "21.ckpt": "poisoned task",
    "epoch=10.ckpt": "between the epochs of the poisoned task",
    "24.ckpt": "last batch of the poisoned task",
    "epoch=11.ckpt": "its undoing",
    "25.ckpt": "task after it",
}
FAST = {"5.ckpt", "8.ckpt", "epoch=5.ckpt", "13.ckpt", "21.ckpt", "epoch=11.ckpt"}
VERDICTS = ["calibration", "clean", "poisoned", "clean"]


def _run(memory, others=(), ckpt_path=None):
    detector = PoisonDetector(calibration_runs=2, aggregate="max", margin=8.0)
    callbacks = [detector, *([] if memory is None else everything(memory)), *others]
    options = {"stream": {"classes_per_task": [2, 1, 1, 1, 1], "num_tasks": None}, "ckpt_path": ckpt_path}
    settings = {"max_epochs": 2, "limit_val_batches": 1.0, "enable_checkpointing": bool(others)}
    trainer, module = fit_stream(callbacks, Poisoned, DigitsToPredict(), **options, **settings)
    states = {c.state_key: c.state_dict() for c in callbacks if c not in others}
    return detector, [
        {name: value.clone() for name, value in module.state_dict().items()},
        trainer.optimizers[0].state_dict(),
        states,
        trainer.global_step,
        torch.get_rng_state(),
    ]


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """Return what makes a run that went through, and the folder with its checkpoints; each run is made once."""
    ends = {}

    def make(memory):
        if memory not in ends:
            folder = tmp_path_factory.mktemp("through")
            saves = SaveAfterSteps(folder, range(1, 40))
            epochs = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            ends[memory] = *_run(memory, [saves, epochs]), folder
        return ends[memory]

    return make


def test_the_run_has_a_clean_and_a_poisoned_task(through):
    detector, _, folder = through(None)
    assert [entry["verdict"] for entry in detector.record] == VERDICTS
    assert {path.name for path in folder.glob("*.ckpt")} >= set(PLACES)


def _places(fast):
    return [pytest.param(name, id=PLACES[name], marks=[] if name in fast else pytest.mark.slow) for name in PLACES]


@pytest.mark.parametrize("place", _places(FAST))
def test_a_resumed_run_ends_the_same(place, through):
    _, end, folder = through(None)
    assert differences(end, _run(None, ckpt_path=folder / place)[1]) == []


@pytest.mark.parametrize("place", _places({"9.ckpt", "epoch=11.ckpt"}))
def test_a_resumed_run_ends_the_same_with_every_behaviour_of_the_suite(place, through):
    _, end, folder = through("replay")
    assert differences(end, _run("replay", ckpt_path=folder / place)[1]) == []


@pytest.mark.parametrize("place", _places({"9.ckpt", "21.ckpt"}))
def test_a_resumed_run_ends_the_same_with_what_holds_the_network_to_its_past(place, through):
    _, end, folder = through("held")
    assert differences(end, _run("held", ckpt_path=folder / place)[1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_ends_the_same_with_dark_replay(place, through):
    _, end, folder = through("der")
    assert differences(end, _run("der", ckpt_path=folder / place)[1]) == []


def test_a_detector_that_stopped_the_fit_goes_on_with_the_next_task(tmp_path):
    steps = moving(0.1, 2, 0.2)
    last = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    stopped = PoisonDetector(threshold=30, action="stop")
    fit_watched(stopped, steps, [last], enable_checkpointing=True)
    detector = PoisonDetector(threshold=30, action="stop")
    trainer, module = fit_watched(detector, steps, ckpt_path=tmp_path / "last.ckpt")
    assert [(entry["task"], entry["verdict"]) for entry in detector.record] == [(1, "poisoned"), (2, "clean")]
    assert trainer.current_epoch == 3
    assert same_weights(module, fit_watched(PoisonDetector(threshold=90), moving(0.1, 0, 0.2))[1])


# ------------------------------------------------------------------ what is in a checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder with the checkpoints of a short run: task 1 ends with step 9 after one calibration."""
    folder = tmp_path_factory.mktemp("saved")
    detector = PoisonDetector(calibration_runs=2)
    saves = SaveAfterSteps(folder, range(1, 15))
    epochs = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit_watched(detector, others=[saves, epochs], enable_checkpointing=True)
    return folder


@pytest.mark.parametrize("name", ["4.ckpt", "7.ckpt", "11.ckpt", "epoch=1.ckpt", "epoch=3.ckpt"])
def test_the_state_is_plain(saved, name):
    state = torch.load(saved / name, weights_only=True)["callbacks"]["PoisonDetector"]
    assert set(state) == {"settings", "record", "runs", "before"}
    for mean in state["before"].values():
        assert mean.untyped_storage().nbytes() == mean.numel() * mean.element_size()


def test_a_saved_state_is_not_moved_by_the_run_that_goes_on():
    detector = PoisonDetector()
    detector.record, detector._before = [{"task": 0, "shifts": {"a": 1.0}}], {"a": torch.ones(2)}
    state = detector.state_dict()
    detector.record[0]["shifts"]["a"] = 9.0
    detector._before["a"] += 1
    assert same([state["record"], state["before"]], [[{"task": 0, "shifts": {"a": 1.0}}], {"a": torch.ones(2)}])


@pytest.mark.parametrize("name", ["4.ckpt", "epoch=3.ckpt"])
def test_a_checkpoint_can_be_tested(saved, name):
    for detector in (PoisonDetector(calibration_runs=2), PoisonDetector(space="parameter")):
        trainer = quiet_trainer(callbacks=[detector])
        sequence = ClassIncremental(DigitsToPredict(), num_tasks=3)
        [result] = trainer.test(NoisyNet(), datamodule=sequence, ckpt_path=saved / name, verbose=False)
        assert "test_acc" in result


def test_a_test_with_a_checkpoint_leaves_the_record_of_the_fit(saved):
    detector = PoisonDetector(threshold=89)
    trainer, module = fit_watched(detector)
    before = detector.state_dict()
    sequence = ClassIncremental(DigitsToPredict(), num_tasks=3)
    trainer.test(module, datamodule=sequence, ckpt_path=saved / "epoch=3.ckpt", verbose=False)
    assert same(detector.state_dict(), before)


def test_a_test_with_a_checkpoint_shows_its_record_to_a_new_detector(saved):
    detector = PoisonDetector()
    sequence = ClassIncremental(DigitsToPredict(), num_tasks=3)
    trainer = quiet_trainer(callbacks=[detector])
    trainer.test(NoisyNet(), datamodule=sequence, ckpt_path=saved / "epoch=3.ckpt", verbose=False)
    assert [entry["verdict"] for entry in detector.record] == ["calibration"]


# ------------------------------------------------------------------ another detector


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("layers", ["net.0", "net.4"]),
        ("statistic", "slope"),
        ("space", "parameter"),
        ("calibrate_task", 0),
        ("calibration_runs", 3),
        ("aggregate", "max"),
        ("calibration", "history"),
        ("margin", 2.0),
        ("relative", True),
        ("samples", 5),
        ("threshold", 30),
    ],
)
def test_a_detector_with_other_settings_is_refused(saved, argument, value):
    detector = PoisonDetector(**{"calibration_runs": 2, argument: value})
    with pytest.raises(MisconfigurationException, match=rf"`{argument}=.*this one has `{argument}=.*the same"):
        fit_watched(detector, ckpt_path=saved / "4.ckpt")


def test_a_given_threshold_may_be_another_one(tmp_path):
    fit_watched(PoisonDetector(threshold=30), others=[SaveAfterSteps(tmp_path, [4])])
    detector = PoisonDetector(threshold=89)
    fit_watched(detector, ckpt_path=tmp_path / "4.ckpt")
    assert [entry["threshold"] for entry in detector.record] == [89, 89]


@pytest.mark.parametrize(
    "before",
    [None, {"threshold": 60, "detect_from": 2}, {"threshold": 60, "action": "warn"}],
    ids=["no detector", "judged later", "without a copy"],
)
def test_a_task_that_was_begun_without_the_detector_is_refused(before, tmp_path):
    saves = SaveAfterSteps(tmp_path, [4])
    if before is None:
        fit_stream([saves], NoisyNet, Pairs())
    else:
        fit_watched(PoisonDetector(**before), others=[saves])
    with pytest.raises(MisconfigurationException, match=r"from the middle of task 1 .*a task's end"):
        fit_watched(PoisonDetector(threshold=60), ckpt_path=tmp_path / "4.ckpt")


def test_a_detector_may_join_at_the_end_of_a_task(tmp_path):
    fit_stream([ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], NoisyNet, Pairs(), enable_checkpointing=True)
    detector = PoisonDetector(threshold=89)
    fit_watched(detector, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [entry["task"] for entry in detector.record] == [1, 2]


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    """Return a checkpoint of the end of task 1 of three, of a run without a detector."""
    folder = tmp_path_factory.mktemp("unwatched")
    fit_stream([ModelCheckpoint(folder, "{epoch}", save_top_k=-1)], NoisyNet, Pairs(), enable_checkpointing=True)
    return folder / "epoch=1.ckpt"


def test_a_detector_that_missed_its_calibration_is_refused(unwatched):
    message = r"from after task 1, .*holds no threshold\. Give a `threshold`, or a later `calibrate_task` \(from 2 on\)"
    with pytest.raises(MisconfigurationException, match=message):
        fit_watched(PoisonDetector(calibration_runs=2), ckpt_path=unwatched)


def test_a_history_begins_with_the_first_task_that_is_watched(unwatched):
    detector = PoisonDetector(calibration="history")
    with pytest.warns(UserWarning, match=r"has no history yet, and takes task 2 \(classes 4, 5\) for clean"):
        fit_watched(detector, ckpt_path=unwatched)
    assert [(entry["task"], entry["verdict"]) for entry in detector.record] == [(2, "calibration")]
    assert detector.current_threshold == detector.record[0]["angle"]


def test_a_detector_whose_calibration_another_callback_undid_goes_on_unjudged(tmp_path):
    epochs = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    undoing = [Judge(1), epochs]
    fit_watched(PoisonDetector(calibration_runs=1), others=undoing, enable_checkpointing=True)
    detector = PoisonDetector(calibration_runs=1)
    with pytest.warns(UserWarning, match=r"no threshold for task 2 .*since task 1.*undone"):
        fit_watched(detector, others=[Judge(1)], ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [entry["verdict"] for entry in detector.record] == ["not judged"]


def test_a_detector_may_leave_the_run(saved):
    trainer, _ = fit_stream([], NoisyNet, Pairs(), ckpt_path=saved / "epoch=2.ckpt")
    assert trainer.current_epoch == 5
