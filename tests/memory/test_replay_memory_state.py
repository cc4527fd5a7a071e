import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from offers import HASHED, SELECTIONS, SLOT_TENSORS, assert_same_slots, filled_memory, offer_samples, samples_in

from lightning_cl.memory import ReplayMemory


@pytest.mark.parametrize("count", [0, 1, 10, 49, 50, 200])
def test_a_draw_has_no_slot_twice_and_at_most_all_of_them(count):
    drawn = filled_memory().sample(count, key=3)
    assert drawn.dtype == torch.long
    assert len(drawn.unique()) == len(drawn) == min(count, 50)
    assert all(0 <= slot < 50 for slot in drawn.tolist())


def test_draws_are_uniform_over_the_slots():
    memory = filled_memory()
    drawn = torch.cat([memory.sample(10) for _ in range(2_000)])
    counts = torch.bincount(drawn, minlength=50).double()
    chi_square = ((counts - 400) ** 2).sum() / (400 * (1 - 10 / 50))
    assert abs(chi_square - 50) < 4 * 10


def test_a_draw_depends_on_key_and_length_only():
    one, other = filled_memory("class_balanced"), filled_memory("random", seed=4)
    one.sample(5)
    assert torch.equal(one.sample(20, key=9), other.sample(20, key=9))
    assert not torch.equal(one.sample(20, key=9), one.sample(20, key=10))
    assert len(one.sample(20, key=-1)) == 20


def test_draws_without_a_key_go_on_after_a_round_trip():
    memory, twin = filled_memory(), filled_memory()
    memory.sample(10)
    twin.load_state_dict(memory.state_dict())
    first = memory.sample(10)
    assert torch.equal(twin.sample(10), first)
    assert not torch.equal(memory.sample(10), first)


def test_an_empty_memory_gives_an_empty_draw():
    drawn = ReplayMemory(10).sample(5)
    assert drawn.tolist() == []
    assert drawn.dtype == torch.long


def test_find_gives_the_slot_of_each_sample():
    memory = ReplayMemory(10, "reservoir")
    memory.add(0, [5, 3, 8])
    memory.add(1, [3, 9])
    assert memory.find(1, [9, 5, 3, 9]).tolist() == [4, -1, 3, 4]
    assert memory.find(0, torch.tensor([8, 100])).tolist() == [2, -1]
    assert memory.find(2, [5]).tolist() == [-1]
    assert memory.find(0, []).tolist() == []


@pytest.mark.parametrize("selection", SELECTIONS)
def test_extras_follow_their_slots(selection):
    memory = ReplayMemory(40, selection)
    offer_samples(memory, 0, 100, [0, 1])
    slots = torch.arange(len(memory))
    memory.put("logits", slots, torch.stack([memory.indices, memory.indices * 2], dim=1).float())
    memory.put("age", slots, memory.indices + 1)
    for start in (0, 50):
        offer_samples(memory, 1, 50, [2, 3], start)
    old = memory.tasks == 0
    assert 0 < old.sum() < len(memory)
    assert torch.equal(memory.extras["logits"][old, 1], memory.indices[old] * 2.0)
    assert memory.extras["logits"][~old].isnan().all()
    assert torch.equal(memory.extras["age"][old], memory.indices[old] + 1)
    assert (memory.extras["age"][~old] == 0).all()


def test_an_extra_put_for_some_slots_is_nan_in_the_others():
    memory = filled_memory()
    memory.put("logits", torch.tensor([4, 2]), torch.tensor([[1.0], [2.0]], requires_grad=True))
    assert memory.extras["logits"][[2, 4]].tolist() == [[2.0], [1.0]]
    assert int(memory.extras["logits"].isnan().sum()) == 48
    assert not memory.extras["logits"].requires_grad


def test_a_fork_is_independent_and_has_no_extras():
    memory = filled_memory()
    memory.put("logits", torch.arange(50), torch.zeros(50, 2))
    memory.sample(3)
    fork = memory.fork()
    assert_same_slots(memory, fork)
    assert fork.extras == {}
    before, next_draw = samples_in(memory), memory.fork().sample(5)
    offer_samples(fork, 2, 100, [8, 9])
    fork.labels.zero_()
    assert samples_in(memory) == before
    assert memory.class_counts == {0: 10, 1: 10, 2: 10, 3: 10, 4: 10}
    assert torch.equal(memory.sample(5), next_draw)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_state_survives_a_file_that_loads_weights_only(selection):
    memory = filled_memory(selection, seed=11)
    memory.put("logits", torch.arange(20), torch.rand(20, 3))
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    twin = ReplayMemory(50, selection)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for both in (memory, twin):
        offer_samples(both, 2, 100, [5, 6])
    assert_same_slots(memory, twin)
    assert torch.equal(memory.extras["logits"].nan_to_num(-1), twin.extras["logits"].nan_to_num(-1))
    assert twin.seed == 11


def test_a_state_shares_nothing_with_the_memory():
    memory = filled_memory()
    memory.put("logits", torch.arange(50), torch.zeros(50, 2))
    state = memory.state_dict()
    twin = filled_memory()
    twin.load_state_dict(state)
    for tensor in (*(state[name] for name in SLOT_TENSORS), state["extras"]["logits"]):
        tensor.fill_(99)
    for untouched in (memory, twin):
        assert 99 not in untouched.labels
        assert 99 not in untouched.extras["logits"]


@pytest.mark.parametrize("selection", HASHED)
def test_a_loaded_memory_forgets_what_it_held_before(selection):
    other, twin = filled_memory(selection), ReplayMemory(50, selection)
    for _ in range(2):  # by the second time, few samples could still get in
        offer_samples(twin, 0, 3000, [0, 1, 2, 3, 4])
    twin.load_state_dict(other.state_dict())
    for memory in (other, twin):
        offer_samples(memory, 0, 300, [0, 1, 2], start=5000)
    assert_same_slots(other, twin)
    assert int(twin.indices.max()) >= 5000


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (ReplayMemory(51), "size"),
        (ReplayMemory(50, "reservoir"), "selection"),
        (ReplayMemory(50, per_class=3), "per_class"),
    ],
)
def test_the_state_of_another_kind_of_memory_is_refused(other, name):
    state = filled_memory().state_dict()
    with pytest.raises(ValueError, match=rf"`{name}` is .*{state[name]}.* in the saved memory"):
        other.load_state_dict(state)
    assert len(other) == 0


def test_values_for_slots_that_do_not_fit_are_refused():
    memory = filled_memory()
    with pytest.raises(ValueError, match="`slots` must be from 0 to 49, got -1 to 3"):
        memory.put("logits", torch.tensor([3, -1]), torch.zeros(2, 4))
    memory.put("logits", torch.tensor([3]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"`values` of 'logits' must have the shape \(2, 4\), got \(2, 5\)"):
        memory.put("logits", torch.tensor([3, 4]), torch.zeros(2, 5))


def test_a_negative_draw_is_refused():
    with pytest.raises(ValueError, match="`count` must be at least 0, got -1"):
        filled_memory().sample(-1)


@pytest.mark.parametrize("selection", HASHED)
def test_a_million_slots_take_less_than_32_megabytes(selection):
    memory = ReplayMemory(1_000_000, selection)
    for task in range(2):
        memory.add(task, torch.arange(1_000_000), torch.arange(1_000_000) % 100)
    assert len(memory) == 1_000_000
    held = [value for value in vars(memory).values() if isinstance(value, (torch.Tensor, np.ndarray))]
    assert sum(array.nbytes for array in held) <= 32_000_000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason=f"no /proc on {sys.platform}")
@pytest.mark.parametrize("selection", ["reservoir", "class_balanced"])
def test_a_hundred_thousand_online_updates_leave_no_memory_behind(selection):
    program = Path(__file__).with_name("online_updates.py")
    # a process of its own: what other tests left on the heap moves the figure by megabytes
    ended = subprocess.run([sys.executable, program, selection], capture_output=True, text=True, check=True)
    resident, objects, slots = map(int, ended.stdout.split())
    assert resident < 5_000_000
    assert objects < 50
    assert slots == 1000
