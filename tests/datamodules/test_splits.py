import pytest
import torch

from lightning_cl.datamodules.splits import stratified_split

TARGETS = torch.tensor([0] * 50 + [1] * 20 + [2] * 2 + [3])[
    torch.randperm(73, generator=torch.Generator().manual_seed(0))
]


def test_the_two_parts_are_the_whole_set_without_overlap():
    kept, held_out = stratified_split(TARGETS, fraction=0.1, seed=0)
    assert sorted(kept + held_out) == list(range(73))
    assert kept == sorted(kept)


def test_each_class_gives_its_share_and_a_class_of_two_gives_one():
    _, held_out = stratified_split(TARGETS, fraction=0.1, seed=0)
    assert TARGETS[held_out].bincount(minlength=4).tolist() == [5, 2, 1, 0]


def test_equal_seeds_give_equal_splits_whatever_the_global_rng():
    torch.manual_seed(1)
    first = stratified_split(TARGETS, fraction=0.2, seed=3)
    torch.manual_seed(2)
    assert stratified_split(TARGETS, fraction=0.2, seed=3) == first
    assert stratified_split(TARGETS, fraction=0.2, seed=4) != first


def test_a_fraction_of_zero_keeps_everything():
    assert stratified_split(TARGETS, fraction=0.0, seed=0) == (list(range(73)), [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(ValueError, match=r"`fraction` must be at least 0 and below 1, got"):
        stratified_split(TARGETS, fraction=fraction, seed=0)
