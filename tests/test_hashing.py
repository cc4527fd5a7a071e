import subprocess
import sys

import pytest
import torch

from lightning_cl.hashing import mix, mix_each

LIMITS = torch.tensor([0, 1, 2, 255, 2**31, 2**62 + 12345, 2**63 - 1, -1, -(2**31), -(2**63)])


def test_the_hash_never_changes():
    assert [mix(), mix(0), mix(1, 2, 3), mix(-1)] == [0, 8147104208329303767, 7510213797696614745, 8245168133484221968]


def test_the_hash_is_splitmix64():
    # the published first output for seed 0, halved
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    assert mix(-1) == mix(2**64 - 1)


def test_the_hash_is_the_same_in_another_process():
    program = "from lightning_cl.hashing import mix; print(mix(7, 11, 13))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(printed) == mix(7, 11, 13)


def test_the_order_of_the_parts_counts():
    assert len({mix(1, 2, 3), mix(3, 2, 1), mix(1, 2), mix(2, 1), mix(1, 2, 3, 0)}) == 5


@pytest.mark.parametrize("parts", [(), (0,), (3, 5), (-1, 2**70)])
def test_hashing_many_values_equals_hashing_each(parts):
    assert mix_each(parts, LIMITS).tolist() == [mix(*parts, value) for value in LIMITS.tolist()]


def test_hashes_of_many_values_are_non_negative_and_differ():
    hashes = mix_each((0, 1), torch.arange(100_000))
    assert hashes.dtype == torch.int64
    assert int(hashes.min()) >= 0
    assert len(hashes.unique()) == 100_000


def test_every_bit_of_the_hash_is_set_half_of_the_time():
    hashes = mix_each((4,), torch.arange(100_000))
    shares = torch.stack([(hashes >> bit & 1).double().mean() for bit in range(63)])
    assert (shares - 0.5).abs().max() < 0.008  # five standard deviations


@pytest.mark.parametrize(
    "values", [torch.tensor(9), torch.arange(6).reshape(2, 3).t(), torch.empty(0, dtype=torch.long)]
)
def test_hashes_have_the_shape_of_the_values(values):
    hashes = mix_each((1,), values)
    assert hashes.shape == values.shape
    assert hashes.flatten().tolist() == [mix(1, value) for value in values.flatten().tolist()]


def test_hashing_many_values_leaves_them_as_they_were():
    values = torch.arange(10)
    mix_each((1,), values)
    assert torch.equal(values, torch.arange(10))


def test_smaller_integers_hash_like_large_ones():
    assert torch.equal(mix_each((1,), torch.arange(9, dtype=torch.int32)), mix_each((1,), torch.arange(9)))
