import random

import numpy as np
import pytest
import torch

from lightning_cl.tasks import Cursor, Draw, TaskSampler
from lightning_cl.tasks.sampler import batches_per_epoch


def _sampler(length=50, batch_size=8, **arguments):
    lengths = [length] if isinstance(length, int) else length
    return TaskSampler([range(n) for n in lengths], batch_size, **arguments)


def _global_batches(length, batch_size, num_replicas, **arguments):
    """The ids of each step, put together from all ranks."""
    ranks = [
        list(_sampler(length, batch_size, num_replicas=num_replicas, rank=rank, **arguments))
        for rank in range(num_replicas)
    ]
    return [[index for draw in step for index in draw.ids] for step in zip(*ranks, strict=True)]


def _reference_splitmix(*parts):
    """splitmix64 in numpy's wrapping arithmetic, folded over the parts."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.uint64(part)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return int(state >> np.uint64(1))


def _reference_batches(length, global_batch, seed, task, attempt, epoch, part=0):
    """One epoch on one rank, written the slow way: a permutation, cut from the front until nothing is left."""
    generator = torch.Generator().manual_seed(_reference_splitmix(seed, task, part, attempt, epoch))
    order = torch.randperm(length, generator=generator).tolist()
    batches = []
    while order:
        batches.append(order[:global_batch])
        order = order[global_batch:]
    return batches


@pytest.mark.parametrize("cursor", [Cursor(), Cursor(epoch=2), Cursor(attempt=1, epoch=2)])
@pytest.mark.parametrize(("seed", "task"), [(0, 0), (7, 3)])
def test_ids_are_a_function_of_seed_task_attempt_and_epoch(seed, task, cursor):
    sampler = _sampler(seed=seed, stream_key=task, cursor=lambda: cursor)
    expected = _reference_batches(50, 8, seed, task, cursor.attempt, cursor.epoch)
    assert [draw.ids for draw in sampler] == expected
    assert [draw.ids for draw in sampler] == expected  # a second pass is the same


@pytest.mark.parametrize("length", [64, 61, 65, 67, 71, 8, 4])
@pytest.mark.parametrize("replicas", [2, 4])
def test_every_number_of_ranks_sees_the_same_samples_at_each_step(length, replicas):
    alone = _global_batches(length, 8, 1)
    together = _global_batches(length, 8 // replicas, replicas)
    rest = length % 8
    if 0 < rest < replicas and length > 8:  # too few for a batch of their own: documented to join the one before
        alone = [*alone[:-2], alone[-2] + alone[-1]]
    assert together == alone


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [4, 12, 13, 23, 24, 25, 26, 37])
def test_each_sample_comes_once_an_epoch_and_no_batch_is_empty(length, replicas, shuffle):
    ranks = [list(_sampler(length, 3, num_replicas=replicas, rank=r, shuffle=shuffle)) for r in range(replicas)]
    ids = [index for rank in ranks for draw in rank for index in draw.ids]
    assert sorted(ids) == list(range(length))
    assert all(draw.ids for rank in ranks for draw in rank)
    assert len({len(rank) for rank in ranks}) == 1


def test_the_last_batch_is_shared_out_as_evenly_as_it_goes():
    sizes = [[len(draw.ids) for draw in _sampler(23, 4, num_replicas=4, rank=rank)] for rank in range(4)]
    assert sizes == [[4, 2], [4, 2], [4, 2], [4, 1]]


def test_a_rest_smaller_than_the_number_of_ranks_joins_the_batch_before_it():
    sizes = [[len(draw.ids) for draw in _sampler(35, 4, num_replicas=4, rank=rank)] for rank in range(4)]
    assert sizes == [[4, 5], [4, 5], [4, 5], [4, 4]]


def test_a_rest_of_one_sample_for_each_rank_is_a_batch():
    sizes = [[len(draw.ids) for draw in _sampler(36, 4, num_replicas=4, rank=rank)] for rank in range(4)]
    assert sizes == [[4, 4, 1]] * 4


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_drop_last_leaves_only_full_batches(replicas):
    batches = _global_batches(30, 8 // replicas, replicas, drop_last=True)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert batches == _global_batches(30, 8, 1)[:3]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("length", [8, 9, 31, 32, 33, 38])
def test_the_length_is_the_number_of_batches(length, replicas, drop_last):
    sampler = _sampler(length, 2, num_replicas=replicas, drop_last=drop_last)
    assert len(sampler) == len(list(sampler)) == batches_per_epoch(length, 2 * replicas, replicas, drop_last)


@pytest.mark.parametrize("step", [0, 1, 5, 6, 7])
def test_a_resumed_cursor_continues_exactly(step):
    whole = list(_sampler(50, 4, num_replicas=2, rank=1, cursor=lambda: Cursor(epoch=3)))
    rest = list(_sampler(50, 4, num_replicas=2, rank=1, cursor=lambda: Cursor(epoch=3, step=step)))
    assert rest == whole[step:]


@pytest.mark.parametrize("step", range(9))
def test_a_resumed_cursor_continues_in_the_right_one_of_several_parts(step):
    lengths = [9, 4, 17]  # 3 + 1 + 5 batches
    whole = list(_sampler(lengths, 4))
    assert len(whole) == 9
    assert list(_sampler(lengths, 4, cursor=lambda: Cursor(step=step))) == whole[step:]


def test_the_cursor_is_looked_up_when_iteration_begins():
    position = Cursor()
    sampler = _sampler(cursor=lambda: position)
    batches = iter(sampler)
    position = Cursor(step=6)
    assert len(list(batches)) == 1


def test_without_a_cursor_the_epoch_is_the_one_that_was_set():
    sampler = _sampler(cursor=None)
    sampler.set_epoch(4)
    assert list(sampler) == list(_sampler(cursor=lambda: Cursor(epoch=4)))


@pytest.mark.parametrize(
    "other",
    [{"cursor": lambda: Cursor(attempt=1)}, {"cursor": lambda: Cursor(epoch=1)}, {"stream_key": 1}, {"seed": 1}],
    ids=["attempt", "epoch", "task", "seed"],
)
def test_attempts_epochs_tasks_and_seeds_have_orders_and_transform_seeds_of_their_own(other):
    first, second = list(_sampler()), list(_sampler(**other))
    assert [draw.ids for draw in first] != [draw.ids for draw in second]
    assert first[0].key != second[0].key


def test_without_shuffling_every_epoch_has_the_data_sets_order():
    for epoch in range(2):
        batches = [draw.ids for draw in _sampler(10, 4, shuffle=False, cursor=lambda: Cursor(epoch=epoch))]  # noqa: B023
        assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_without_shuffling_random_transforms_still_differ_between_epochs():
    keys = {next(iter(_sampler(shuffle=False, cursor=lambda: Cursor(epoch=epoch)))).key for epoch in range(3)}  # noqa: B023
    assert len(keys) == 3


def test_batches_do_not_cross_from_one_part_to_the_next():
    draws = list(_sampler([5, 3], 4, shuffle=False))
    assert [(draw.part, draw.ids) for draw in draws] == [(0, [0, 1, 2, 3]), (0, [4]), (1, [0, 1, 2])]


def test_parts_of_equal_length_have_orders_of_their_own():
    first, second = list(_sampler([40, 40], 40))
    assert first.ids != second.ids


def test_a_draw_says_the_same_key_on_every_rank():
    keys = {draw.key for rank in range(4) for draw in _sampler(40, 2, num_replicas=4, rank=rank)}
    assert len(keys) == 1


def test_nothing_is_drawn_from_or_written_to_the_global_generators():
    expected = list(_sampler())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert list(_sampler()) == expected
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_lightning_leaves_it_in_place_as_a_distributed_sampler():
    assert isinstance(_sampler(), torch.utils.data.DistributedSampler)
    assert isinstance(next(iter(_sampler())), Draw)


def test_fewer_samples_than_ranks_is_refused():
    with pytest.raises(ValueError, match=r"has 3 samples for 4 ranks.*Use at most 3 devices"):
        _sampler(3, 8, num_replicas=4)


def test_one_part_with_fewer_samples_than_ranks_is_refused():
    with pytest.raises(ValueError, match="has 1 samples for 2 ranks"):
        _sampler([20, 1], 8, num_replicas=2)


def test_drop_last_that_leaves_no_batch_is_refused():
    with pytest.raises(ValueError, match=r"`drop_last=True` leaves no batch.*7 samples.*global batch is 8 \(2 x 4\)"):
        _sampler(7, 4, num_replicas=2, drop_last=True)
