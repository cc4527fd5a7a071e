"""Fixed samples of each task: which ones, and in which batches they stay on the device."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl.datamodules import ClassIncremental, TaskList
from lightning_cl.hashing import mix
from lightning_cl.tasks import probes as probes_module
from lightning_cl.tasks.evaluation import evaluating
from lightning_cl.tasks.probes import Probes, choose
from tests.modules import DictDigits, DictModule, DigitsData, Plain, digits, quiet_trainer

# ------------------------------------------------------------------ which


@pytest.mark.parametrize(("seed", "task"), [(0, 0), (0, 3), (7, 0), (123456789, 19)])
def test_those_with_the_smallest_keys_are_chosen_in_ascending_order(seed, task):
    keys = {position: mix(mix(seed, task), position) for position in range(50)}
    assert choose(12, 50, seed, task).tolist() == sorted(sorted(keys, key=keys.get)[:12])


def test_the_choice_is_a_function_of_its_arguments_alone():
    chosen = []
    for global_seed in (0, 1):
        seed_everything(global_seed, verbose=False)
        state = torch.get_rng_state()
        chosen.append(choose(10, 100, 3, 2))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*chosen)


@pytest.mark.parametrize(("count", "samples"), [(1, 1), (1, 50), (49, 50), (50, 50), (0, 5), (10, 0), (80, 50)])
def test_as_many_are_chosen_as_asked_for_and_there_are_and_none_twice(count, samples):
    chosen = choose(count, samples, 5, 1).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, samples)
    assert all(0 <= position < samples for position in chosen)


def test_a_larger_choice_holds_the_smaller_one():
    assert set(choose(5, 60, 4, 2).tolist()) < set(choose(20, 60, 4, 2).tolist())


@pytest.mark.parametrize("change", ["seed", "task"])
def test_every_sample_is_chosen_about_as_often(change):
    trials, counts = 2000, torch.zeros(40)
    for number in range(trials):
        counts[choose(10, 40, *((number, 0) if change == "seed" else (0, number)))] += 1
    # a binomial count has a standard deviation of 19 around 500
    assert (counts - trials * 10 / 40).abs().max() < 5 * 19.4


def test_tasks_and_seeds_choose_differently():
    chosen = {tuple(choose(10, 40, seed, task).tolist()) for seed in range(10) for task in range(10)}
    assert len(chosen) == 100


# ------------------------------------------------------------------ in which batches


class Looks(Callback):
    """Calls a function in the first step of a fit."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            self.function(trainer, pl_module, trainer.datamodule)


def _look(function, sequence=None, module=Plain):
    sequence = sequence or ClassIncremental(DigitsData(), num_tasks=3, seed=0)
    trainer = quiet_trainer(callbacks=[Looks(function)], max_epochs=1, limit_val_batches=0)
    trainer.fit(module(), datamodule=sequence)


def _chunks(wanted, sequence=None, module=Plain, split="val"):
    """Fetch some samples of some tasks, in this order, and return the batches that they are kept in."""
    found = []

    def fetch(trainer, pl_module, stream):
        probes = Probes()
        for task, indices in wanted:
            assert task not in probes
            probes.fetch(trainer, pl_module, stream, task, torch.tensor(indices), split)
            assert task in probes
        found.extend(probes.chunks)
        assert probes.chunks is probes.chunks

    _look(fetch, sequence, module)
    return found


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize(("split", "first", "each"), [("val", 24, 10), ("train", 0, 24)])
def test_samples_of_all_tasks_are_one_batch_in_the_order_of_tasks_and_samples(split, first, each, size):
    class Batches(DigitsData):
        def val_dataloader(self):
            return DataLoader(self.sets["val"], batch_size=size)

    images, labels = digits(first, each)
    (chunk,) = _chunks([(2, [0, 5, 7]), (0, [1, 2, 4, 19])], ClassIncremental(Batches(), num_tasks=3), split=split)
    numbers = [1, 2, 4, 19, 4 * each, 4 * each + 5, 4 * each + 7]
    assert torch.equal(chunk.batch[0], images[numbers])
    assert torch.equal(chunk.batch[1], labels[numbers])
    assert torch.equal(chunk.labels, labels[numbers])
    assert chunk.tasks.tolist() == [0] * 4 + [2] * 3


def test_batches_that_are_dicts_are_joined_too():
    (chunk,) = _chunks([(0, [0, 3]), (1, [2])], ClassIncremental(DictDigits(), num_tasks=3), DictModule)
    images, labels = digits(24, 10)
    assert set(chunk.batch) == {"image", "label"}
    assert torch.equal(chunk.batch["image"], images[[0, 3, 22]])
    assert torch.equal(chunk.labels, labels[[0, 3, 22]])


def test_samples_fetched_later_join_the_others():
    lengths = []

    def fetch(trainer, pl_module, stream):
        probes = Probes()
        for task in (1, 0, 2):
            probes.fetch(trainer, pl_module, stream, task, torch.arange(4), "val")
            (chunk,) = probes.chunks
            lengths.append(chunk.tasks.tolist())

    _look(fetch)
    assert lengths == [[1] * 4, [0] * 4 + [1] * 4, [0] * 4 + [1] * 4 + [2] * 4]


def test_nothing_fetched_is_no_batch():
    assert Probes().chunks == []
    assert 0 not in Probes()


@pytest.mark.parametrize("rows", [1, 8, 20, 1000])
def test_a_batch_is_as_large_as_memory_allows(rows, monkeypatch):
    monkeypatch.setattr(probes_module, "_CHUNK_BYTES", rows * (64 * 4 + 8))  # an image and its label
    everything = [(task, list(range(20))) for task in range(3)]
    chunks = _chunks(everything)
    sizes = [len(chunk.labels) for chunk in chunks]
    assert sum(sizes) == 60
    # fetched in batches of 16 and 4, which are kept whole
    assert all(size <= max(rows, 16) for size in sizes)
    assert len(sizes) == {1: 6, 8: 6, 20: 3, 1000: 1}[rows]
    assert torch.equal(torch.cat([chunk.batch[0] for chunk in chunks]), digits(24, 10)[0])


class Cropped(LightningDataModule):
    """The upper rows of the digits."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def loader(self, first, count):
        images, labels = digits(first, count)
        return DataLoader(TensorDataset(images[:, : self.width], labels), batch_size=16)

    def train_dataloader(self):
        return self.loader(0, 24)

    def val_dataloader(self):
        return self.loader(24, 10)


class AnyWidth(Plain):
    def forward(self, images):
        return super().forward(torch.nn.functional.pad(images, (0, 64 - images.shape[1])))


def test_tasks_of_different_shapes_stay_apart():
    chunks = _chunks([(0, [0, 1]), (1, [4, 5, 6])], TaskList([Cropped(64), Cropped(32)]), AnyWidth)
    assert [tuple(chunk.batch[0].shape) for chunk in chunks] == [(2, 64), (3, 32)]
    assert [chunk.tasks.tolist() for chunk in chunks] == [[0, 0], [1, 1, 1]]


def test_fetching_leaves_random_states_and_modes():
    def fetch(trainer, pl_module, stream):
        state = torch.get_rng_state()
        Probes().fetch(trainer, pl_module, stream, 0, torch.arange(5), "val")
        assert torch.equal(torch.get_rng_state(), state)
        assert pl_module.training
        assert trainer.training
        with evaluating(trainer, pl_module):
            Probes().fetch(trainer, pl_module, stream, 0, torch.arange(5), "val")
            assert not pl_module.training

    _look(fetch)


def test_a_collate_function_that_drops_rows_is_an_error_that_says_so():
    class Drops(DigitsData):
        def val_dataloader(self):
            def collate(samples):
                return torch.utils.data.default_collate(samples[:-1])

            return DataLoader(self.sets["val"], batch_size=16, collate_fn=collate)

    with pytest.raises(ValueError, match="5 samples of task 0 gave 4 rows"):
        _chunks([(0, [0, 1, 2, 3, 4])], ClassIncremental(Drops(), num_tasks=3))


def _scarce(limit):
    """A function that has memory for some rows only, and what it was asked for."""
    asked = []

    def call(batch):
        asked.append(len(batch[1]))
        if len(batch[1]) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return batch[1]

    return call, asked


@pytest.mark.parametrize("limit", [40, 13, 6, 1])
def test_batches_are_halved_until_the_device_has_room_and_stay_so(limit):
    def look(trainer, module, stream):
        probes = Probes()
        for task, count in ((0, 15), (1, 10)):
            probes.fetch(trainer, module, stream, task, choose(count, 20, 0, task), "val")
        whole = [torch.cat(column) for column in zip(*probes.call(lambda batch: batch[1]), strict=True)]
        call, asked = _scarce(limit)
        parts = [torch.cat(column) for column in zip(*probes.call(call), strict=True)]
        assert all(map(torch.equal, whole, parts))
        asked.clear()
        list(probes.call(call))
        assert max(asked) <= limit
        assert sum(asked) == 25

    _look(look)


def test_a_single_sample_that_has_no_room_is_an_error():
    def look(trainer, module, stream):
        probes = Probes()
        probes.fetch(trainer, module, stream, 0, choose(5, 20, 0, 0), "val")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            list(probes.call(_scarce(0)[0]))

    _look(look)
