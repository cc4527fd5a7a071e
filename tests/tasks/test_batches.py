from collections import UserDict, namedtuple

import pytest
import torch

from lightning_cl.tasks import BatchStructure
from lightning_cl.tasks.batches import TARGET_NAMES, as_labels, describe, join_rows, replace_part, take_rows

IMAGES, LABELS = torch.zeros(4, 1, 2, 2), torch.arange(4)
Pair = namedtuple("Pair", ["picture", "category"])


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES, LABELS, torch.ones(4)),
        Pair(IMAGES, LABELS),
        {"image": IMAGES, "label": LABELS},
        {"pixel_values": IMAGES, "labels": LABELS},
        {"x": IMAGES, "y": LABELS, "weight": torch.ones(4)},
        {"anything": IMAGES, "target": LABELS},
        UserDict({"image": IMAGES, "targets": LABELS}),
    ],
    ids=lambda batch: f"{type(batch).__name__}-{'-'.join(batch) if hasattr(batch, 'keys') else len(batch)}",
)
def test_inputs_and_targets_are_found_in_the_usual_batches(batch):
    structure = BatchStructure()
    assert structure.find_inputs(batch) is IMAGES
    assert structure.find_targets(batch) is LABELS


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_every_usual_name_of_targets_is_known(name):
    assert BatchStructure().find_targets({"image": IMAGES, name: LABELS}) is LABELS


@pytest.mark.parametrize(
    ("batch", "inputs", "target_key"),
    [
        ((LABELS, IMAGES), 1, 0),
        ({"a": IMAGES, "b": LABELS}, "a", "b"),
        ({"data": {"image": IMAGES}, "truth": {"fine": LABELS, "coarse": None}}, "data.image", "truth.fine"),
        ({"views": [None, IMAGES], "y": (None, LABELS)}, "views.1", "y.1"),
        ((LABELS, IMAGES), -1, -2),
    ],
)
def test_a_named_part_is_taken(batch, inputs, target_key):
    structure = BatchStructure(inputs, target_key)
    assert structure.find_inputs(batch) is IMAGES
    assert structure.find_targets(batch) is LABELS


def test_a_lone_tensor_is_its_own_input():
    assert BatchStructure().find_inputs(IMAGES) is IMAGES


def test_the_target_key_tells_the_inputs_of_two_entries():
    assert BatchStructure(target_key="category").find_inputs({"picture": IMAGES, "category": LABELS}) is IMAGES


@pytest.mark.parametrize("batch", [{"a": IMAGES, "b": LABELS}, {"label": LABELS, "labels": LABELS}, (IMAGES,), IMAGES])
def test_targets_that_cannot_be_told_are_an_error_that_shows_the_batch(batch):
    with pytest.raises(ValueError, match=r"`target_key=\.\.\.`") as error:
        BatchStructure().find_targets(batch)
    assert describe(batch) in str(error.value)


@pytest.mark.parametrize("batch", [{"a": IMAGES, "b": IMAGES}, {"image": IMAGES, "x": IMAGES}, (), "text"])
def test_inputs_that_cannot_be_told_are_an_error_that_shows_the_batch(batch):
    with pytest.raises(ValueError, match=r"`inputs=\.\.\.`") as error:
        BatchStructure().find_inputs(batch)
    assert describe(batch) in str(error.value)


@pytest.mark.parametrize(
    ("batch", "key"),
    [((IMAGES, LABELS), 2), ((IMAGES, LABELS), "y"), ({"x": IMAGES}, "y"), ({"x": IMAGES}, "x.deep"), (IMAGES, "x")],
)
def test_a_name_that_leads_nowhere_is_an_error_that_shows_the_batch(batch, key):
    with pytest.raises(ValueError, match=f"`target_key={key!r}` names no part of a batch") as error:
        BatchStructure(target_key=key).find_targets(batch)
    assert describe(batch) in str(error.value)


def test_a_dict_is_handed_on_without_its_targets():
    batch = {"input_ids": LABELS + 1, "attention_mask": IMAGES, "labels": LABELS}
    assert list(BatchStructure().without_targets(batch)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    "batch",
    [(IMAGES, LABELS), [IMAGES, LABELS], Pair(IMAGES, LABELS), {"deep": [{"image": IMAGES}], "y": LABELS}, IMAGES],
    ids=["tuple", "list", "namedtuple", "nested", "tensor"],
)
def test_a_part_is_replaced_where_it_stands_and_the_batch_keeps_its_type(batch):
    new = torch.ones(1)
    replaced = replace_part(batch, IMAGES, new)
    assert type(replaced) is type(batch) or batch is IMAGES
    assert describe(replaced) == describe(batch).replace(describe(IMAGES), describe(new))


def test_replacing_leaves_the_batch_itself_alone():
    batch = {"image": IMAGES, "y": LABELS}
    replace_part(batch, IMAGES, LABELS)
    assert batch["image"] is IMAGES


def test_long_and_deep_batches_are_described_in_short():
    assert describe([0] * 9) == "[int, int, int, int, ...]"
    assert describe({"a": {"b": {"c": {"d": IMAGES}}}}) == "{'a': {'b': {'c': dict}}}"


@pytest.mark.parametrize("targets", [[0, 1], torch.tensor([0, 1], dtype=torch.int32), torch.tensor([False, True])])
def test_labels_become_one_integer_a_sample(targets):
    labels = as_labels(targets)
    assert labels.dtype == torch.long
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize("targets", [torch.rand(4), torch.zeros(4, 2, dtype=torch.long), torch.tensor(3)])
def test_targets_that_are_no_labels_are_an_error_that_shows_them(targets):
    with pytest.raises(ValueError, match=r"no class labels.*`target_key=...`") as error:
        as_labels(targets)
    assert describe(targets) in str(error.value)


def _rows_of(count, first=0):
    """A batch of every structure, whose rows are numbered."""
    numbers = torch.arange(first, first + count)
    return {
        "tensor": numbers.view(-1, 1),
        "tuple": (numbers, numbers * 2.0),
        "list": [numbers, numbers * 2.0],
        "pair": Pair(numbers, numbers * 2.0),
        "dict": {"x": numbers, "y": [numbers, {"z": numbers.view(-1, 1, 1)}]},
        "strings": [numbers, [f"{number}" for number in numbers.tolist()]],
        "strings in a tuple": (numbers, tuple(f"{number}" for number in numbers.tolist())),
        "numbers": {"x": numbers, "ids": numbers.tolist()},
        "dicts, one a row": (numbers, [{"box": torch.full((9,), number)} for number in numbers.tolist()]),
        "tensors, one a row": [numbers, tuple(torch.ones(20 + number) for number in numbers.tolist())],
    }


ONE_A_ROW = ["dicts, one a row", "tensors, one a row"]
STRUCTURES = [structure for structure in _rows_of(1) if structure not in ONE_A_ROW]


def _equal(first, second):
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first == second


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("counts", [(3, 4, 1), (5, 5), (1, 1), (6,)])
def test_the_rows_of_several_batches_stand_one_after_another(structure, counts):
    firsts = [sum(counts[:place]) for place in range(len(counts))]
    batches = [_rows_of(count, first)[structure] for count, first in zip(counts, firsts, strict=True)]
    assert _equal(join_rows(batches, counts), _rows_of(sum(counts))[structure])


@pytest.mark.parametrize("structure", ONE_A_ROW)
@pytest.mark.parametrize("counts", [(3, 4), (2, 2)])
def test_lists_with_one_entry_a_row_are_joined_entry_by_entry(structure, counts):
    batches = [_rows_of(counts[0])[structure], _rows_of(counts[1], counts[0])[structure]]
    assert _equal(join_rows(batches, counts), _rows_of(sum(counts))[structure])


@pytest.mark.parametrize("structure", STRUCTURES + ONE_A_ROW)
@pytest.mark.parametrize("count", [8, 5, 2, 1])
def test_some_rows_of_a_batch_are_taken(structure, count):
    batch, half = _rows_of(count)[structure], count // 2
    assert _equal(take_rows(batch, slice(half, count), count), _rows_of(count - half, half)[structure])
    assert _equal(take_rows(batch, [count - 1], count), _rows_of(1, count - 1)[structure])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_taking_apart_and_joining_gives_the_batch_again(structure):
    batch = _rows_of(7)[structure]
    assert _equal(join_rows([take_rows(batch, slice(3), 7), take_rows(batch, slice(3, 7), 7)], [3, 4]), batch)


def test_lists_and_tuples_go_together():
    """The collate function of PyTorch makes lists of tuples; data sets that collate themselves often make tuples."""
    assert _equal(join_rows([_rows_of(3)["tuple"], _rows_of(2, 3)["list"]], [3, 2]), _rows_of(5)["tuple"])


def test_what_has_no_rows_stays_as_it_is():
    batch = {"x": torch.arange(4), "scale": torch.tensor(2.0), "name": "all", "size": 4, "stats": torch.ones(9)}
    taken = take_rows(batch, slice(1, 3), 4)
    assert taken["x"].tolist() == [1, 2]
    assert all(taken[key] is batch[key] for key in ("scale", "name", "size", "stats"))


def test_entries_for_a_whole_batch_are_those_of_the_first_batch():
    joined = join_rows(
        [{"x": torch.arange(2), "name": "all", "size": 3}, {"x": torch.arange(2), "name": "b", "size": 4}],
        [2, 2],
    )
    assert (joined["name"], joined["size"]) == ("all", 3)


def test_rows_on_another_device_join_those_of_the_first():
    joined = join_rows([torch.zeros(2, 3, device="meta"), torch.zeros(1, 3)], [2, 1])
    assert joined.device.type == "meta"
    assert joined.shape == (3, 3)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((IMAGES, LABELS), (IMAGES.flatten(1), LABELS)),
        ((IMAGES, LABELS), (IMAGES,)),
        ({"x": IMAGES}, {"y": IMAGES}),
        ({"x": IMAGES}, (IMAGES,)),
        ((IMAGES, LABELS), {"x": IMAGES, "y": LABELS}),
        ((IMAGES, LABELS), IMAGES),
    ],
    ids=["shapes", "lengths", "keys", "kinds", "tuple and dict", "tuple and tensor"],
)
def test_batches_that_do_not_go_together_are_an_error_that_shows_both(first, second):
    with pytest.raises(ValueError, match="Samples of different tasks make no common batch") as error:
        join_rows([first, second], [4, 4])
    assert "Tensor(4, 1, 2, 2)" in str(error.value)
