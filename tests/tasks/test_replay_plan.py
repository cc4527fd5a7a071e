"""How past samples join the draws of a task: on any number of ranks, from any position, with any number of workers."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_cl.memory import ReplayMemory
from lightning_cl.tasks import Cursor, TaskSampler
from lightning_cl.tasks.replay_plan import ReplayPlan, ReplaySampler

OWN = 48


def _memory(size=20, selection="class_balanced", past=2, seed=3, **arguments):
    memory = ReplayMemory(size, selection, seed=seed, **arguments)
    for task in range(past):
        memory.add(task, torch.arange(OWN), _labels(task))
    return memory


def _labels(task):
    return 2 * task + torch.arange(OWN) % 2


def _plan(memory=None, batch_size=None, mix="append", online=False):
    memory = _memory() if memory is None else memory
    return ReplayPlan(memory, batch_size, mix, online, copies=range, labels=_labels)


def _sampler(plan=None, batch_size=16, task=2, **settings):
    return ReplaySampler(range(OWN), plan or _plan(), batch_size=batch_size, seed=1, stream_key=task, **settings)


def _replayed(draw):
    """Task and index of the past samples of a draw."""
    return [] if draw.replayed is None else [(task, i) for task, ids in draw.replayed.samples for i in ids]


def _held(memory):
    return list(zip(memory.tasks.tolist(), memory.indices.tolist(), strict=True))


def _over_ranks(replicas, make_plan, batch_size=16, **settings):
    ranks = [
        list(_sampler(make_plan(), batch_size // replicas, num_replicas=replicas, rank=rank, **settings))
        for rank in range(replicas)
    ]
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize(("mix", "online"), [("append", False), ("append", True), ("joint", False)])
@pytest.mark.parametrize("replicas", [2, 4])
def test_every_number_of_ranks_replays_the_same_samples_at_each_step(replicas, mix, online):
    def plan():
        return _plan(_memory(), mix=mix, online=online)

    for alone, together in zip(_over_ranks(1, plan), _over_ranks(replicas, plan), strict=True):
        assert sorted(_replayed(alone[0])) == sorted(pair for draw in together for pair in _replayed(draw))
        assert sorted(alone[0].ids) == sorted(index for draw in together for index in draw.ids)
        assert all(draw.offered == alone[0].offered for draw in together)


def test_ranks_share_past_samples_as_evenly_as_it_goes():
    counts = [[len(_replayed(draw)) for draw in step] for step in _over_ranks(4, lambda: _plan(batch_size=6))]
    assert counts == [[2, 2, 1, 1]] * 3


def test_ranks_may_have_no_past_sample_where_there_are_few():
    counts = [[len(_replayed(draw)) for draw in step] for step in _over_ranks(4, lambda: _plan(batch_size=2))]
    assert counts == [[1, 1, 0, 0]] * 3


def test_every_rank_has_the_same_key():
    for step in _over_ranks(4, _plan):
        assert len({draw.replayed.key for draw in step}) == 1


@pytest.mark.parametrize("cursor", [Cursor(), Cursor(epoch=1), Cursor(attempt=1)])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("mix", ["append", "joint"])
def test_a_resumed_position_continues_exactly(cursor, step, mix):
    whole = list(_sampler(_plan(mix=mix), cursor=lambda: cursor))
    rest = list(_sampler(_plan(mix=mix), cursor=lambda: cursor._replace(step=step)))
    assert rest == whole[step:]


def test_online_a_resumed_position_continues_from_the_memory_as_it_was():
    plan = _plan(_memory(past=0), online=True, batch_size=5)
    whole = list(_sampler(plan))
    for step, draw in enumerate(whole):
        assert list(_sampler(plan, cursor=lambda: Cursor(step=step))) == whole[step:]  # noqa: B023
        plan.offer(plan.memory, 2, draw.offered)
    assert _held(plan.memory)


def test_looking_ahead_leaves_the_memory_alone():
    plan = _plan(online=True)
    before = plan.memory.state_dict()
    draws = list(_sampler(plan))
    after = plan.memory.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("tasks", "indices", "keys", "labels"))
    assert any(task == 2 for draw in draws[1:] for task, _ in _replayed(draw))


def test_online_a_step_draws_from_the_memory_before_it_learns_from_the_step():
    plan, memory = _plan(_memory(past=1, selection="reservoir"), online=True), _memory(past=1, selection="reservoir")
    for draw in _sampler(plan):
        assert draw.offered == draw.ids
        assert set(_replayed(draw)) <= set(_held(memory))
        slots = {_held(memory)[slot] for slot in draw.replayed.slots}
        assert slots == set(_replayed(draw))
        memory.add(2, torch.tensor(draw.offered))


def test_slots_and_samples_stand_in_the_same_order():
    memory = _memory()
    for draw in _sampler(_plan(memory)):
        assert [_held(memory)[slot] for slot in draw.replayed.slots] == _replayed(draw)
        tasks = [task for task, _ in draw.replayed.samples]
        assert tasks == sorted(set(tasks))


def test_an_empty_memory_changes_nothing_in_the_draws():
    empty = ReplayMemory(20)
    with_memory = list(_sampler(_plan(empty), task=0))
    assert with_memory == list(TaskSampler([range(OWN)], 16, seed=1, stream_key=0))


def test_appended_samples_do_not_lengthen_the_epoch_and_joint_ones_do():
    assert len(_sampler()) == 3
    assert len(_sampler(_plan(mix="joint"))) == 5  # 68 samples in batches of 16


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_joint_has_each_slot_and_each_sample_once_an_epoch(replicas, epoch):
    memory = _memory()
    steps = _over_ranks(replicas, lambda: _plan(memory, mix="joint"), cursor=lambda: Cursor(epoch=epoch))
    draws = [draw for step in steps for draw in step]
    assert sorted(index for draw in draws for index in draw.ids) == list(range(OWN))
    assert sorted(pair for draw in draws for pair in _replayed(draw)) == sorted(_held(memory))


def test_draws_are_uniform_over_the_memory():
    memory, counts = _memory(size=40), Counter()
    for epoch in range(300):
        for draw in _sampler(_plan(memory, batch_size=4), cursor=lambda: Cursor(epoch=epoch)):  # noqa: B023
            counts.update(_replayed(draw))
    expected = 300 * 3 * 4 / 40
    chi_square = sum((counts[pair] - expected) ** 2 for pair in _held(memory)) / expected
    assert chi_square < 80  # 39 degrees of freedom


@pytest.mark.parametrize(
    "other",
    [{"cursor": lambda: Cursor(epoch=1)}, {"cursor": lambda: Cursor(attempt=1)}, {"task": 3}],
    ids=["epoch", "attempt", "task"],
)
def test_epochs_attempts_and_tasks_draw_anew(other):
    assert [_replayed(d) for d in _sampler()] != [_replayed(d) for d in _sampler(**other)]


def test_another_seed_of_the_memory_draws_otherwise():
    plans = [_plan(_memory(selection="reservoir", size=96, seed=seed)) for seed in (3, 4)]
    assert sorted(_held(plans[0].memory)) == sorted(_held(plans[1].memory))
    assert [_replayed(d) for d in _sampler(plans[0])] != [_replayed(d) for d in _sampler(plans[1])]


def test_each_step_has_a_key_of_its_own():
    keys = {draw.replayed.key for epoch in range(3) for draw in _sampler(cursor=lambda: Cursor(epoch=epoch))}  # noqa: B023
    assert len(keys) == 9


def test_nothing_is_drawn_from_the_global_generators():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(_sampler(_plan(online=True)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


# ------------------------------------------------------------------ how long the memory will be


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [
        ({"size": 60}, [0, 48, 60, 60]),
        ({"size": 60, "selection": "reservoir"}, [0, 48, 60, 60]),
        ({"size": 60, "selection": "random"}, [0, 48, 60, 60]),
        ({"size": None, "per_class": 5}, [0, 10, 20, 30]),
        ({"size": 25, "per_class": 5}, [0, 10, 20, 25]),
        ({"size": None, "per_class": 100}, [0, 48, 96, 144]),
    ],
    ids=str,
)
def test_the_length_of_the_memory_is_known_ahead_of_time(arguments, lengths):
    memory = ReplayMemory(**{"selection": "class_balanced", **arguments})
    plan = _plan(memory)
    assert [plan.length_before(task, [OWN] * 4) for task in range(4)] == lengths
    filled = [0]
    for task in range(3):
        memory.add(task, torch.arange(OWN), _labels(task))
        filled.append(len(memory))
    assert filled == lengths


def test_a_class_that_comes_again_is_counted_once_per_class():
    plan = ReplayPlan(ReplayMemory(per_class=5), None, "joint", False, copies=range, labels=lambda task: _labels(0))
    assert [plan.length_before(task, [OWN] * 3) for task in range(3)] == [0, 10, 10]


def test_tasks_before_are_those_with_samples_in_the_memory():
    memory = ReplayMemory(20, "reservoir")
    memory.add(0, torch.arange(OWN))
    memory.add(2, torch.arange(OWN))
    assert _plan(memory).tasks_before(2) == [0]
    assert _plan(memory).tasks_before(3) == [0, 2]
