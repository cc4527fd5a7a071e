"""Samples of any structure go into columns, and come out as they were."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch

from lightning_cl.memory.columns import stack_batches, stack_samples, take_batch, take_samples

Pair = namedtuple("Pair", ["image", "label"])


def _same(first, second):
    """Compare values, types and dtypes."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second


SAMPLES = {
    "tensor": [torch.arange(3) + i for i in range(4)],
    "uint8 tensor": [torch.full((2, 2), i, dtype=torch.uint8) for i in range(4)],
    "bfloat16 tensor": [torch.tensor([i / 3], dtype=torch.bfloat16) for i in range(4)],
    "scalar tensor": [torch.tensor(i) for i in range(4)],
    "tensors of several shapes": [torch.arange(i) for i in range(4)],
    "tensors of several dtypes": [torch.ones(2), torch.ones(2).int(), torch.ones(2), torch.ones(2).bool()],
    "array": [np.arange(3, dtype=np.float32) + i for i in range(4)],
    "arrays of several shapes": [np.arange(i, dtype=np.int16) for i in range(4)],
    "array of no dimension": [np.array(i) for i in range(4)],
    "numpy scalar": [np.float32(i) for i in range(4)],
    "numpy bool": [np.bool_(i % 2) for i in range(4)],
    "int": [0, 1 << 40, -5, 3],
    "float": [0.1, 1e300, -5.0, float("inf")],
    "bool": [True, False, False, True],
    "string": ["a", "", "äß", "d" * 99],
    "tuple": [(torch.ones(2) * i, i) for i in range(4)],
    "list": [[torch.ones(2) * i, f"{i}"] for i in range(4)],
    "dict": [{"image": np.ones(2) * i, "label": i, "name": f"{i}"} for i in range(4)],
    "nested": [{"a": ([i, (float(i), [torch.tensor(i)])],), "b": {"c": {"d": f"{i}"}}} for i in range(4)],
    "lists of several lengths": [list(range(i)) for i in range(4)],
    "values of several kinds": [1, 2.0, None, "3"],
    "sequences of two kinds": [("a",), ["a"], ("b",), ["b"]],
    "tensors and arrays": [torch.ones(1), np.ones(1).tolist(), None, torch.ones(3)],
    "dicts with other keys": [{"a": 1}, {"b": 1}, {}, {"a": torch.ones(1)}],
    "bytes": [{"jpeg": bytes([i])} for i in range(4)],
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_samples_come_out_as_they_went_in(samples):
    assert _same(take_samples(stack_samples(samples), [2, 0, 3, 1, 2]), [samples[i] for i in (2, 0, 3, 1, 2)])


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_columns_load_as_plain_data(samples, tmp_path):
    columns = stack_samples(samples)
    torch.save(columns, tmp_path / "columns.pt")
    loaded = torch.load(tmp_path / "columns.pt", weights_only=True, mmap=True)
    assert _same(take_samples(loaded, [1, 3]), [samples[1], samples[3]])


def test_columns_do_not_share_memory_with_the_samples():
    samples = [(torch.zeros(2), np.zeros(2), torch.zeros(i + 1)) for i in range(2)]
    columns = stack_samples(samples)
    for tensor, array, ragged in samples:
        tensor += 1
        array += 1
        ragged += 1
    assert all(float(part.sum()) == 0 for sample in take_samples(columns, [0, 1]) for part in sample)


def test_what_is_taken_can_be_changed_without_changing_the_columns():
    columns = stack_samples([(torch.zeros(2), np.zeros(2)) for _ in range(3)])
    for tensor, array in take_samples(columns, [0, 1]):
        tensor += 1
        array += 1
    assert all(float(part.sum()) == 0 for sample in take_samples(columns, [0, 1]) for part in sample)


def test_ragged_tensors_that_are_taken_can_be_changed_without_changing_the_columns():
    columns = stack_samples([torch.zeros(i + 1) for i in range(3)])
    for tensor in take_samples(columns, [0, 1]):
        tensor += 1
    assert all(float(tensor.sum()) == 0 for tensor in take_samples(columns, [0, 1]))


def test_tensors_leave_their_gradients_behind():
    (taken,) = take_samples(stack_samples([torch.ones(2, requires_grad=True) * 2]), [0])
    assert not taken.requires_grad


def test_the_order_of_keys_does_not_matter():
    columns = stack_samples([{"a": 1, "b": 2}, {"b": 4, "a": 3}])
    assert take_samples(columns, [1]) == [{"a": 3, "b": 4}]


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        ([object()], "a sample holds object"),
        ([(1, {2})], "a sample holds set"),
        ([1, object()], "a sample holds object"),
        ([Pair(1, 2)], "a sample holds Pair"),
        ([UserDict({"a": 1})], "a sample holds UserDict"),
    ],
    ids=["object", "set in a tuple", "object after a number", "named tuple", "UserDict"],
)
def test_what_cannot_be_copied_is_named(samples, named):
    with pytest.raises(TypeError, match=named):
        stack_samples(samples)


def test_arrays_that_are_no_numbers_are_named():
    with pytest.raises(TypeError, match="can be copied"):
        stack_samples([np.array(["a", "b"])])


BATCHES = {
    "tensor": [torch.arange(6).view(3, 2), torch.arange(6, 10).view(2, 2)],
    "tuple": [(torch.arange(3), torch.ones(3, 2)), (torch.arange(3, 5), torch.zeros(2, 2))],
    "list": [[torch.arange(3)], [torch.arange(3, 5)]],
    "dict": [{"a": torch.arange(3), "b": [torch.ones(3)]}, {"a": torch.arange(3, 5), "b": [torch.zeros(2)]}],
}


def _flat(batch):
    if isinstance(batch, dict):
        return [part for value in batch.values() for part in _flat(value)]
    return [batch] if isinstance(batch, torch.Tensor) else [part for value in batch for part in _flat(value)]


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_batches_come_out_as_one_batch(batches):
    rows = torch.tensor([4, 0, 2])
    taken = take_batch(stack_batches(batches), rows)
    assert type(taken) is type(batches[0])
    expected = [torch.cat(parts)[rows] for parts in zip(*map(_flat, batches), strict=True)]
    assert _same(_flat(taken), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_batches_that_cannot_be_copied_are_named(count):
    with pytest.raises(TypeError, match=r"Only tensors.*can be copied; a batch holds"):
        stack_batches([(torch.ones(3 - i), ["a"] * (3 - i)) for i in range(count)])
