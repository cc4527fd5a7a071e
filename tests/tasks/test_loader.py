import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset, random_split

from lightning_cl.datamodules import Digits
from lightning_cl.datamodules.array_dataset import ArrayDataset, collate
from lightning_cl.tasks import BatchStructure, Cursor, TaskDataset, TaskLoader, TaskSampler
from lightning_cl.tasks.loader import InputTransform, flatten_subsets
from lightning_cl.tasks.random_state import forked_cpu_generators, seed_generators


class Noisy(Dataset):
    """Samples with noise from all three generators, as augmentations draw it."""

    def __init__(self, length=24):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        noise = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([index, *noise], dtype=torch.float64), index % 3


class Batched(Dataset):
    """Fetches many samples at once, and remembers how it was asked."""

    def __init__(self, length=10):
        self.length = length
        self.asked = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise AssertionError("asked for a single sample")

    def __getitems__(self, indices):
        self.asked.append(indices)
        return [(torch.tensor([float(i)]), i) for i in indices]


class ClosedInWorkers(Dataset):
    """Fails where it is touched, so that a test sees whether anything was fetched."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise RuntimeError("fetched")


def _loader(dataset, batch_size=4, rank=0, num_replicas=1, cursor=None, shuffle=True, on_draw=None, **settings):
    parts = [part if isinstance(part, TaskDataset) else TaskDataset(part) for part in _as_list(dataset)]
    sampler = TaskSampler(
        parts,
        batch_size,
        num_replicas,
        rank,
        shuffle=shuffle,
        seed=1,
        cursor=None if cursor is None else lambda: cursor,
    )
    return TaskLoader(parts, sampler, on_draw, **settings)


def _as_list(value):
    return value if isinstance(value, list) else [value]


def _rows(loaders):
    """All samples of one epoch, by their index."""
    return {int(row[0]): row.tolist() for loader in _as_list(loaders) for inputs, _ in loader for row in inputs}


@pytest.fixture(scope="module")
def expected_rows():
    return _rows(_loader(Noisy()))


@pytest.fixture(scope="module")
def digits():
    module = Digits()
    module.setup("fit")
    return flatten_subsets(module.train_dataloader().dataset)[0]


# ------------------------------------------------------------------ when it starts


def test_making_an_iterator_costs_nothing_and_fixes_nothing():
    position = Cursor()
    sampler = TaskSampler([range(12)], 4, shuffle=False, cursor=lambda: position)
    loader = TaskLoader([TaskDataset(TensorDataset(torch.arange(12)))], sampler)
    early, twin = iter(loader), iter(loader)
    position = Cursor(step=2)
    assert [batch[0].tolist() for batch in early] == [[8, 9, 10, 11]]
    position = Cursor(step=1)
    assert next(twin)[0].tolist() == [4, 5, 6, 7]


def test_workers_start_with_the_first_batch_only():
    loader = _loader(Noisy(), num_workers=1, persistent_workers=True)
    batches = iter(loader)
    assert loader._iterator is None
    next(batches)
    assert loader._iterator is not None


def test_nothing_is_fetched_before_the_first_batch_is_asked_for():
    batches = iter(_loader(ClosedInWorkers()))
    with pytest.raises(RuntimeError, match="fetched"):
        next(batches)


def test_the_position_of_a_resumed_run_reaches_the_workers():
    whole = [inputs.tolist() for inputs, _ in _loader(Noisy(), cursor=Cursor(epoch=1))]
    rest = [inputs.tolist() for inputs, _ in _loader(Noisy(), cursor=Cursor(epoch=1, step=4), num_workers=2)]
    assert rest == whole[4:]


# ------------------------------------------------------------------ random transforms


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 0), (24, 0), (5, 1), (5, 2)])
def test_a_sample_looks_the_same_in_any_worker_and_any_batch(batch_size, workers, expected_rows):
    assert _rows(_loader(Noisy(), batch_size, num_workers=workers)) == expected_rows


@pytest.mark.parametrize("draw", [np.random.rand, random.random, np.random.randn, lambda: random.gauss(0, 1)])
def test_a_sample_looks_the_same_where_only_some_draw_from_python_or_numpy(draw):
    class SometimesNoisy(Noisy):
        def __getitem__(self, index):
            return torch.tensor([index, torch.rand(()).item(), draw() if index in (7, 13) else 0.0]), index % 3

    expected = _rows(_loader(SometimesNoisy(), 1))
    assert expected[7][2] != expected[13][2]
    for batch_size in (5, 24):
        assert _rows(_loader(SometimesNoisy(), batch_size)) == expected


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_a_sample_looks_the_same_on_any_rank(num_replicas, expected_rows):
    ranks = [_loader(Noisy(), 2, rank, num_replicas) for rank in range(num_replicas)]
    assert _rows(ranks) == expected_rows


def test_samples_look_different_from_one_another_and_in_another_epoch(expected_rows):
    noise = [tuple(row[1:]) for row in expected_rows.values()]
    later = [tuple(row[1:]) for row in _rows(_loader(Noisy(), cursor=Cursor(epoch=1))).values()]
    assert len({*noise, *later}) == 2 * len(noise)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_neither_read_nor_written(workers, expected_rows):
    with forked_cpu_generators():
        seed_generators(7)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        rows = _rows(_loader(Noisy(), num_workers=workers))
        assert rows == expected_rows
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]
        assert random.getstate() == before[2]


def test_a_foreign_random_transform_is_seeded_for_each_sample():
    def jitter(inputs):
        return inputs + torch.rand(())

    def rows(batch_size):
        transform = InputTransform(jitter, BatchStructure())
        data = TaskDataset(ArrayDataset(torch.zeros(6, 1), torch.arange(6)), collate_fn=collate, transform=transform)
        return {int(y): x.item() for xs, ys in _loader(data, batch_size) for x, y in zip(xs, ys, strict=True)}

    assert rows(2) == rows(3)
    assert len(set(rows(2).values())) == 6


# ------------------------------------------------------------------ how data sets are asked


def test_a_data_set_that_fetches_many_samples_is_asked_once_a_batch():
    dataset = Batched()
    batches = [(inputs.flatten().tolist(), labels.tolist()) for inputs, labels in _loader(dataset, shuffle=False)]
    assert dataset.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches == [(indices, indices) for indices in dataset.asked]


def test_it_is_asked_once_a_batch_through_subsets_too():
    dataset = Batched()
    list(_loader(Subset(Subset(dataset, [9, 8, 7, 6]), [3, 1]), shuffle=False))
    assert dataset.asked == [[6, 8]]


def test_array_data_give_a_collated_batch(digits):
    inputs, labels = next(iter(_loader(TaskDataset(digits, collate_fn=collate), 16, shuffle=False)))
    assert inputs.shape == (16, 1, 8, 8)
    assert inputs.dtype == torch.uint8
    assert torch.equal(labels, digits.targets[:16])


def test_an_attribute_of_the_users_named_deterministic_does_not_confuse_the_loader():
    dataset = Noisy()
    dataset.deterministic = True
    assert len(_rows(_loader(dataset))) == 24


def test_tensors_are_fetched_as_the_default_path_would(digits):
    tensors = TensorDataset(digits.arrays[0], digits.targets)

    class Slow(TensorDataset):
        pass

    for fast, slow in zip(_loader(tensors, 100), _loader(Slow(*tensors.tensors), 100), strict=True):
        assert type(fast) is type(slow)
        assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: Subset(data, range(3, 9)),
        lambda data: Subset(Subset(data, np.arange(2, 10)), [1, 2, 3, 4, 5, 6]),
        lambda data: ConcatDataset([Subset(data, [3, 4]), Subset(data, torch.arange(5, 9))]),
        lambda data: Subset(ConcatDataset([data, data]), [15, 16, 5, 18, 19, 20]),
    ],
    ids=["subset", "nested", "concat", "subset-of-concat"],
)
def test_nested_data_sets_give_their_own_samples(wrap, workers):
    data = TensorDataset(torch.arange(12.0), torch.arange(12))
    labels = [y for _, labels in _loader(wrap(data), num_workers=workers) for y in labels.tolist()]
    assert sorted(labels) == [3, 4, 5, 6, 7, 8]


def test_a_subset_of_the_users_own_making_is_asked_for_its_own_samples():
    class Negated(Subset):
        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return -inputs, label

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    inputs, _ = next(
        iter(_loader(Negated(TensorDataset(torch.arange(1.0, 9.0), torch.arange(8)), range(4, 8)), shuffle=False))
    )
    assert inputs.tolist() == [-5.0, -6.0, -7.0, -8.0]


def test_random_samples_in_a_stack_look_the_same_in_any_batch():
    def rows(batch_size):
        data = StackDataset(Noisy(), TensorDataset(torch.arange(24)))
        return {int(row[0]): row.tolist() for (inputs, _), _ in _loader(data, batch_size) for row in inputs}

    assert rows(4) == rows(7)


def test_both_halves_of_a_random_split_give_all_samples():
    halves = random_split(Noisy(), [0.5, 0.5], generator=torch.Generator().manual_seed(0))
    rows = [set(_rows(_loader(half))) for half in halves]
    assert rows[0] | rows[1] == set(range(24))
    assert not rows[0] & rows[1]


def test_positions_of_a_task_are_positions_in_the_subset():
    subset = Subset(TensorDataset(torch.arange(12)), [11, 10, 9, 8])
    data = TaskDataset(subset, torch.tensor([0, 3]))
    assert next(iter(_loader(data, shuffle=False)))[0].tolist() == [11, 8]


def test_an_empty_subset_has_no_positions():
    dataset, positions = flatten_subsets(Subset(Subset(Noisy(), []), []))
    assert isinstance(dataset, Noisy)
    assert positions.tolist() == []
    assert positions.dtype == torch.long


# ------------------------------------------------------------------ batches of any form


def test_a_foreign_collate_function_makes_the_batches():
    def collate_to_lists(samples):
        return {"inputs": [x.tolist() for x, _ in samples], "y": [y for _, y in samples]}

    batch = next(iter(_loader(TaskDataset(Batched(), collate_fn=collate_to_lists), shuffle=False)))
    assert batch == {"inputs": [[0.0], [1.0], [2.0], [3.0]], "y": [0, 1, 2, 3]}


def test_a_foreign_collate_function_gets_the_samples_of_a_tensor_data_set():
    data = TaskDataset(TensorDataset(torch.arange(8), torch.arange(8)), collate_fn=len)
    assert list(_loader(data)) == [4, 4]


def test_a_random_collate_function_is_seeded_and_leaves_the_global_generators_alone():
    def mixing(samples):
        return torch.rand(()).item()

    torch_state = torch.get_rng_state()
    data = TaskDataset(Noisy(), collate_fn=mixing)
    assert list(_loader(data)) == list(_loader(data))
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("workers", [0, 2])
def test_dict_samples_become_dict_batches(workers):
    class Dicts(Noisy):
        def __getitem__(self, index):
            return {"image": torch.full((2,), float(index)), "label": index, "name": f"sample {index}"}

    batch = next(iter(_loader(Dicts(), shuffle=False, num_workers=workers)))
    assert batch["image"].shape == (4, 2)
    assert batch["label"].tolist() == [0, 1, 2, 3]
    assert batch["name"] == ["sample 0", "sample 1", "sample 2", "sample 3"]


def test_a_transform_reaches_the_inputs_of_dict_samples_only():
    samples = [{"image": torch.ones(2), "label": 1}, {"image": torch.ones(2), "label": 1}]
    transform = InputTransform(lambda x: x * 5, BatchStructure())
    batch = next(iter(_loader(TaskDataset(samples, transform=transform), shuffle=False)))
    assert batch["image"].tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert batch["label"].tolist() == [1, 1]


def test_a_batched_transform_is_called_once_for_array_data(digits):
    class Negative:
        batched = True
        calls = 0

        def __call__(self, images):
            self.calls += 1
            return 255 - images

    negative = Negative()
    data = TaskDataset(digits, collate_fn=collate, transform=InputTransform(negative, BatchStructure()))
    images, labels = next(iter(_loader(data, 32, shuffle=False)))
    assert negative.calls == 1
    assert torch.equal(images, 255 - digits.__getitems__(range(32))[0])
    assert torch.equal(labels, digits.targets[:32])


# ------------------------------------------------------------------ the loader itself


@pytest.mark.parametrize("workers", [0, 2])
def test_it_says_before_each_batch_which_draw_the_batch_answers(workers):
    seen = []
    parts = [TaskDataset(TensorDataset(torch.arange(6))), TaskDataset(TensorDataset(torch.arange(3)))]
    loader = _loader(parts, on_draw=seen.append, num_workers=workers)
    for number, (batch,) in enumerate(loader, start=1):
        assert len(seen) == number
        assert seen[-1].ids == batch.tolist()
    assert [draw.part for draw in seen] == [0, 0, 1]


def test_persistent_workers_serve_every_epoch_in_its_own_order():
    position = Cursor()
    data = TaskDataset(TensorDataset(torch.arange(12)))
    sampler = TaskSampler([data], 4, cursor=lambda: position)
    loader = TaskLoader([data], sampler, num_workers=1, persistent_workers=True)
    orders, workers = [], set()
    for epoch in range(3):
        position = Cursor(epoch=epoch)
        orders.append([i for (batch,) in loader for i in batch.tolist()])
        workers.add(id(loader._iterator))
    expected = [
        [i for draw in TaskSampler([data], 4, cursor=lambda: Cursor(epoch=e)) for i in draw.ids]  # noqa: B023
        for e in range(3)
    ]
    assert orders == expected
    assert len(workers) == 1


def test_an_epoch_that_was_left_early_does_not_leak_into_the_next():
    loader = _loader(TensorDataset(torch.arange(12)), shuffle=False, num_workers=1, persistent_workers=True)
    next(iter(loader))
    assert [batch.tolist() for (batch,) in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_length_is_known():
    assert len(_loader(Noisy(), 5)) == 5


def test_it_says_that_it_can_be_resumed():
    loader = _loader(Noisy())
    loader.load_state_dict(loader.state_dict())
    assert loader.state_dict() == {}
