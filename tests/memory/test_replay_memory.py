import numpy as np
import pytest
import torch
from offers import HASHED, SELECTIONS, assert_same_slots, filled_memory, offer_samples, samples_in

from lightning_cl.hashing import mix
from lightning_cl.memory import ReplayMemory


def test_reservoir_is_uniform_over_the_stream():
    stream, size, seeds = 10_000, 500, 2_000
    indices, taken = torch.arange(stream), np.zeros(stream)
    for seed in range(seeds):
        memory = ReplayMemory(size, "reservoir", seed=seed)
        memory.add(0, indices)
        taken[memory.indices.numpy()] += 1
    expected = seeds * size / stream
    chi_square = ((taken - expected) ** 2).sum() / (expected * (1 - size / stream))
    assert abs(chi_square - stream) < 4 * (2 * stream) ** 0.5
    tenths = taken.reshape(10, -1).sum(axis=1) / (seeds * size)  # early and late samples alike
    assert np.abs(tenths - 0.1).max() < 4 * (0.1 * 0.9 / (seeds * size)) ** 0.5


def test_reservoir_is_uniform_over_the_tasks():
    taken = np.zeros(4)
    for seed in range(300):
        memory = ReplayMemory(100, "reservoir", seed=seed)
        for task in range(4):
            memory.add(task, torch.arange(500))
        taken += [memory.task_counts[task] for task in range(4)]
    assert np.abs(taken / 30_000 - 0.25).max() < 4 * (0.25 * 0.75 / 30_000) ** 0.5


@pytest.mark.parametrize("selection", HASHED)
@pytest.mark.parametrize("chunk", [1, 7, 250])
def test_offering_in_chunks_gives_the_same_memory_as_offering_at_once(selection, chunk):
    at_once, in_chunks = ReplayMemory(50, selection), ReplayMemory(50, selection)
    for task, classes in enumerate([[4, 1, 1, 1, 9], [0, 4], [7, 3, 3]]):
        offer_samples(at_once, task, 300, classes)
        for start in range(0, 300, chunk):
            offer_samples(in_chunks, task, min(chunk, 300 - start), classes, start)
    assert_same_slots(at_once, in_chunks)


@pytest.mark.parametrize("selection", HASHED)
def test_the_order_of_the_offer_does_not_change_who_stays(selection):
    labels = torch.arange(400) % 7 // 2
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    forward, shuffled = ReplayMemory(30, selection), ReplayMemory(30, selection)
    forward.add(0, torch.arange(400), labels)
    shuffled.add(0, order, labels[order])
    assert set(samples_in(forward)) == set(samples_in(shuffled))


def test_the_key_of_a_sample_is_a_hash_of_seed_task_and_index():
    memory = ReplayMemory(10, "reservoir", seed=5)
    memory.add(3, torch.tensor([17, 4]))
    assert memory.keys.tolist() == [mix(5, 3, 17), mix(5, 3, 4)]


def test_another_seed_chooses_other_samples():
    assert set(samples_in(filled_memory(seed=0))) != set(samples_in(filled_memory(seed=1)))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_memory_is_as_full_as_it_can_be_and_never_fuller(selection):
    for size in (5, 7, 31, 64, 500):
        memory, offered = ReplayMemory(size, selection), 0
        for task, classes in enumerate([[0, 1, 2], [3], [4, 1]]):
            for start in range(0, 60, 20):
                offer_samples(memory, task, 20, classes, start)
                offered += 20
                assert len(memory) == min(size, offered)


def test_three_classes_in_2000_slots_take_2000_slots():
    memory = ReplayMemory(2000)
    offer_samples(memory, 0, 9000, [0, 1, 2])
    assert memory.class_counts == {0: 667, 1: 667, 2: 666}


@pytest.mark.parametrize("selection", ["class_balanced", "herding"])
def test_each_class_has_an_equal_share_whatever_its_size(selection):
    memory = ReplayMemory(60, selection)
    offer_samples(memory, 0, 400, [0, 0, 0, 1])
    offer_samples(memory, 1, 200, [2])
    assert memory.class_counts == {0: 20, 1: 20, 2: 20}


def test_each_task_has_an_equal_share_of_a_random_memory():
    memory = ReplayMemory(61, "random")
    for task, count in enumerate([1000, 30, 10]):
        memory.add(task, torch.arange(count))
    assert memory.task_counts == {0: 26, 1: 25, 2: 10}


def test_a_small_class_leaves_its_slots_to_the_others():
    memory = ReplayMemory(30)
    memory.add(0, torch.arange(103), torch.tensor([5] * 3 + [1] * 50 + [9] * 50))
    assert memory.class_counts == {1: 14, 5: 3, 9: 13}


@pytest.mark.parametrize("selection", ["class_balanced", "herding"])
def test_per_class_bounds_each_class(selection):
    memory = ReplayMemory(100, selection, per_class=8)
    offer_samples(memory, 0, 90, [0, 1, 2])
    offer_samples(memory, 1, 90, [2, 3])
    assert memory.class_counts == {0: 8, 1: 8, 2: 8, 3: 8}


def test_without_size_the_memory_grows_with_each_class():
    memory = ReplayMemory(per_class=5)
    for task in range(4):
        offer_samples(memory, task, 40, [2 * task, 2 * task + 1])
        assert len(memory) == 10 * (task + 1)


def test_size_bounds_a_memory_with_per_class_too():
    memory = ReplayMemory(10, per_class=8)
    offer_samples(memory, 0, 90, [0, 1, 2])
    assert memory.class_counts == {0: 4, 1: 3, 2: 3}


def test_class_ids_may_be_large():
    memory = ReplayMemory(6)
    offer_samples(memory, 0, 90, [2**31 - 1, 70_000, 5])
    assert memory.class_counts == {5: 2, 70_000: 2, 2**31 - 1: 2}


def test_herding_keeps_the_first_choices_and_cuts_old_classes_from_the_end():
    memory = ReplayMemory(40, "herding")
    offer_samples(memory, 0, 100, [0, 1])
    ranks = {
        (index, label): key
        for index, label, key in zip(memory.indices.tolist(), memory.labels.tolist(), memory.keys.tolist(), strict=True)
    }
    assert sorted(ranks.values()) == sorted(list(range(20)) * 2)
    offer_samples(memory, 1, 100, [2, 3])
    kept = (memory.tasks == 0).nonzero()[:, 0]
    assert len(kept) == 20
    for slot in kept.tolist():
        assert memory.keys[slot] == ranks[int(memory.indices[slot]), int(memory.labels[slot])] < 10


@pytest.mark.parametrize("share", [5, 10, 30, 50])
def test_a_herded_class_that_comes_again_shares_its_slots_with_its_old_samples(share):
    memory = ReplayMemory(3 * share + 1, "herding")
    for task in range(3):
        offer_samples(memory, task, 2 * share, [0])
    assert memory.task_counts == {0: share + 1, 1: share, 2: share}  # of equal ranks, who came first stays
    for task, count in memory.task_counts.items():
        assert sorted(memory.keys[memory.tasks == task].tolist()) == list(range(count))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_sample_is_not_added_twice(selection):
    memory = ReplayMemory(100, selection)
    offer_samples(memory, 0, 30, [0, 1])
    before = samples_in(memory)
    offer_samples(memory, 0, 30, [0, 1])
    assert samples_in(memory) == before
    offer_samples(memory, 0, 40, [0, 1])
    assert sorted(samples_in(memory)) == [(0, index) for index in range(40)]


def test_a_sample_given_twice_in_one_offer_counts_once():
    memory = ReplayMemory(10)
    memory.add(0, [3, 1, 3, 2, 1], [0, 1, 0, 0, 1])
    assert memory.indices.tolist() == [3, 1, 2]
    assert memory.labels.tolist() == [0, 1, 0]


def test_the_same_index_of_another_task_is_another_sample():
    memory = ReplayMemory(10, "reservoir")
    memory.add(0, [1, 2])
    memory.add(1, [1, 2])
    assert samples_in(memory) == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_slots_keep_the_order_in_which_samples_were_offered(selection):
    memory = filled_memory(selection)
    assert samples_in(memory) == sorted(samples_in(memory))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_select_tells_whom_add_would_take_in(selection):
    memory = filled_memory(selection, size=40)
    state = memory.state_dict()
    indices = torch.randperm(300, generator=torch.Generator().manual_seed(0)) + 50  # some are in the memory
    labels = torch.arange(300) % 4 + 2
    features = torch.randn(300, 3, generator=torch.Generator().manual_seed(1))
    chosen = memory.select(1, indices, labels, features)
    twin = memory.fork()
    twin.add(1, indices, labels, features)
    newcomers = [sample for sample in samples_in(twin) if sample not in samples_in(memory)]
    assert newcomers == [(1, index) for index in indices[chosen].tolist()]
    assert len(newcomers) > 0
    assert repr(memory.state_dict()) == repr(state)


def test_samples_without_labels_have_the_label_minus_one_and_no_class():
    memory = ReplayMemory(10, "reservoir")
    memory.add(0, torch.arange(4))
    memory.add(1, torch.arange(2), torch.tensor([7, 7]))
    assert memory.labels.tolist() == [-1, -1, -1, -1, 7, 7]
    assert memory.class_counts == {7: 2}
    assert memory.task_counts == {0: 4, 1: 2}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_empty_offer_changes_nothing(selection):
    memory = filled_memory(selection)
    before = samples_in(memory)
    memory.add(2, [], [], torch.empty(0, 3))
    assert samples_in(memory) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`size` must be a number of slots"),
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"per_class": 0}, "`per_class` must be at least 1, got 0"),
        ({"size": 5, "selection": "best"}, "`selection` must be one of 'class_balanced', 'reservoir'"),
        ({"size": 5, "selection": "reservoir", "per_class": 2}, "`per_class` is for `selection` 'class_balanced'"),
        ({"selection": "random"}, "`size` must be"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReplayMemory(**arguments)


@pytest.mark.parametrize(
    ("selection", "offer", "message"),
    [
        ("reservoir", (-1, [1]), "`task` must be from 0"),
        ("reservoir", (0, [1, -2]), "`indices` must be from 0 .* got -2 to 1"),
        ("reservoir", (0, torch.zeros(2, 2, dtype=torch.long)), r"`indices` must be integers .* shape \(2, 2\)"),
        ("reservoir", (0, torch.rand(2)), "`indices` must be integers .* float32"),
        ("reservoir", (0, [1, 2], [1]), "`labels` must be one for each of the 2 `indices`, got 1"),
        ("class_balanced", (0, [1, 2]), "`labels` must be given for `selection` 'class_balanced'"),
        ("class_balanced", (0, [1, 2], [1, -1]), "`labels` must be from 0 .* got -1 to 1"),
        ("class_balanced", (0, [1, 2], [1, 2**31]), "`labels` must be from 0 to 2147483647"),
        ("herding", (0, [1, 2], [1, 1]), "`features` must be given for `selection` 'herding'"),
        ("herding", (0, [1, 2], [1, 1], torch.rand(3, 2)), r"`features` must have the shape \(2, dim\).* got \(3, 2\)"),
        ("herding", (0, [1, 2], [1, 1], torch.tensor([[1.0], [torch.nan]])), "`features` must be finite"),
    ],
)
def test_a_malformed_offer_is_refused_and_changes_nothing(selection, offer, message):
    memory = filled_memory(selection)
    before = samples_in(memory)
    with pytest.raises(ValueError, match=message):
        memory.add(*offer)
    assert samples_in(memory) == before


@pytest.mark.parametrize("selection", ["reservoir", "random"])
def test_targets_that_are_no_classes_are_kept_as_unlabelled(selection):
    memory = ReplayMemory(5, selection)
    memory.add(0, [0, 1, 2, 3, 4], torch.tensor([0.5, -2.0, 1e12, 3.0, 1.0]).long())
    labels = memory.labels.tolist()
    assert sorted(labels) == [-1, -1, 0, 1, 3]


@pytest.mark.parametrize("selection", ["class_balanced", "herding"])
def test_more_classes_than_slots_are_refused_before_anything_changes(selection):
    memory = ReplayMemory(4, selection)
    offer_samples(memory, 0, 40, [0, 1, 2])
    before = samples_in(memory)
    with pytest.raises(ValueError, match="`size` must be at least one slot for each of the 5 classes seen, got 4"):
        offer_samples(memory, 1, 40, [3, 4])
    assert samples_in(memory) == before


def test_more_tasks_than_slots_are_refused():
    memory = ReplayMemory(2, "random")
    for task in range(2):
        memory.add(task, [1, 2])
    with pytest.raises(ValueError, match="`size` must be at least one slot for each of the 3 tasks seen, got 2"):
        memory.add(2, [1])
