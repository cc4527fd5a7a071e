import random

import numpy as np
import pytest
import torch

from lightning_cl.tasks.random_state import (
    collect_random_state,
    forked_cpu_generators,
    restore_random_state,
    seed_generators,
)


@pytest.fixture(autouse=True)
def _own_generators():
    with forked_cpu_generators():
        yield


def _draw():
    return torch.rand(3).tolist(), torch.randn(1).item(), np.random.rand(3).tolist(), np.random.randn(), random.random()


def test_a_restored_state_continues_every_generator():
    np.random.randn()  # leaves a second, cached normal number behind
    random.gauss(0, 1)
    state = collect_random_state()
    expected = _draw(), random.gauss(0, 1)
    seed_generators(99)
    restore_random_state(state)
    assert (_draw(), random.gauss(0, 1)) == expected


def test_a_state_survives_a_checkpoint_file_that_is_loaded_with_weights_only(tmp_path):
    state = collect_random_state()
    expected = _draw()
    torch.save(state, tmp_path / "state.ckpt")
    restore_random_state(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert _draw() == expected


def test_collecting_the_state_draws_nothing():
    seed_generators(1)
    expected = _draw()
    seed_generators(1)
    collect_random_state()
    assert _draw() == expected


def test_seeding_makes_every_generator_repeat_itself():
    seed_generators(5)
    first = _draw()
    seed_generators(6)
    second = _draw()
    seed_generators(5)
    assert _draw() == first != second


def test_any_63_bit_seed_is_accepted():
    seed_generators(2**63 - 1)
    assert _draw()


def test_a_fork_leaves_the_generators_as_they_were():
    seed_generators(3)
    expected = _draw()
    seed_generators(3)
    with forked_cpu_generators():
        seed_generators(4)
        _draw()
    assert _draw() == expected


def test_a_fork_leaves_the_generators_as_they_were_after_an_exception():
    seed_generators(3)
    expected = _draw()
    seed_generators(3)

    def fail():
        with forked_cpu_generators():
            _draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _draw() == expected
