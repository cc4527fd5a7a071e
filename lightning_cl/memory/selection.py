"""Who stays in a bounded memory: shares of the groups, smallest keys, and iCaRL's herding."""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Selection = Literal["class_balanced", "reservoir", "random", "herding"]

# Group ids below this are their own codes: counting them takes one small table, and sorting them one radix pass.
_FEW = 1 << 16


def number_groups(groups: NDArray[np.int32]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
    """Return a small code for each sample's group, ascending as the ids do, and the samples of each code.

    A code without a sample has a count of 0.
    """
    if groups.size == 0 or groups.max() < _FEW:
        return groups.astype(np.uint16), np.bincount(groups)
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return codes.reshape(-1), counts


def share_slots(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Share the slots of a memory among groups, as equally as their samples allow (water-filling).

    A group with fewer samples than its share leaves the rest to the others; what cannot be divided goes, one slot
    each, to the first groups that have a sample for it. The shares add up to ``min(size, counts.sum())``.

    Args:
        counts: Samples of each group.
        size: Slots of the memory.
    """
    if counts.sum() <= size:
        return counts
    ordered = np.sort(counts)
    left = size - (ordered.cumsum() - ordered)
    levels = left // np.arange(len(ordered), 0, -1)
    level = levels[(ordered > levels).argmax()]
    shares: NDArray[np.int64] = np.minimum(counts, level)
    shares[(counts > level).nonzero()[0][: size - shares.sum()]] += 1
    return shares


def find_entry_bars(groups: NDArray[np.int32], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the key that a newcomer of each group must stay below to have a chance of getting into a full memory.

    A group as large as the largest cannot grow, so that a newcomer must beat one of its own. Smaller groups may grow,
    and have no bar. The last entry is for groups that are not in the memory.
    """
    no_bar = np.iinfo(np.int64).max
    if groups.max() >= _FEW:
        return np.array([no_bar])
    counts = np.bincount(groups)
    bars = np.zeros(len(counts) + 1, dtype=np.int64)
    np.maximum.at(bars, groups, keys)
    bars[:-1][counts < counts.max()] = no_bar
    bars[-1] = no_bar
    return bars


def keep_smallest(
    keys: NDArray[np.int64], codes: NDArray[np.integer[Any]], counts: NDArray[np.int64], shares: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which samples stay when each group keeps as many of its smallest keys as it has shares.

    Args:
        keys: One key per sample, no two alike within a group.
        codes: The group of each sample, as `number_groups` gives it.
        counts: Samples of each group.
        shares: Slots of each group, at most its samples.
    """
    keep = np.ones(len(keys), dtype=bool)
    crowded = (counts > shares).nonzero()[0]
    if len(crowded) == 0:
        return keep
    order = codes.argsort(kind="stable")
    starts = counts.cumsum() - counts
    losers = []
    for code in crowded.tolist():
        members = order[starts[code] : starts[code] + counts[code]]
        losers.append(members[keys[members].argpartition(shares[code])[shares[code] :]])
    keep[np.concatenate(losers)] = False
    return keep


def rank_each_group(features: Tensor, codes: NDArray[np.integer[Any]], shares: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rank of each sample in its group, by herding; those beyond their group's share rank last, alike.

    Args:
        features: ``(samples, dim)``.
        codes: The group of each sample, as `number_groups` gives it.
        shares: Slots of each group.
    """
    ranks = np.full(len(codes), np.iinfo(np.int32).max, dtype=np.int64)
    for code in np.unique(codes).tolist():
        members = np.flatnonzero(codes == code)
        order = rank_by_herding(features[torch.from_numpy(members)], int(shares[code])).numpy()
        ranks[members[order]] = np.arange(len(order))
    return ranks


def rank_by_herding(features: Tensor, count: int) -> Tensor:
    """Order samples so that the mean of the first ones is always near the mean of all (herding).

    The greedy rule of iCaRL (arXiv 1611.07725, algorithm 4) on L2-normalised features: the next sample is the one that
    brings the mean of the chosen ones nearest to the mean of all. Computed in float64; equally good samples in order.

    Args:
        features: ``(samples, dim)``.
        count: How many to choose.

    Returns:
        Positions of the chosen samples, first choice first, ``(min(count, samples),)``.
    """
    unit = F.normalize(features.detach().to("cpu", torch.float64), dim=1)
    squares = (unit * unit).sum(dim=1)
    mean = unit.mean(dim=0)
    chosen: list[int] = []
    # after k choices with sum s, ||mean - (s + f) / (k + 1)|| is least where 2 f . wanted - f . f is greatest
    wanted = mean.clone()  # (k + 1) mean - s
    for _ in range(min(count, len(unit))):
        gains = 2 * (unit @ wanted) - squares
        gains[chosen] = -torch.inf
        # matrix products round equal rows differently from one place, and from one machine, to the next
        best = int((gains >= gains.max() - 1e-10).to(torch.uint8).argmax())
        chosen.append(best)
        wanted += mean - unit[best]
    return torch.tensor(chosen, dtype=torch.long)
