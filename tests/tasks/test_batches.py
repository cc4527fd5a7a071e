from collections import UserDict, namedtuple

import pytest
import torch

from lightning_cl.tasks import BatchStructure
from lightning_cl.tasks.batches import TARGET_NAMES, as_labels, describe, replace_part

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
