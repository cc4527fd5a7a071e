"""A run that is killed and resumed goes on with the curve, point for point, and leaves nothing behind."""

import pickle
from functools import lru_cache

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from nearest_means import NoisyNet
from numbered_streams import Judge, SaveAfterSteps, fit_stream, same, same_weights
from probed_streams import SIZE, fit_tracked

from lightning_cl.callbacks import (
    ContinualMetrics,
    DarkExperienceReplay,
    GaussianClassifier,
    NearestMeanClassifier,
    Replay,
    StabilityGapTracker,
)
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import DigitsData, Plain, quiet_trainer


def _tracker(**options):
    return StabilityGapTracker(**{"probe_size": SIZE, **options})


NMC = {"nmc_refresh": 3, "compare_heads": True}
# the callbacks beside the tracker, and its options
RUNS = {
    "plain": (lambda: [], {}),
    "every second step": (lambda: [Replay(20)], {"every_n_steps": 2, "dense_steps": 1}),
    "all tasks": (lambda: [Replay(20)], {"tasks": "all"}),
    "online": (lambda: [Replay(20, start="online")], {}),
    "dark, online": (lambda: [DarkExperienceReplay(20, start="online")], {}),
    "nearest mean": (lambda: [Replay(20), NearestMeanClassifier()], NMC),
    "nearest mean, online": (lambda: [Replay(20, start="online"), NearestMeanClassifier(refresh=2)], NMC),
    "nearest mean of the memory": (
        lambda: [Replay(20, start="online"), NearestMeanClassifier(prototypes="memory")],
        {"nmc_refresh": 3},
    ),
    "nearest mean without a memory": (lambda: [NearestMeanClassifier(refresh="task")], NMC),
    "gaussian": (lambda: [GaussianClassifier()], NMC),
    "gaussian, after epochs": (lambda: [GaussianClassifier(refresh="epoch", covariance="full")], NMC),
    "rejected": (lambda: [Replay(20), NearestMeanClassifier(), Judge(1)], NMC),
    "repeated": (lambda: [Replay(20), NearestMeanClassifier(), Judge(1, [1])], NMC),
}
STEPS = [1, 4, 6, 7, 8, 12, 14]  # of 18, six a task: inside an epoch, last of a task, first of one


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tracker and module of an uninterrupted run, and the folder of its checkpoints; each run is made once."""

    @lru_cache
    def run(name):
        folder = tmp_path_factory.mktemp("run")
        callbacks, options = RUNS[name]
        keeper = [ModelCheckpoint(folder, "end-{epoch}", save_top_k=-1)]
        others = [*callbacks(), SaveAfterSteps(folder, STEPS), *keeper]
        tracker, _, module = fit_tracked(_tracker(**options), others, NoisyNet, max_epochs=2, enable_checkpointing=True)
        return tracker, module, folder

    return run


def _resume(name, path):
    callbacks, options = RUNS[name]
    return fit_tracked(_tracker(**options), callbacks(), NoisyNet, max_epochs=2, ckpt_path=path)


def _assert_same_end(name, saved, file):
    tracker, module, folder = saved(name)
    resumed, _, again = _resume(name, folder / file)
    assert same(resumed.curve.state_dict(), tracker.curve.state_dict())
    assert same(torch.tensor(list(resumed.figures.values())), torch.tensor(list(tracker.figures.values())))
    assert list(resumed.figures) == list(tracker.figures)
    assert same(resumed.state_dict(), tracker.state_dict())
    assert same_weights(again, module)


THOROUGH = ("nearest mean", "online")
PLACES = [(name, step) for name in RUNS for step in STEPS if name in THOROUGH or step in (8, 12)]


@pytest.mark.parametrize(("name", "step"), [place for place in PLACES if place[0] not in ("rejected", "repeated")])
def test_the_resumed_run_has_the_curve_of_the_uninterrupted_one(name, step, saved):
    tracker, _, _ = saved(name)
    assert tracker.curve.steps[-1] == 18
    _assert_same_end(name, saved, f"{step}.ckpt")


@pytest.mark.parametrize("file", ["end-epoch=0.ckpt", "end-epoch=1.ckpt", "end-epoch=3.ckpt"])
@pytest.mark.parametrize("name", ["every second step", "nearest mean"])
def test_a_checkpoint_of_an_epochs_end_resumes_with_the_same_curve(name, file, saved):
    _assert_same_end(name, saved, file)


@pytest.mark.parametrize("step", [1, 8, 14])
def test_a_run_with_a_rejected_task_resumes_with_the_same_curve(step, saved):
    _assert_same_end("rejected", saved, f"{step}.ckpt")


@pytest.mark.parametrize("step", [1, 8])
def test_a_run_with_a_repeated_task_resumes_with_the_same_curve(step, saved):
    _assert_same_end("repeated", saved, f"{step}.ckpt")


@pytest.mark.parametrize("name", ["plain", "nearest mean", "nearest mean, online", "rejected"])
def test_what_is_saved_loads_without_running_code_and_is_no_slice(name, saved):
    _, _, folder = saved(name)
    for file in ("1.ckpt", "14.ckpt", "end-epoch=3.ckpt"):
        state = torch.load(folder / file, weights_only=True)["callbacks"]["StabilityGapTracker"]
        assert len(state["curve"]["steps"]) > 0
        for tensor in _tensors(state):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert tensor.device.type == "cpu"


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    assert value is None or isinstance(value, (bool, int, float, str))
    return []


def test_a_state_that_was_saved_is_not_moved_by_the_run_that_goes_on():
    states = []

    class Keeps(ContinualCallback):
        def on_task_end(self, trainer, pl_module, task):
            state = tracker.state_dict()
            states.append((state, {name: value.clone() for name, value in state["curve"].items()}))

    tracker = _tracker()
    fit_tracked(tracker, [Keeps()])
    assert len(states) == 3
    for state, copy in states:
        assert same(state["curve"], copy)


# ------------------------------------------------------------------ more tasks, more calls


@pytest.mark.parametrize("heads", [[], [NearestMeanClassifier]], ids=str)
def test_a_stream_that_is_continued_with_more_tasks_has_the_curve_of_one_that_knew_them(heads, tmp_path):
    def fit(tasks, others=(), **settings):
        sequence = ClassIncremental(DigitsData(), classes_per_task=[2] * tasks)
        tracker = _tracker(compare_heads=bool(heads), head="net.4")
        callbacks = [Replay(20), *(head(head="net.4") for head in heads), *others]
        fit_tracked(tracker, callbacks, sequence=sequence, **settings)
        return tracker

    fit(2, [ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    continued, straight = fit(3, ckpt_path=tmp_path / "last.ckpt"), fit(3)
    assert straight.curve.accuracies.shape == (9, 1 + len(heads), 3)
    assert same(continued.curve.state_dict(), straight.curve.state_dict())
    assert continued.figures == straight.figures


def test_a_second_fit_begins_a_curve_of_its_own():
    tracker, trainer, _ = fit_tracked()
    first = tracker.curve.state_dict()
    sequence = ClassIncremental(DigitsData(), num_tasks=2)
    trainer.fit(Plain(), datamodule=sequence)
    assert tracker.curve.trained.tolist() == [0] * 5 + [1] * 5
    assert not same(tracker.curve.state_dict(), first)


def test_a_test_with_a_checkpoint_does_not_need_the_curve(saved):
    _, _, folder = saved("plain")
    trainer = quiet_trainer(callbacks=[_tracker()])
    sequence = ClassIncremental(DigitsData(), num_tasks=3)
    trainer.test(NoisyNet(), datamodule=sequence, ckpt_path=folder / "14.ckpt", verbose=False)
    assert "test_acc" in trainer.callback_metrics


def test_a_test_with_a_checkpoint_leaves_the_curve_of_the_fit(saved):
    _, _, folder = saved("plain")
    tracker, trainer, module = fit_tracked(module=NoisyNet)
    before = tracker.curve.state_dict()
    trainer.test(module, datamodule=trainer.datamodule, ckpt_path=folder / "14.ckpt", verbose=False)
    assert same(tracker.curve.state_dict(), before)


def test_tracker_and_curve_can_be_pickled_after_a_fit():
    tracker, _, _ = fit_tracked(_tracker(compare_heads=True), [Replay(20), NearestMeanClassifier()])
    again = pickle.loads(pickle.dumps(tracker))
    assert same(again.curve.state_dict(), tracker.curve.state_dict())
    assert again.figures == tracker.figures


def test_it_goes_with_the_other_observers():
    metrics, tracker = ContinualMetrics(print_table=False, compare_heads=True), _tracker(compare_heads=True)
    fit_tracked(tracker, [Replay(20), NearestMeanClassifier(), metrics])
    alone, _, _ = fit_tracked(_tracker(compare_heads=True), [Replay(20), NearestMeanClassifier()])
    assert same(tracker.curve.state_dict(), alone.curve.state_dict())


# ------------------------------------------------------------------ nothing is left

_HOOKS = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]


def _traces(module, trainer, sequence):
    return {
        "attributes": {name: frozenset(vars(layer)) for name, layer in module.named_modules()},
        "hooks": {name: [len(getattr(layer, hook)) for hook in _HOOKS] for name, layer in module.named_modules()},
        "modes": {name: layer.training for name, layer in module.named_modules()},
        "trainer": frozenset(vars(trainer)),
        "callbacks": [id(callback) for callback in trainer.callbacks],
        "sequence": {name: type(value) for name, value in vars(sequence).items() if callable(value)},
        "stage": trainer.validating,
    }


class Breaks(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("broken")


class BreaksWhenAsked(Plain):
    """Answers no more at a step."""

    def forward(self, images):
        if not self.training and self.trainer.training is False and self.trainer.global_step == 5:
            raise RuntimeError("broken")
        return super().forward(images)


@pytest.mark.parametrize("ending", ["end", "hook", "measurement"])
@pytest.mark.parametrize("heads", [False, True], ids=["linear", "nearest mean"])
def test_nothing_is_left_on_module_trainer_and_sequence(heads, ending):
    tracker = _tracker(compare_heads=heads)
    callbacks = [Replay(20), *([NearestMeanClassifier()] if heads else []), tracker]
    callbacks += [Breaks(5)] if ending == "hook" else []
    module = BreaksWhenAsked() if ending == "measurement" else Plain()
    sequence = ClassIncremental(DigitsData(), num_tasks=3)
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=1, limit_val_batches=0)
    trainer.validate(module, datamodule=sequence, verbose=False)  # they know each other from now on
    module.train()
    before = _traces(module, trainer, sequence)
    if ending == "end":
        trainer.fit(module, datamodule=sequence)
    else:
        with pytest.raises(RuntimeError, match="broken"):
            trainer.fit(module, datamodule=sequence)
    after = _traces(module, trainer, sequence)
    for part in before:
        assert after[part] == before[part], part
    with pytest.raises(RuntimeError, match="outside a fit"):
        tracker.stream  # noqa: B018


def test_a_failed_fit_can_be_followed_by_a_whole_one():
    tracker = _tracker()
    with pytest.raises(RuntimeError, match="broken"):
        fit_tracked(tracker, [Breaks(5)])
    fit_stream([tracker], Plain, DigitsData())
    expected, _, _ = fit_tracked()
    assert same(tracker.curve.state_dict(), expected.curve.state_dict())


class FailsAtStep(Callback):
    """Ends a run with an error."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("the lights went out")


@pytest.mark.parametrize("step", [8, 10])
def test_a_checkpoint_of_a_run_that_failed_has_the_prototypes_of_the_probes(step, tmp_path):
    def callbacks():
        return [Replay(20), NearestMeanClassifier()]

    whole, _, _ = fit_tracked(_tracker(nmc_refresh=4), callbacks(), NoisyNet, max_epochs=2)
    keeper = ModelCheckpoint(tmp_path, "failed", save_on_exception=True, every_n_epochs=100)
    others = [*callbacks(), FailsAtStep(step), keeper]
    with pytest.raises(RuntimeError, match="lights"):
        fit_tracked(_tracker(nmc_refresh=4), others, NoisyNet, max_epochs=2, enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    resumed, _, _ = fit_tracked(_tracker(nmc_refresh=4), callbacks(), NoisyNet, max_epochs=2, ckpt_path=path)
    assert same(resumed.curve.state_dict(), whole.curve.state_dict())
