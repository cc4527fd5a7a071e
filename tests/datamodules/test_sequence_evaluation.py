"""What a sequence validates and tests on."""

import pytest
import torch
from plain_bases import LABELS, PIXELS, Coloured, FullData, PlainData, ready, samples_in
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl.datamodules import ClassIncremental, DomainIncremental, Joint


def _split(base=None, **arguments):
    return ClassIncremental(FullData() if base is None else base, num_tasks=5, **arguments)


# ------------------------------------------------------------------ a validation set out of the training data


def test_a_held_out_share_is_stratified_and_disjoint():
    sequence = ready(Joint(PlainData(shuffle=False), val_fraction=0.2))
    kept, held_out = samples_in(sequence.train_dataloader()), samples_in(sequence.val_dataloader())
    rows = {tuple(row) for row in kept[0].tolist()}, {tuple(row) for row in held_out[0].tolist()}
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == {tuple(row) for row in PIXELS[:600].tolist()}
    for label in range(10):
        assert (held_out[1] == label).sum() == round(0.2 * int((LABELS[:600] == label).sum()))


def test_every_task_validates_on_its_own_held_out_samples():
    sequence = ready(_split(PlainData(), val_fraction=0.1, eval_loaders="per_task", eval_tasks="all"))
    for task, loader in zip(sequence.tasks, sequence.val_dataloader(), strict=True):
        assert set(samples_in(loader)[1].tolist()) == set(task.classes)


def test_the_held_out_share_depends_on_the_seed_alone():
    def held_out(seed):
        return samples_in(ready(Joint(PlainData(), val_fraction=0.1, seed=seed)).val_dataloader())[0]

    assert torch.equal(held_out(1), held_out(1))
    assert not torch.equal(held_out(1), held_out(2))


def test_held_out_samples_pass_through_the_evaluation_transform():
    class Augmented(PlainData):
        def test_dataloader(self):
            return DataLoader(Coloured(300, 400, transform=lambda pixels: -pixels), batch_size=32)

    base = Augmented(Coloured(0, 300, transform=lambda pixels: pixels + 1000))
    sequence = ready(_split(base, val_fraction=0.1, eval_tasks="all"))
    assert samples_in(sequence.train_dataloader())[0].min() >= 1000
    assert samples_in(sequence.val_dataloader())[0].max() <= 0


def test_held_out_samples_pass_through_a_named_transform():
    base = PlainData(Coloured(0, 300, transform=lambda pixels: pixels + 1000))
    sequence = ready(_split(base, val_fraction=0.1, eval_transform=lambda pixels: -pixels))
    assert samples_in(sequence.val_dataloader())[0].max() <= 0


def test_a_base_with_validation_data_of_its_own_keeps_all_its_training_data():
    sequence = ready(Joint(FullData(), val_fraction=0.5))
    assert len(samples_in(sequence.train_dataloader())[1]) == 600
    assert torch.equal(samples_in(sequence.val_dataloader())[0], PIXELS[600:900])


def test_samples_without_labels_are_held_out_at_random():
    base = PlainData(TensorDataset(PIXELS[:100]))
    sequence = ready(DomainIncremental(base, transforms=[None], val_fraction=0.3))
    assert sum(len(batch[0]) for batch in sequence.val_dataloader()) == 30


# ------------------------------------------------------------------ which tasks are evaluated


def _classes_evaluated(sequence):
    loaders = sequence.val_dataloader()
    loaders = loaders if isinstance(loaders, list) else [loaders]
    return [sorted(set(samples_in(loader)[1].tolist())) for loader in loaders]


@pytest.mark.parametrize(
    ("eval_tasks", "joined", "per_task"),
    [
        ("seen", [[0, 1, 2, 3]], [[0, 1], [2, 3]]),
        ("current", [[2, 3]], [[2, 3]]),
        ("all", [list(range(10))], [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
    ],
)
def test_evaluation_serves_the_tasks_that_were_asked_for(eval_tasks, joined, per_task):
    for eval_loaders, expected in (("joined", joined), ("per_task", per_task)):
        sequence = ready(_split(eval_tasks=eval_tasks, eval_loaders=eval_loaders))
        sequence.enter_task(1)
        assert _classes_evaluated(sequence) == expected


def test_the_joined_loader_serves_one_task_after_another():
    sequence = ready(_split(eval_tasks="all"))
    tasks = samples_in(sequence.val_dataloader())[1] // 2
    assert torch.equal(tasks, tasks.sort().values)
    assert len(tasks) == 300


def test_before_any_training_every_task_was_seen():
    assert _classes_evaluated(ready(_split(), "validate")) == [list(range(10))]


def test_a_tasks_own_evaluation_loader_can_be_had():
    sequence = ready(_split())
    assert set(samples_in(sequence.evaluation_loader(3, "val"))[1].tolist()) == {6, 7}
    assert set(samples_in(sequence.evaluation_loader(0, "test"))[1].tolist()) == {0, 1}
    assert ready(_split(PlainData())).evaluation_loader(0, "val") is None
