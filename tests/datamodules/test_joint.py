import torch
from plain_bases import LABELS, PIXELS, Coloured, FullData, PlainData, ready, samples_in
from torch.utils.data import TensorDataset

from lightning_cl.datamodules import Joint


def test_all_classes_are_one_task():
    sequence = ready(Joint(PlainData()))
    assert [(task.index, task.name, task.classes) for task in sequence.tasks] == [(0, "all classes", tuple(range(10)))]
    assert (sequence.num_tasks, sequence.num_classes) == (1, 10)


def test_it_trains_and_evaluates_on_everything():
    sequence = ready(Joint(FullData()))
    assert samples_in(sequence.train_dataloader())[1].sort().values.tolist() == LABELS[:600].sort().values.tolist()
    assert torch.equal(samples_in(sequence.val_dataloader())[0], PIXELS[600:900])
    sequence.setup("test")
    assert torch.equal(samples_in(sequence.test_dataloader())[0], PIXELS[900:1200])


def test_data_without_classes_are_one_task_too():
    sequence = ready(Joint(PlainData(TensorDataset(PIXELS[:20], torch.rand(20)))))
    assert sequence.tasks[0].classes is None
    assert sequence.num_classes is None


def test_validation_data_are_carved_out_of_the_training_data():
    sequence = ready(Joint(PlainData(Coloured(0, 200)), val_fraction=0.25))
    kept, held_out = samples_in(sequence.train_dataloader())[1], samples_in(sequence.val_dataloader())[1]
    assert len(kept) + len(held_out) == 200
    assert set(held_out.tolist()) == set(range(10))
