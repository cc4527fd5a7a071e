"""Which classes and samples an attack chooses."""

import pytest
import torch

from lightning_cl.datamodules.poison import ONE_CORRUPTION, SEVERAL_CORRUPTIONS, Poison


def _poison(attack="base", task=0, corruption=None, severity=5, classes=None, samples=1.0):
    return Poison(task, attack, corruption, severity, classes, samples, None)


@pytest.mark.parametrize(("present", "half"), [(1, 1), (2, 1), (5, 3), (10, 5), (20, 10)])
def test_bait_takes_half_of_the_classes_rounded_up(present, half):
    for attack in ("bait", "multibait"):
        assert len(_poison(attack).assign(range(present), seed=0)) == half
    for attack in ("base", "multibase"):
        assert set(_poison(attack).assign(range(present), seed=0)) == set(range(present))


def test_the_half_depends_on_seed_and_task():
    chosen = {frozenset(_poison("bait", task).assign(range(10), seed)) for seed in range(5) for task in range(5)}
    assert len(chosen) > 10


def test_each_class_is_as_likely_to_be_bait_as_any_other():
    chosen = [label for seed in range(400) for label in _poison("bait").assign(range(10), seed)]
    counts = torch.bincount(torch.tensor(chosen))
    assert counts.sum() == 2000
    assert (counts - 200).abs().max() < 45  # four and a half standard deviations


def test_the_order_of_the_labels_makes_no_difference():
    assert _poison("bait").assign([5, 2, 9], seed=1) == _poison("bait").assign([2, 5, 9], seed=1)


def test_usual_corruptions():
    assert _poison("base").corruptions == _poison("bait").corruptions == ONE_CORRUPTION
    assert _poison("multibase").corruptions == _poison("multibait").corruptions == SEVERAL_CORRUPTIONS


def test_classes_are_dealt_to_the_corruptions_in_turn():
    assigned = _poison("multibase").assign(range(10), seed=0)
    assert list(assigned.values()) == [(name,) for name in SEVERAL_CORRUPTIONS] * 2


def test_named_classes_are_dealt_in_the_order_in_which_they_are_named():
    poison = _poison("multibait", classes=[7, 1, 3], corruption=["contrast", "fog"])
    assert poison.assign(range(10), seed=0) == {7: ("contrast",), 1: ("fog",), 3: ("contrast",)}


def test_corruptions_are_dealt_to_classes_where_these_are_fewer():
    assert list(_poison("multibase").assign([4, 5], seed=0).values()) == [
        ("gaussian_blur", "contrast", "jpeg_compression"),
        ("gaussian_noise", "pixelate"),
    ]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.999, 1.0])
def test_the_share_is_that_of_each_class(share):
    labels = torch.tensor([0] * 40 + [1] * 17 + [2] * 5)
    poison = _poison(samples=share, classes=[0, 2])
    kinds = poison.choose(labels, torch.arange(62), poison.assign([0, 1, 2], 0), seed=0)
    assert [int((kinds[labels == label] >= 0).sum()) for label in range(3)] == [round(40 * share), 0, round(5 * share)]


def test_a_larger_share_holds_the_smaller_one():
    labels, ids = torch.zeros(50, dtype=torch.long), torch.arange(100, 150)
    some, more = (_poison(samples=share).choose(labels, ids, {0: ONE_CORRUPTION}, seed=3) >= 0 for share in (0.2, 0.6))
    assert more[some].all()


def test_a_sample_is_chosen_by_its_id_wherever_it_stands():
    labels, ids = torch.zeros(50, dtype=torch.long), torch.arange(100, 150)
    poison = _poison(samples=0.5)
    kinds = poison.choose(labels, ids, {0: ONE_CORRUPTION}, seed=3)
    assert torch.equal(poison.choose(labels, ids.flip(0), {0: ONE_CORRUPTION}, seed=3).flip(0), kinds)


def test_the_description_names_the_seed_that_is_used():
    assert _poison().describe(seed=4)["seed"] == 4
    assert Poison(0, "base", None, 5, None, 1.0, seed=9).describe(seed=4)["seed"] == 9
