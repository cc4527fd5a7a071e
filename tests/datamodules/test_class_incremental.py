import pytest
import torch
from plain_bases import LABELS, PIXELS, Coloured, FullData, PlainData, digits, ready, samples_in, training_labels
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, random_split

from lightning_cl.datamodules import ClassIncremental, Digits


def _sizes(**arguments):
    return [len(task.classes) for task in ready(ClassIncremental(PlainData(), **arguments)).tasks]


class Unlabelled(Dataset):
    """Samples whose labels are found nowhere but in them."""

    def __init__(self, sample=lambda index: (PIXELS[index], int(LABELS[index])), length=100):
        self.sample, self.length, self.reads = sample, length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads += 1
        return self.sample(index)


# ------------------------------------------------------------------ which classes


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"num_tasks": 5}, [2] * 5),
        ({"num_tasks": 1}, [10]),
        ({"num_tasks": 10}, [1] * 10),
        ({"classes_per_task": 5}, [5, 5]),
        ({"classes_per_task": [4, 3, 3]}, [4, 3, 3]),
        ({"classes_per_task": [1, 2]}, [1, 2]),
        ({"num_tasks": 6, "first_task_classes": 5}, [5, 1, 1, 1, 1, 1]),
        ({"num_tasks": 3, "first_task_classes": 4}, [4, 3, 3]),
        ({"classes_per_task": 2, "first_task_classes": 6}, [6, 2, 2]),
        ({"num_tasks": 1, "first_task_classes": 10}, [10]),
    ],
    ids=str,
)
def test_classes_are_dealt_out_as_the_arguments_say(arguments, sizes):
    assert _sizes(**arguments) == sizes


def test_classes_arrive_in_ascending_order_by_default():
    assert [task.classes for task in ready(ClassIncremental(PlainData(), num_tasks=2)).tasks] == [
        (0, 1, 2, 3, 4),
        (5, 6, 7, 8, 9),
    ]


def test_classes_arrive_in_the_order_of_a_list():
    order = [9, 0, 8, 1, 7, 2, 6, 3, 5, 4]
    tasks = ready(ClassIncremental(PlainData(), num_tasks=5, class_order=order)).tasks
    assert [task.classes for task in tasks] == [(9, 0), (8, 1), (7, 2), (6, 3), (5, 4)]


def test_a_seed_shuffles_the_classes_and_always_alike():
    def order(seed):
        tasks = ready(ClassIncremental(PlainData(), num_tasks=5, class_order=seed)).tasks
        return [label for task in tasks for label in task.classes]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == list(range(10))


def test_the_class_order_does_not_depend_on_the_seed_of_the_samples():
    first, second = (
        ready(ClassIncremental(PlainData(), num_tasks=5, class_order=3, seed=seed)).tasks for seed in (0, 1)
    )
    assert first == second


def test_tasks_have_a_position_a_name_and_their_classes():
    tasks = ready(ClassIncremental(PlainData(), classes_per_task=[1, 2, 4, 3], class_order=None)).tasks
    assert [(task.index, task.name, task.classes) for task in tasks] == [
        (0, "classes 0", (0,)),
        (1, "classes 1, 2", (1, 2)),
        (2, "classes 3-6", (3, 4, 5, 6)),
        (3, "classes 7, 8, 9", (7, 8, 9)),
    ]


def test_a_list_may_leave_classes_for_later():
    sequence = ready(ClassIncremental(FullData(), classes_per_task=[2, 2]))
    assert [task.classes for task in sequence.tasks] == [(0, 1), (2, 3)]
    assert set(samples_in(sequence.val_dataloader())[1].tolist()) == {0, 1, 2, 3}


# ------------------------------------------------------------------ which samples


def test_each_task_has_all_the_samples_of_its_classes_and_no_others():
    sequence = ready(ClassIncremental(PlainData(), num_tasks=5, class_order=7))
    for task in sequence.tasks:
        labels = training_labels(sequence, task.index)
        assert set(labels.tolist()) == set(task.classes)
        assert len(labels) == torch.isin(LABELS[:600], torch.tensor(task.classes)).sum()


def test_labels_are_never_renumbered():
    sequence = ready(ClassIncremental(PlainData(Coloured()), num_tasks=2))
    sequence.enter_task(1)
    pixels, labels = samples_in(sequence.train_dataloader())
    assert set(labels.tolist()) == {5, 6, 7, 8, 9}
    for image, label in zip(pixels[:20], labels[:20], strict=True):
        original = (PIXELS[:300] == image).all(dim=1).nonzero()[0]
        assert label == LABELS[original]


def test_labels_need_neither_begin_at_zero_nor_be_consecutive():
    data = digits()
    data.tensors = (data.tensors[0], data.tensors[1] * 10 - 20)
    tasks = ready(ClassIncremental(PlainData(data), num_tasks=5)).tasks
    assert tasks[0].classes == (-20, -10)
    assert tasks[4].classes == (60, 70)


@pytest.mark.parametrize(
    "train",
    [
        Subset(digits(), range(50, 350)),
        ConcatDataset([digits(50, 100), Subset(digits(), range(100, 350))]),
        random_split(digits(50, 350), [300, 0])[0],
        Coloured(50, 350),
        Subset(ConcatDataset([Coloured(0, 200), Coloured(200, 400)]), range(50, 350)),
    ],
    ids=["subset", "concat", "random_split", "targets", "nested"],
)
def test_labels_are_found_through_every_kind_of_data_set(train):
    sequence = ready(ClassIncremental(PlainData(train), num_tasks=5))
    for task in sequence.tasks:
        expected = LABELS[50:350][torch.isin(LABELS[50:350], torch.tensor(task.classes))]
        assert training_labels(sequence, task.index).sort().values.tolist() == expected.sort().values.tolist()


@pytest.mark.parametrize(
    ("sample", "target_key"),
    [
        (lambda index: (PIXELS[index], int(LABELS[index])), None),
        (lambda index: {"pixels": PIXELS[index], "label": LABELS[index]}, None),
        (lambda index: {"pixels": PIXELS[index], "truth": {"digit": LABELS[index]}}, "truth.digit"),
        (lambda index: (int(LABELS[index]), 0, PIXELS[index]), 0),
    ],
    ids=["tuple", "dict", "dotted-key", "position"],
)
def test_labels_are_read_from_the_samples_where_nothing_else_tells_them(sample, target_key):
    sequence = ready(ClassIncremental(PlainData(Unlabelled(sample)), num_tasks=5, target_key=target_key))
    assert sequence.tasks[4].classes == (8, 9)
    sequence.enter_task(4)
    batch = next(iter(sequence.train_dataloader()))
    assert set(sequence.structure.find_targets(batch).tolist()) <= {8, 9}


def test_samples_are_read_for_their_labels_once():
    data = Unlabelled()
    sequence = ClassIncremental(PlainData(data), num_tasks=5, val_fraction=0.2)
    assert sequence.num_tasks == 5
    for stage in ("fit", "validate", "test"):
        ready(sequence, stage)
        sequence.val_dataloader()
        sequence.teardown(stage)
    assert data.reads == 100


def test_labels_that_change_between_two_runs_are_read_anew():
    base = PlainData(digits())
    sequence = ready(ClassIncremental(base, num_tasks=2))
    base.train = digits(0, 4)
    assert ready(sequence).tasks[1].classes == (2, 3)


def test_a_class_without_validation_samples_does_not_matter():
    class FewVal(PlainData):
        def val_dataloader(self):
            return DataLoader(digits(600, 604), batch_size=10)

    sequence = ready(ClassIncremental(FewVal(), num_tasks=5, eval_loaders="per_task", eval_tasks="all"))
    present = {int(label) // 2 for label in LABELS[600:604]}
    assert len(sequence.val_dataloader()) == len(present) < 5


def test_it_is_made_over_our_own_sources():
    sequence = ready(ClassIncremental(Digits(batch_size=16), num_tasks=5))
    images, labels = next(iter(sequence.train_dataloader()))
    assert images.shape == (16, 1, 8, 8)
    assert set(labels.tolist()) == {0, 1}


def test_number_of_classes_is_what_a_head_needs_also_for_labels_that_come_in_no_task():
    sequence = ClassIncremental(Digits(), classes_per_task=[1, 1], class_order=[3, 2, 1, 0, 4, 5, 6, 7, 8, 9])
    assert [task.classes for task in sequence.tasks] == [(3,), (2,)]
    assert sequence.num_classes == 10
