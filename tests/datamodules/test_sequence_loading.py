"""The settings of the base's loaders are kept, and the order depends on the seed alone."""

import warnings

import pytest
import torch
from plain_bases import LABELS, FullData, PlainData, digits, ready, samples_in
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_cl.datamodules import ClassIncremental, Joint


def _split(base, **arguments):
    return ClassIncremental(base, num_tasks=5, **arguments)


def _start_worker(worker_id):
    torch.set_num_threads(1)


def _my_collate(samples):
    return default_collate(samples)


def test_settings_of_the_train_loader_are_kept():
    settings = {
        "num_workers": 2,
        "pin_memory": True,
        "persistent_workers": True,
        "worker_init_fn": _start_worker,
        "prefetch_factor": 3,
        "timeout": 60,
        "multiprocessing_context": "spawn",
        "collate_fn": _my_collate,
        "batch_size": 24,
    }
    loader = ready(_split(PlainData(**settings))).train_dataloader()
    for name in ("num_workers", "pin_memory", "persistent_workers", "worker_init_fn", "prefetch_factor", "timeout"):
        assert getattr(loader, name) == settings[name]
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.dataset.parts[0].collate_fn is _my_collate
    assert loader.sampler.batch_size == 24


def test_drop_last_is_kept():
    base = PlainData(digits(0, 100), drop_last=True, batch_size=32)
    assert [len(labels) for _, labels in ready(Joint(base)).train_dataloader()] == [32, 32, 32]
    base = PlainData(digits(0, 100), batch_size=32)
    assert [len(labels) for _, labels in ready(Joint(base)).train_dataloader()] == [32, 32, 32, 4]


def test_evaluation_loaders_have_the_settings_of_their_own():
    sequence = ready(Joint(FullData(num_workers=2)))
    assert [len(labels) for _, labels in sequence.val_dataloader()] == [50] * 6
    sequence.setup("test")
    assert [len(labels) for _, labels in sequence.test_dataloader()] == [70] * 4 + [20]
    assert sequence.val_dataloader().num_workers == 0


@pytest.mark.parametrize(
    ("base_shuffles", "shuffle", "shuffled"), [(True, None, 1), (False, None, 0), (True, False, 0)]
)
def test_samples_are_shuffled_as_the_base_does_it_unless_told_otherwise(base_shuffles, shuffle, shuffled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = ready(Joint(PlainData(shuffle=base_shuffles), shuffle=shuffle)).train_dataloader()
    labels = samples_in(loader)[1]
    assert torch.equal(labels, LABELS[:600]) is not bool(shuffled)
    assert torch.equal(labels.sort().values, LABELS[:600].sort().values)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": WeightedRandomSampler([1.0] * 600, 600)},
        {"sampler": SubsetRandomSampler(range(10))},
        {"sampler": RandomSampler(range(600), replacement=True)},
        {"sampler": RandomSampler(range(600), num_samples=50)},
    ],
    ids=["weighted", "subset", "with-replacement", "fewer-samples"],
)
def test_a_custom_sampler_is_replaced_with_a_warning(settings):
    sequence = ready(Joint(PlainData(shuffle=None, **settings)))
    with pytest.warns(UserWarning, match=r"Sampler of `PlainData.train_dataloader\(\)` is replaced.*`shuffle=False`"):
        loader = sequence.train_dataloader()
    assert len(samples_in(loader)[1]) == 600


def test_a_custom_batch_sampler_is_replaced_with_a_warning_and_its_batch_size_kept():
    class MyBatches(BatchSampler):
        pass

    class Batched(PlainData):
        def train_dataloader(self):
            return DataLoader(self.train, batch_sampler=MyBatches(SequentialSampler(self.train), 40, drop_last=True))

    with pytest.warns(UserWarning, match="The MyBatches of `Batched.train_dataloader"):
        loader = ready(Joint(Batched())).train_dataloader()
    assert loader.sampler.batch_size == 40
    assert loader.sampler.drop_last


def test_asking_for_the_order_makes_the_warning_superfluous():
    base = PlainData(shuffle=None, sampler=WeightedRandomSampler([1.0] * 600, 600))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = samples_in(ready(Joint(base, shuffle=False)).train_dataloader())[1]
    assert torch.equal(labels, LABELS[:600])


# ------------------------------------------------------------------ seeds


def _first_epoch(sequence):
    return samples_in(ready(sequence).train_dataloader())[1].tolist()


def test_the_order_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = _first_epoch(Joint(PlainData(), seed=4))
    torch.manual_seed(2)
    assert _first_epoch(Joint(PlainData(), seed=4)) == first
    assert _first_epoch(Joint(PlainData(), seed=5)) != first


def test_the_seed_is_that_of_seed_everything_by_default(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert _first_epoch(Joint(PlainData())) == _first_epoch(Joint(PlainData(), seed=4))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert _first_epoch(Joint(PlainData())) == _first_epoch(Joint(PlainData(), seed=0))


def test_a_resumed_run_takes_over_a_seed_that_was_not_named():
    saved, resumed = ready(_split(PlainData(), seed=9)), ready(_split(PlainData()))
    resumed.load_state_dict(saved.state_dict())
    assert samples_in(resumed.train_dataloader())[1].tolist() == samples_in(saved.train_dataloader())[1].tolist()
