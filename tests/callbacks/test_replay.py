"""Experience replay: which past samples join the batches, and how many."""

import pytest
import torch
from lightning.pytorch import Callback
from numbered_streams import (
    AnyBatch,
    DataOf,
    Watch,
    fit_stream,
    same,
)

from lightning_cl.callbacks import Replay
from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import (
    Scheduled,
)


def _watched(data=None, module=None, replay=None, **settings):
    watch, replay = Watch(), replay or Replay(20)
    fit_stream([watch, replay], module, data, **settings)
    return watch, replay


class _Planned(Scheduled):
    training_step = AnyBatch.training_step
    losses = AnyBatch.losses


def _tasks_of(labels):
    return labels // 2


# ------------------------------------------------------------------ which rows there are


def test_past_samples_stand_behind_the_batchs_own():
    watch, _ = _watched()
    for task, (_, labels, _), rows in watch.steps:
        assert (_tasks_of(labels[~rows]) == task).all()
        assert (_tasks_of(labels[rows]) < task).all()
        assert not rows[: int((~rows).sum())].any()
    assert not any(rows.any() for _, rows in watch.of_task(0))
    assert all(rows.sum() == 16 for task in (1, 2) for _, rows in watch.of_task(task))


def test_only_what_is_in_the_memory_is_replayed():
    class Contents(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            places = zip(replay.memory.tasks.tolist(), replay.memory.indices.tolist(), strict=True)
            held.append({48 * past + index for past, index in places})

    watch, replay, held = Watch(), Replay(20), []
    fit_stream([watch, replay, Contents()])
    assert [len(numbers) for numbers in held] == [0, 20, 20]
    for task, (_, _, numbers), rows in watch.steps:
        assert set(numbers[rows].tolist()) <= held[task]
    assert held[1] != held[2]


def test_the_batchs_own_samples_are_those_of_a_run_without_replay():
    with_replay, without = Watch(), Watch()
    fit_stream([with_replay, Replay(20)])
    fit_stream([without])
    own = [batch[2][~rows] for _, batch, rows in with_replay.steps]
    assert same(own, [batch[2] for _, batch, _ in without.steps])


def test_no_sample_comes_twice_in_a_step():
    watch, _ = _watched(stream={"epochs_per_task": 3})
    assert all(len(set(numbers.tolist())) == len(numbers) for _, (_, _, numbers), _ in watch.steps)


def test_each_step_draws_anew():
    watch, _ = _watched(replay=Replay(40), stream={"epochs_per_task": 2})
    draws = [tuple(sorted(batch[2][rows].tolist())) for batch, rows in watch.of_task(2)]
    assert len(set(draws)) == len(draws) == 6


def test_module_and_callbacks_know_which_rows_are_replayed():
    class Asks(AnyBatch):
        def training_step(self, batch, batch_idx):
            seen.append(("module", self.trainer.datamodule.replay_rows, batch[1]))
            return super().training_step(batch, batch_idx)

    class Hears(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(("end", trainer.datamodule.replay_rows, batch[1]))

    seen = []
    fit_stream([Replay(20), Hears()], Asks)
    assert [who for who, _, _ in seen[-2:]] == ["module", "end"]
    for _, rows, labels in seen[-2:]:
        assert rows.dtype == torch.bool
        assert _tasks_of(labels[rows]).max() < 2 == _tasks_of(labels[~rows]).min()
    assert same(seen[-1][1:], seen[-2][1:])


def test_without_replay_there_are_no_replay_rows():
    watch = Watch()
    fit_stream([watch, Replay()])
    assert all(rows is None for _, _, rows in watch.steps)


# ------------------------------------------------------------------ how many


def _replayed(watch, task=1):
    return [int(rows.sum()) for _, rows in watch.of_task(task)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"size": 40}, [16, 16, 16]),
        ({"size": 40, "batch_size": 5}, [5, 5, 5]),
        ({"size": 40, "batch_size": 33}, [33, 33, 33]),
        ({"size": 10}, [10, 10, 10]),
        ({"size": 10, "batch_size": 11}, [10, 10, 10]),
        ({"per_class": 3}, [6, 6, 6]),
        ({"size": 10, "per_class": 3}, [6, 6, 6]),
    ],
    ids=str,
)
def test_so_many_past_samples_join_each_batch(arguments, expected):
    watch, _ = _watched(replay=Replay(**arguments))
    assert _replayed(watch) == expected
    assert [int((~rows).sum()) for _, rows in watch.of_task(1)] == [16, 16, 16]


def test_a_short_last_batch_is_replayed_as_many():
    watch, _ = _watched(DataOf(batch_size=20))
    assert _replayed(watch) == [20, 20, 8]


def test_per_class_lets_the_memory_grow_with_the_classes():
    _, replay = _watched(replay=Replay(per_class=3))
    assert replay.memory.class_counts == dict.fromkeys(range(6), 3)


@pytest.mark.parametrize("selection", ["class_balanced", "reservoir", "random", "herding"])
def test_every_selection_fills_the_memory_exactly(selection):
    _, replay = _watched(replay=Replay(20, selection))
    assert len(replay.memory) == 20
    if selection in ("class_balanced", "herding"):
        assert set(replay.memory.class_counts.values()) == {3, 4}
    if selection == "random":
        assert replay.memory.task_counts == {0: 7, 1: 7, 2: 6}


def test_online_the_memory_learns_after_each_batch():
    class Counts(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            lengths.append(len(replay.memory))

    lengths, replay, watch = [], Replay(40, "reservoir", batch_size=10, start="online"), Watch()
    fit_stream([watch, replay, Counts()])
    assert lengths == [0, 16, 32, 40, 40, 40, 40, 40, 40]
    assert [int(rows.sum()) for _, _, rows in watch.steps] == [0] + [10] * 8
    tasks = [_tasks_of(labels[rows]).tolist() for _, (_, labels, _), rows in watch.steps]
    assert set(tasks[1]) == {0}  # samples of the first steps come back in the same task
    assert 2 in set(tasks[-1])


@pytest.mark.parametrize("selection", ["class_balanced", "reservoir", "random"])
def test_after_one_pass_an_online_memory_is_that_of_task_ends(selection):
    _, online = _watched(replay=Replay(20, selection, start="online"))
    _, offline = _watched(replay=Replay(20, selection))

    def held(memory):
        return set(zip(memory.tasks.tolist(), memory.indices.tolist(), strict=True))

    assert held(online.memory) == held(offline.memory)


# ------------------------------------------------------------------ joint


def test_joint_epochs_have_each_memory_sample_exactly_once():
    watch, _ = _watched(replay=Replay(20, mix="joint"), stream={"epochs_per_task": 2})
    for task, own in enumerate([range(48), range(48, 96), range(96, 144)]):
        steps = watch.of_task(task)
        assert len(steps) == 2 * (3 if task == 0 else 5)  # 68 samples in batches of 16
        for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
            numbers = torch.cat([batch[2] for batch, _ in epoch]).tolist()
            replayed = torch.cat([batch[2][rows] for batch, rows in epoch]).tolist()
            assert len(set(numbers)) == len(numbers) == 48 + (20 if task else 0)
            assert set(numbers) - set(replayed) == set(own)
            assert len(replayed) == (20 if task else 0)


def test_joint_shuffles_old_among_new():
    watch, _ = _watched(replay=Replay(40, mix="joint"))
    counts = _replayed(watch, 2)
    assert sum(counts) == 40
    assert max(counts) < 16
    orders = [[batch[2].tolist() for batch, _ in watch.of_task(task)] for task in (1, 2)]
    assert orders[0] != orders[1]


def test_joint_shuffles_whatever_the_loader_of_the_base_does():
    watch = Watch()
    fit_stream([watch, Replay(60, mix="joint")], data=DataOf(shuffle=False))
    in_order = [numbers[~rows].tolist() for (_, _, numbers), rows in watch.of_task(1)]
    assert in_order != [sorted(numbers) for numbers in in_order]


def test_a_joint_batch_may_consist_of_past_samples_alone():
    watch, _ = _watched(DataOf(batch_size=2), replay=Replay(40, mix="joint"), module=AnyBatch())
    assert any(rows.all() for _, rows in watch.of_task(1))


@pytest.mark.parametrize(
    "arguments",
    [{"size": 20}, {"per_class": 3}, {"size": 15, "per_class": 3}, {"size": 30, "selection": "reservoir"}],
    ids=str,
)
@pytest.mark.parametrize("sequence", ["classes", "domains"])
def test_a_schedule_over_the_stream_counts_the_longer_epochs_of_joint(arguments, sequence):
    if sequence == "classes":
        stream = ClassIncremental(
            DataOf(), classes_per_task=[3, 2, 1], epochs_per_task=[1, 2, 1], reset_optimizer=False
        )
    else:
        stream = DomainIncremental(DataOf(), [None, torch.Tensor.neg], reset_optimizer=False)
    module = _Planned("one_cycle")
    trainer, _ = fit_stream([Replay(mix="joint", **arguments)], module, sequence=stream)
    ((_, _, steps),) = module.horizons
    assert steps == trainer.global_step == module.schedulers[0].last_epoch


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_schedule_for_each_task_counts_the_longer_epochs_of_joint(schedule):
    module = _Planned(schedule)
    fit_stream([Replay(20, mix="joint")], module)
    assert [steps for _, _, steps in module.horizons] == [3, 5, 5]
    assert [scheduler.last_epoch for scheduler in module.schedulers] == [3, 5, 5]
