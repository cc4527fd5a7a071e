"""Past samples come out of the user's own data, whatever it is."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from numbered_streams import (
    IMAGES,
    LABELS,
    AnyBatch,
    DataOf,
    Noisy,
    Numbered,
    Watch,
    fit_stream,
    numbers_of,
    same,
)
from torch.utils.data import StackDataset, Subset, TensorDataset, default_collate, random_split

from lightning_cl.callbacks import DarkExperienceReplay, Replay
from lightning_cl.datamodules import DomainIncremental, TaskList
from lightning_cl.datamodules.array_dataset import ArrayDataset, collate
from lightning_cl.tasks.evaluation import evaluating, sample_batches


def _watched(data=None, module=None, replay=None, **settings):
    watch, replay = Watch(), replay or Replay(20)
    fit_stream([watch, replay], module, data, **settings)
    return watch, replay


def _tasks_of(labels):
    return labels // 2


def _nested(image, label, number):
    return {"image": image, "label": label, "more": {"pair": (image * 2, [number]), "name": f"digit {number}"}}


@pytest.mark.parametrize(
    ("form", "find"),
    [
        (lambda image, label, number: (image, label, number), lambda batch: (batch[1], batch[2])),
        (
            lambda image, label, number: {"image": image, "label": label, "number": number},
            lambda batch: (batch["label"], batch["number"]),
        ),
        (_nested, lambda batch: (batch["label"], batch["more"]["pair"][1][0])),
    ],
    ids=["tuple", "dict", "nested"],
)
def test_rows_stay_together_in_batches_of_any_structure(form, find):
    watch, _ = _watched(DataOf(Numbered(form)))
    for task, batch, rows in watch.steps:
        labels, numbers = find(batch)
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        assert torch.equal(images, IMAGES[numbers])
        assert torch.equal(labels, LABELS[numbers])
        assert torch.equal(_tasks_of(labels) < task, rows)
        if "more" in batch:
            assert torch.equal(batch["more"]["pair"][0], 2 * IMAGES[numbers])
            assert batch["more"]["name"] == [f"digit {number}" for number in numbers]


class AsksForMany(Numbered):
    """Fetches a list of samples at once."""

    def __getitem__(self, number):
        raise AssertionError("asked for a single sample")

    def __getitems__(self, numbers):
        return [self.form(IMAGES[number], LABELS[number], number) for number in numbers]


def _array_dataset():
    return ArrayDataset(IMAGES.mul(16).to(torch.uint8), LABELS)


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        (Numbered, {}),
        (AsksForMany, {}),
        (lambda: TensorDataset(IMAGES, LABELS), {}),
        (lambda: StackDataset(IMAGES, LABELS), {}),
        (lambda: Subset(Subset(TensorDataset(IMAGES, LABELS), range(144)), list(range(143, -1, -1))), {}),
        (lambda: random_split(Numbered(), [140, 4], torch.Generator().manual_seed(0))[0], {}),
        (_array_dataset, {"collate_fn": collate}),
        (Numbered, {"num_workers": 1}),
        (_array_dataset, {"collate_fn": collate, "num_workers": 1, "persistent_workers": True}),
    ],
    ids=["single", "many", "tensors", "stack", "subsets", "split", "array", "worker", "array-worker"],
)
def test_past_samples_come_out_of_any_data_set(dataset, settings):
    target = {"target_key": 1} if dataset.__name__ == "<lambda>" else {}
    watch, _ = _watched(DataOf(dataset(), **settings), stream=target)
    for task, (images, labels, *_), rows in watch.steps:
        numbers = numbers_of(images if images.dtype.is_floating_point else images / 16)
        assert torch.equal(labels, LABELS[numbers])
        assert torch.equal(_tasks_of(labels) < task, rows)
        assert rows.sum() == (0 if task == 0 else (~rows).sum())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    alone, _ = _watched(DataOf(Noisy()))
    shared, _ = _watched(DataOf(Noisy(), num_workers=workers))
    assert same([batch for _, batch, _ in alone.steps], [batch for _, batch, _ in shared.steps])


def test_one_call_of_the_collate_function_makes_the_whole_batch():
    def count(samples):
        lengths.append(len(samples))
        return default_collate(samples)

    lengths = []
    _watched(DataOf(collate_fn=count))
    assert lengths == [16] * 3 + [32] * 6


def test_arrays_are_asked_once_for_a_whole_batch():
    class Counts(ArrayDataset):
        def __getitems__(self, indices):
            lengths.append(len(indices))
            return super().__getitems__(indices)

    lengths = []
    _watched(DataOf(Counts(IMAGES, LABELS), collate_fn=collate))
    assert lengths == [16] * 3 + [32] * 6


def test_loader_settings_stay_those_of_the_base():
    class Loaders(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append((trainer.train_dataloader.num_workers, trainer.train_dataloader.prefetch_factor))

    seen = []
    fit_stream([Replay(20), Loaders()], data=DataOf(num_workers=1, prefetch_factor=5))
    assert seen == [(1, 5)] * 3


def _times(factor):
    def multiply(images):
        return images * factor

    return multiply


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [(Numbered, {}), (lambda: ArrayDataset(IMAGES, LABELS), {"collate_fn": collate})],
    ids=["samples", "arrays"],
)
def test_past_samples_keep_the_transform_of_their_own_task(dataset, settings):
    watch, replay = Watch(), Replay(60)
    transforms = [None, _times(-1.0), _times(3.0)]
    sequence = DomainIncremental(DataOf(dataset(), **settings), transforms)
    fit_stream([watch, replay], sequence=sequence)
    found = set()
    for task, (images, labels, *_), rows in watch.steps:
        assert torch.equal(_factors(images[~rows]), torch.tensor([1.0, -1.0, 3.0])[task].expand(len(images[~rows])))
        factors = _factors(images)
        assert torch.equal(LABELS[numbers_of(images / factors[:, None])], labels)
        found |= {(task, factor) for factor in factors[rows].tolist()}
    assert found == {(1, 1.0), (2, 1.0), (2, -1.0)}


def _factors(images):
    return images.max(1).values.round() + images.min(1).values.round()


def _reversed(samples):
    """A collate function of another DataModule's: images upside down, in a dict as batches have it elsewhere."""
    images, labels, numbers = default_collate(samples)
    return [images.flip(1), labels, numbers]


def test_data_sets_of_different_kinds_share_a_batch():
    watch = Watch()
    numbered = TensorDataset(IMAGES, LABELS, torch.arange(144))
    sequence = TaskList([DataOf(), DataOf(numbered), DataOf(AsksForMany())])
    fit_stream([watch, Replay(60, "random")], sequence=sequence)
    for _, (images, labels, numbers), _ in watch.steps:
        assert torch.equal(images, IMAGES[numbers])
        assert torch.equal(labels, LABELS[numbers])
    assert sum(int(rows.sum()) for _, _, rows in watch.steps) == 16 * 18


def test_past_samples_pass_through_the_collate_function_of_their_own_task():
    watch = Watch()
    sequence = TaskList([DataOf(), DataOf(collate_fn=_reversed)])
    fit_stream([watch, Replay(60)], sequence=sequence)
    for (images, _, numbers), rows in watch.of_task(1):
        assert torch.equal(images[~rows], IMAGES[numbers[~rows]].flip(1))
        assert torch.equal(images[rows], IMAGES[numbers[rows]])


class DrawsALot(AnyBatch):
    def training_step(self, batch, batch_idx):
        torch.rand(7), np.random.rand(7), random.random()
        return super().training_step(batch, batch_idx)


def test_random_transforms_of_a_past_sample_differ_from_step_to_step():
    watch, _ = _watched(DataOf(Noisy()), replay=Replay(8), stream={"epochs_per_task": 2})
    looks = {}
    for task in (1, 2):
        for (images, _, numbers), rows in watch.of_task(task):
            for image, number in zip(images[rows], numbers[rows].tolist(), strict=True):
                looks.setdefault(number, []).append(float(image.sum()))
    assert max(map(len, looks.values())) > 6
    assert all(len(set(sums)) == len(sums) for sums in looks.values())


def test_random_transforms_do_not_depend_on_what_else_was_drawn():
    first, _ = _watched(DataOf(Noisy()))
    second, _ = _watched(DataOf(Noisy()), DrawsALot)
    assert same([batch for _, batch, _ in first.steps], [batch for _, batch, _ in second.steps])


class Scaled(DataOf):
    """Scales its own rows when they reach the device."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels, numbers = batch
        return images * self.factor, labels, numbers


@pytest.mark.parametrize("arguments", [{}, {"mix": "joint"}], ids=str)
def test_past_samples_pass_through_the_transfer_hooks_of_their_own_data_module(arguments):
    watch = Watch()
    fit_stream([Replay(60, **arguments), watch], sequence=TaskList([Scaled(2.0), Scaled(3.0)]))
    for (images, _, numbers), rows in watch.of_task(1):
        factors = torch.where(rows, 2.0, 3.0)[:, None]
        assert torch.equal(images, IMAGES[numbers] * factors)
    assert sum(int(rows.sum()) for _, rows in watch.of_task(1)) > 50


class LooksAgain(Callback):
    """Keeps the first samples of each task as an evaluation sees them at the end of the run."""

    def on_train_end(self, trainer, pl_module):
        with evaluating(trainer, pl_module):
            self.seen = [
                next(sample_batches(trainer, pl_module, trainer.datamodule, task, torch.arange(8)))[1]
                for task in range(2)
            ]


def test_samples_looked_at_again_pass_through_the_transfer_hooks_of_their_own_data_module():
    looks = LooksAgain()
    fit_stream([looks], sequence=TaskList([Scaled(2.0), Scaled(3.0)]))
    for (images, _, numbers), factor in zip(looks.seen, (2.0, 3.0), strict=True):
        assert torch.equal(images, IMAGES[numbers] * factor)


def _leave_out_the_first(samples):
    return default_collate(samples[1:])


def test_rows_that_a_collate_function_drops_are_said_once():
    rows = RowsInStep()
    with pytest.warns(UserWarning, match=r"has 15 rows where 16 samples were drawn.*collate function") as warned:
        fit_stream([Replay(60), rows], data=DataOf(collate_fn=_leave_out_the_first))
    assert sum("samples were drawn" in str(warning.message) for warning in warned) == 1
    assert rows.seen == {None}


def test_a_batch_whose_rows_are_unknown_passes_through_the_transfer_hooks_of_the_current_data_module():
    class LeavesOut(Scaled):
        def __init__(self, factor):
            super().__init__(factor)
            self.settings["collate_fn"] = _leave_out_the_first

    watch = Watch()
    fit_stream([Replay(60), watch], sequence=TaskList([LeavesOut(2.0), LeavesOut(3.0)]))
    for (images, _, numbers), _ in watch.of_task(1):
        assert torch.equal(images, IMAGES[numbers] * 3.0)


@pytest.mark.parametrize("replay", [lambda: Replay(60, weight=0.5), lambda: DarkExperienceReplay(60)])
def test_rows_that_a_collate_function_drops_are_an_error_where_each_row_counts(replay):
    with pytest.raises(ValueError, match=r"A batch has 15 rows where 16 samples were drawn.*collate function"):
        fit_stream([replay()], data=DataOf(collate_fn=_leave_out_the_first))


class RowsInStep(Callback):
    """Notes which rows are known as replayed once a step is over."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, *args):
        self.seen.add(trainer.datamodule.replay_rows)
