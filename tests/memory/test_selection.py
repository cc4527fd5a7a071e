import numpy as np
import pytest
import torch

from lightning_cl.memory.selection import (
    find_entry_bars,
    keep_smallest,
    number_groups,
    rank_by_herding,
    rank_each_group,
    share_slots,
)


def _reference_shares(counts, size):
    """Deal the slots out one by one."""
    shares = [0] * len(counts)
    while sum(shares) < min(size, sum(counts)):
        for group, count in enumerate(counts):
            if shares[group] < count and sum(shares) < size:
                shares[group] += 1
    return shares


def _reference_herding(features, count):
    """Algorithm 4 of iCaRL, as it stands in the paper."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    chosen = []
    for k in range(1, count + 1):
        distances = [
            np.linalg.norm(mean - (unit[chosen].sum(axis=0) + row) / k) if place not in chosen else np.inf
            for place, row in enumerate(unit)
        ]
        chosen.append(int(np.argmin(distances)))
    return chosen


@pytest.mark.parametrize(
    ("counts", "size", "shares"),
    [
        ([5000, 5000, 5000], 2000, [667, 667, 666]),  # rounded up, these would be 2001
        ([1, 100, 100], 20, [1, 10, 9]),
        ([100, 2, 100, 3], 25, [10, 2, 10, 3]),
        ([0, 7, 0, 7], 5, [0, 3, 0, 2]),
        ([4, 4], 8, [4, 4]),
        ([4, 4], 100, [4, 4]),
        ([9, 9, 9], 2, [1, 1, 0]),
        ([], 5, []),
    ],
)
def test_a_group_with_few_samples_leaves_its_slots_to_the_others(counts, size, shares):
    assert share_slots(np.array(counts, dtype=np.int64), size).tolist() == shares


def test_shares_equal_dealing_the_slots_out_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(0, rng.integers(1, 40) + 1, rng.integers(1, 12))
        size = int(rng.integers(1, 150))
        assert share_slots(counts, size).tolist() == _reference_shares(counts.tolist(), size)


@pytest.mark.parametrize("ids", [[3, 1, 3, 7], [70_000, 5, 70_000, 2**31 - 1]])
def test_codes_ascend_as_the_group_ids_do(ids):
    codes, counts = number_groups(np.array(ids, dtype=np.int32))
    assert np.argsort(codes, kind="stable").tolist() == np.argsort(ids, kind="stable").tolist()
    assert counts[codes].tolist() == [2, 1, 2, 1]


def test_each_group_keeps_its_smallest_keys():
    rng = np.random.default_rng(1)
    for _ in range(100):
        groups = rng.integers(0, 6, 50).astype(np.int32)
        keys = rng.permutation(50)
        codes, counts = number_groups(groups)
        shares = np.minimum(counts, rng.integers(0, 12, len(counts)))
        expected = np.zeros(50, dtype=bool)
        for code, share in enumerate(shares):
            members = np.flatnonzero(codes == code)
            expected[members[np.argsort(keys[members])[:share]]] = True
        assert np.array_equal(keep_smallest(keys, codes, counts, shares), expected)


def test_a_newcomer_at_or_above_its_bar_never_gets_in():
    rng = np.random.default_rng(2)
    refused = 0
    for _ in range(500):
        groups = rng.integers(0, 4, rng.integers(1, 30)).astype(np.int32)
        size = len(groups)
        groups = np.concatenate((groups, rng.integers(0, 5, rng.integers(1, 30)).astype(np.int32)))
        keys = rng.permutation(len(groups))
        bars = find_entry_bars(groups[:size], keys[:size])
        codes, counts = number_groups(groups)
        kept = keep_smallest(keys, codes, counts, share_slots(counts, size))[size:]
        hopeful = keys[size:] < bars[np.minimum(groups[size:], len(bars) - 1)]
        assert not (kept & ~hopeful).any()
        refused += int((~hopeful).sum())
    assert refused > 100


@pytest.mark.parametrize("seed", range(5))
def test_herding_equals_the_rule_in_the_paper(seed):
    features = np.random.default_rng(seed).normal(0.3, 1.0, (40, 6))
    ranked = rank_by_herding(torch.from_numpy(features), 40)
    assert ranked.tolist() == _reference_herding(features, 40)


def test_the_first_ones_of_a_herding_are_a_shorter_herding():
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rank_by_herding(features, 7), rank_by_herding(features, 30)[:7])


def test_herding_looks_at_directions_only():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(30, 5, generator=generator)
    scales = torch.rand(30, 1, generator=generator) * 100 + 0.01
    assert torch.equal(rank_by_herding(features, 10), rank_by_herding(features * scales, 10))


def test_herding_takes_equal_samples_in_their_order():
    features = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).repeat(37, 1)
    assert rank_by_herding(features, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(20))
def test_herding_takes_samples_that_only_rounding_tells_apart_in_their_order(seed):
    half = torch.randn(10, 300, generator=torch.Generator().manual_seed(seed))
    mirrored = torch.stack([half, half.flip(1)], dim=1).reshape(20, 300)  # as far from the mean as their mirror images
    assert int(rank_by_herding(mirrored, 1)) % 2 == 0


def test_herding_chooses_no_sample_twice():
    features = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    assert sorted(rank_by_herding(features, 50).tolist()) == list(range(20))


def test_herding_survives_features_of_zero():
    features = torch.zeros(4, 3)
    features[2] = torch.tensor([1.0, 0.0, 0.0])
    assert sorted(rank_by_herding(features, 4).tolist()) == [0, 1, 2, 3]


def test_samples_beyond_the_share_rank_behind_all_others():
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    codes = np.array([0, 2] * 6, dtype=np.uint16)
    ranks = rank_each_group(features, codes, np.array([2, 0, 4]))
    assert sorted(ranks[codes == 0].tolist())[:3] == [0, 1, np.iinfo(np.int32).max]
    assert sorted(ranks[codes == 2].tolist())[:5] == [0, 1, 2, 3, np.iinfo(np.int32).max]
    assert ranks[np.flatnonzero(codes == 2)[_reference_herding(features[1::2].double().numpy(), 4)]].tolist() == [
        0,
        1,
        2,
        3,
    ]
