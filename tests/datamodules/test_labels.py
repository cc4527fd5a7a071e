import threading

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from lightning_cl.datamodules.labels import known_labels, read_labels
from lightning_cl.tasks import BatchStructure

LABELS = [3, 1, 2, 1, 0, 3]


class Samples(Dataset):
    """Six samples that count how often they are read."""

    def __init__(self, make=lambda label: (torch.rand(2), label), **attributes):
        self.reads = 0
        self.make = make
        self.__dict__.update(attributes)

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        self.reads += 1
        return self.make(LABELS[index])


def _tensors():
    return TensorDataset(torch.zeros(6, 2), torch.tensor(LABELS))


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=np.uint8)])
def test_labels_are_found_in_an_attribute_without_reading_a_sample(name, convert):
    dataset = Samples(**{name: convert(LABELS)})
    assert known_labels(dataset).tolist() == LABELS
    assert known_labels(dataset).dtype == torch.long
    assert dataset.reads == 0


def test_labels_are_the_second_tensor_of_a_tensor_data_set():
    assert known_labels(_tensors()).tolist() == LABELS


@pytest.mark.parametrize("make", [_tensors, lambda: Samples(targets=LABELS)], ids=["tensors", "attribute"])
def test_labels_are_found_through_nested_data_sets(make):
    data = make()
    assert known_labels(Subset(data, [4, 0])).tolist() == [0, 3]
    assert known_labels(Subset(data, np.array([4, 0]))).tolist() == [0, 3]
    assert known_labels(Subset(data, range(2, 4))).tolist() == [2, 1]
    assert known_labels(ConcatDataset([data, Subset(data, [2])])).tolist() == [*LABELS, 2]
    assert known_labels(Subset(Subset(ConcatDataset([data, data]), [6, 8, 10]), [2, 1])).tolist() == [0, 2]
    halves = random_split(data, [3, 3], generator=torch.Generator().manual_seed(0))
    assert sorted(torch.cat([known_labels(half) for half in halves]).tolist()) == sorted(LABELS)


def test_an_empty_subset_has_no_labels():
    assert known_labels(Subset(_tensors(), [])).tolist() == []


def test_a_target_transform_is_applied_as_the_samples_have_it():
    dataset = Samples(lambda label: (0, label // 2), targets=LABELS, target_transform=lambda label: label // 2)
    assert known_labels(dataset).tolist() == [dataset[i][1] for i in range(6)] == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"labels": ["cat", "dog", "cat", "dog", "cat", "dog"]},
        {"targets": torch.rand(6)},
        {"targets": torch.eye(6, dtype=torch.long)},
        {"targets": [{"box": 1}] * 6},
        {"targets": [[1], [1, 2], [], [], [], []]},
        {"targets": lambda: LABELS},
        {"targets": None},
        {"labels": [0, 1, 2]},
    ],
    ids=["none", "names", "floats", "one-hot", "dicts", "ragged", "method", "None", "class-numbers"],
)
def test_an_attribute_that_holds_no_label_of_each_sample_is_not_taken_for_labels(attributes):
    dataset = Samples(**attributes)
    assert known_labels(dataset) is None
    assert read_labels(dataset, BatchStructure()).tolist() == LABELS


def test_targets_that_are_no_labels_do_not_hide_labels():
    assert known_labels(Samples(targets=torch.rand(6), labels=LABELS)).tolist() == LABELS


def test_one_unknown_part_makes_the_labels_of_the_whole_unknown():
    assert known_labels(ConcatDataset([_tensors(), Samples()])) is None


def test_labels_that_are_not_known_are_read_once():
    dataset = Samples()
    assert read_labels(dataset, BatchStructure()).tolist() == LABELS
    assert dataset.reads == 6


@pytest.mark.parametrize(
    ("make", "target_key"),
    [
        (lambda label: {"image": 0, "fine": label, "coarse": 9}, "fine"),
        (lambda label: {"image": 0, "meta": {"class": torch.tensor(label)}}, "meta.class"),
        (lambda label: (np.int64(label), 7), 0),
    ],
    ids=["key", "dotted", "position"],
)
def test_a_target_key_names_the_labels_even_where_others_are_known(make, target_key):
    dataset = Samples(make, targets=[9] * 6)
    assert read_labels(dataset, BatchStructure(target_key=target_key)).tolist() == LABELS


def test_reading_labels_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    read_labels(Samples(), BatchStructure())
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_labels_leaves_nothing_on_a_screen_that_is_no_terminal(capsys):
    read_labels(Samples(), BatchStructure())
    assert capsys.readouterr().out.strip() == ""


@pytest.mark.parametrize(
    "make", [lambda _: (0, "cat"), lambda _: (0, 0.5), lambda _: (0, torch.zeros(3)), lambda _: (0, None)]
)
def test_a_sample_without_a_label_is_an_error_that_names_the_argument(make):
    with pytest.raises(ValueError, match=r"no class labels: expected one integer a sample.*`target_key=...`"):
        read_labels(Samples(make), BatchStructure())


def test_an_error_of_a_sample_leaves_no_thread_of_the_progress_bar():
    class Breaks(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise RuntimeError("broken")

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="broken") as error:
        read_labels(Breaks(), BatchStructure())
    for thread in set(threading.enumerate()) - before:  # while `error` still holds the frames
        thread.join(timeout=5)
        assert not thread.is_alive(), error
