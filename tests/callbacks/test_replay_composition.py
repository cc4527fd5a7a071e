"""Replay switched off, undone, and among other callbacks and modules."""

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import (
    AnyBatch,
    DataOf,
    Judge,
    Noisy,
    Watch,
    fit_stream,
    same,
    same_weights,
)

from lightning_cl.callbacks import ContinualMetrics, DarkExperienceReplay, Replay
from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import (
    CLASSIFIERS,
    BrightnessData,
    DigitsData,
    Manual,
    PerTask,
    Plain,
    PredictsLabels,
    Regression,
    TorchvisionModule,
    TrainingDigits,
    WithoutValidation,
    quiet_trainer,
)


def _tasks_of(labels):
    return labels // 2


# ------------------------------------------------------------------ off, and twice


@pytest.mark.parametrize("callback", [Replay, DarkExperienceReplay])
@pytest.mark.parametrize("module", [lambda: Plain(dropout=0.3), lambda: Manual(dropout=0.3)], ids=["plain", "manual"])
def test_replay_without_a_size_is_no_replay(callback, module):
    runs = []
    for callbacks in ([], [callback()]):
        states = _States()
        _, trained = fit_stream([*callbacks, states], module, DigitsData(), limit_val_batches=1.0)
        runs.append((dict(trained.state_dict()), states.seen))
    assert same(*runs)


class _States(Callback):
    """Notes the random states after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        name, keys, *rest = np.random.get_state()
        self.seen.append([torch.get_rng_state(), [name, keys.tolist(), *rest], random.getstate()])


def test_replay_without_a_size_saves_nothing(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit_stream([Replay(), checkpoint], enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("Replay" in name for name in state["callbacks"])


def test_replay_without_a_size_needs_no_tasks():
    quiet_trainer(max_epochs=1, callbacks=[Replay(), DarkExperienceReplay()]).fit(Plain(), datamodule=DigitsData())


def test_training_draws_nothing_from_the_global_generators_because_of_replay():
    runs = []
    for callbacks in ([], [Replay(20)]):
        states = _States()
        fit_stream([*callbacks, states], AnyBatch, DataOf(Noisy()))
        runs.append(states.seen)
    assert same(*runs)


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [Replay(20), DarkExperienceReplay(20)],
        lambda: [DarkExperienceReplay(20), Replay(20)],
    ],
    ids=["both", "both, the other way round"],
)
def test_two_memories_in_one_run_are_refused_by_name(callbacks):
    with pytest.raises(MisconfigurationException, match=r"One run has one replay memory, got \w+ and \w+"):
        fit_stream(callbacks(), Plain, DigitsData())


@pytest.mark.parametrize("kind", [Replay, DarkExperienceReplay])
def test_two_memories_of_one_kind_are_refused_by_the_trainer(kind):
    with pytest.raises(RuntimeError, match=f"more than one stateful callback of type `{kind.__name__}`"):
        fit_stream([kind(20), kind(30)], Plain, DigitsData())


@pytest.mark.parametrize("off", [DarkExperienceReplay, Replay], ids=["another kind", "the same kind"])
def test_a_replay_that_is_off_does_not_count(off):
    _, together = fit_stream([off(), Replay(20)])
    _, alone = fit_stream([Replay(20)])
    assert same_weights(together, alone)


# ------------------------------------------------------------------ a task is a transaction


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"start": "online"},
        {"selection": "herding"},
        {"mix": "joint"},
        {"selection": "reservoir", "start": "online"},
    ],
    ids=str,
)
def test_a_refused_task_leaves_no_trace_in_the_memory(arguments):
    replay, start = Replay(20, **arguments), {}

    class Looks(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            start[task.index] = copy.deepcopy(replay.memory.state_dict())

        def on_task_rejected(self, trainer, pl_module, task):
            assert same(replay.memory.state_dict(), start[task.index])

    watch = Watch()
    fit_stream([replay, Judge(task=1), Looks(), watch])
    assert same(start[1], start[2])
    assert set(replay.memory.task_counts) == {0, 2}
    assert not any((_tasks_of(batch[1][rows]) == 1).any() for batch, rows in watch.of_task(2))


@pytest.mark.parametrize("arguments", [{}, {"start": "online"}, {"selection": "herding"}], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_that_is_repeated_ends_as_if_it_had_been_trained_once(arguments, workers):
    runs = []
    for attempts in ([], [1, 0]):
        replay = Replay(20, **arguments)
        _, module = fit_stream([replay, Judge(1, attempts)], data=DataOf(Noisy(), num_workers=workers))
        runs.append((dict(module.state_dict()), replay.state_dict()))
    assert same(*runs)


def test_other_attempts_replay_other_samples():
    watch = Watch()
    fit_stream([watch, Replay(40), Judge(1, [1, 0])])
    draws = [batch[2][rows].tolist() for batch, rows in watch.of_task(1)]
    assert draws[:3] == draws[6:]
    assert draws[:3] != draws[3:6]


# ------------------------------------------------------------------ among others


def _leftovers(trainer, module):
    sequence = trainer.datamodule
    return sequence.replay, sequence.training_draw, "training_step" in vars(module), trainer.callbacks


@pytest.mark.parametrize("callback", [Replay, DarkExperienceReplay])
def test_nothing_is_left_after_fit(callback):
    callbacks = [callback(20)]
    trainer, module = fit_stream(callbacks, Plain, DigitsData())
    assert _leftovers(trainer, module) == (None, None, False, callbacks)


@pytest.mark.parametrize("callback", [Replay, DarkExperienceReplay])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end", "on_train_epoch_end", "on_task_end"])
def test_nothing_is_left_after_an_exception(callback, hook):
    class Breaks(ContinualCallback):
        pass

    def break_down(trainer, *args):
        if hook == "on_train_start" or trainer.datamodule.current_task.index == 1:
            raise RuntimeError("broken")

    module = Plain()
    hooks = {name: len(layer._forward_hooks) for name, layer in module.named_modules()}
    breaks = Breaks()
    setattr(breaks, hook, break_down)
    callbacks = [callback(20, start="online"), breaks]
    sequence = ClassIncremental(DigitsData(), num_tasks=3)
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, datamodule=sequence)
    assert _leftovers(trainer, module) == (None, None, False, callbacks)
    assert {name: len(layer._forward_hooks) for name, layer in module.named_modules()} == hooks


def test_a_second_fit_begins_with_an_empty_memory():
    watch, replay = Watch(), Replay(20)
    trainer, module = fit_stream([watch, replay])
    first = copy.deepcopy(replay.memory.state_dict())
    trainer.fit(module, datamodule=trainer.datamodule)
    assert len(watch.steps) == 18
    assert not watch.steps[9][2].any()
    assert same(replay.memory.state_dict(), first)


def test_the_sequences_seed_chooses_unless_the_callback_has_its_own():
    def held(replay, seed):
        fit_stream([replay], stream={"seed": seed})
        return replay.memory.seed, replay.memory.indices.tolist()

    assert held(Replay(20), 5)[0] == 5
    assert held(Replay(20), 5) != held(Replay(20), 6)
    assert held(Replay(20, seed=3), 5) == held(Replay(20, seed=3), 6)


@pytest.mark.parametrize("arguments", [{"size": 20}, {"size": 20, "start": "online"}, {"per_class": 3}], ids=str)
def test_the_state_is_plain(arguments, tmp_path):
    replay = Replay(**arguments)
    fit_stream([replay, ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    (state,) = [
        value
        for name, value in torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].items()
        if "Replay" in name
    ]
    assert same(state, replay.state_dict())


def test_a_saved_state_is_not_moved_by_the_run_that_goes_on():
    replay = Replay(20)
    fit_stream([replay])
    state = replay.state_dict()
    before = copy.deepcopy(state)
    replay.memory.add(3, torch.arange(30), torch.arange(30) % 2)
    replay.memory.indices += 1
    assert same(state, before)


def _companions(tmp_path):
    return [
        ContinualMetrics(print_table=False),
        EarlyStopping("val_acc", mode="max", patience=1),
        ModelCheckpoint(tmp_path, save_top_k=-1),
        Replay(20, start="online"),
    ]


def test_callbacks_in_any_order_give_the_same_run(tmp_path):
    runs = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        callbacks = [_companions(tmp_path / str(order))[place] for place in order]
        trainer, module = fit_stream(
            callbacks,
            lambda: Plain(dropout=0.2),
            DigitsData(),
            enable_checkpointing=True,
            limit_val_batches=1.0,
            max_epochs=3,
        )
        matrix = next(c for c in callbacks if isinstance(c, ContinualMetrics)).matrix
        memory = next(c for c in callbacks if isinstance(c, Replay)).state_dict()["memory"]
        runs.append((dict(module.state_dict()), matrix, memory, trainer.global_step))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_gradient_accumulation_counts_steps_as_without_replay():
    trainer, _ = fit_stream([Replay(20)], accumulate_grad_batches=2)
    assert trainer.global_step == 3 * 2


def test_manual_optimisation_trains_on_past_samples_as_the_automatic_one_does():
    modules = []
    for make in (Plain, Manual):
        modules.append(fit_stream([Replay(20)], make, DigitsData())[1])
    assert same_weights(*modules)


def test_a_training_step_without_batch_idx_is_called_as_it_wants():
    class OneArgument(AnyBatch):
        def training_step(self, batch):
            return self.losses(batch)

    _, trained = fit_stream([Replay(20)], OneArgument)
    assert same_weights(trained, fit_stream([Replay(20)], AnyBatch)[1])


# ------------------------------------------------------------------ the zoo


@pytest.mark.parametrize(
    ("module", "base"),
    [*CLASSIFIERS, (WithoutValidation, TrainingDigits), (Manual, DigitsData), (PredictsLabels, DigitsData)],
)
def test_replay_remembers_whatever_the_module(module, base):
    seed_everything(0, verbose=False)
    metrics, replay = ContinualMetrics(print_table=False), Replay(60)
    validated = {} if base is not TrainingDigits else {"val_fraction": 0.2}
    sequence = ClassIncremental(base(), num_tasks=3, **validated)
    quiet_trainer(callbacks=[metrics, replay], max_epochs=5).fit(module(), datamodule=sequence)
    assert len(replay.memory) == 60
    assert metrics.matrix[2, 0] > 0.6  # without replay it is below 0.2
    assert metrics.matrix[2, 2] > 0.6


@pytest.mark.parametrize("selection", ["reservoir", "herding"])
def test_replay_runs_under_a_torchvision_classifier(selection):
    sequence = ClassIncremental(DigitsData(), num_tasks=2)
    replay = Replay(12, selection)
    quiet_trainer(callbacks=[replay], max_epochs=1, limit_train_batches=2).fit(TorchvisionModule(), datamodule=sequence)
    assert len(replay.memory) == 12


@pytest.mark.parametrize("selection", ["reservoir", "random"])
def test_replay_without_classes(selection):
    replay, watch = Replay(20, selection), Watch()
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])
    quiet_trainer(callbacks=[replay, watch], max_epochs=1).fit(Regression(), datamodule=sequence)
    assert len(replay.memory) == 20
    assert set(replay.memory.labels.tolist()) == {-1}
    for images, rows in ((batch[0], rows) for batch, rows in watch.of_task(1)):
        assert (images[~rows] <= 0).all()
        assert (images[rows] >= 0).all()


def test_one_loader_for_each_task_changes_nothing():
    modules = []
    for loaders in ("joined", "per_task"):
        sequence = ClassIncremental(DigitsData(), num_tasks=3, eval_loaders=loaders)
        modules.append(fit_stream([Replay(20)], PerTask, sequence=sequence, limit_val_batches=1.0)[1])
    assert same_weights(*modules)
