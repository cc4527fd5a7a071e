"""Seeded splits of a labelled set."""

import torch
from torch import Tensor


def stratified_split(targets: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices of a set in two, with the share of every class the same in both parts.

    The split depends on the arguments alone: not on the global RNG, the number of ranks, or the order of calls.

    Args:
        targets: Labels of the set, ``(samples,)``.
        fraction: Share of each class that is held out, rounded to whole samples. A class of two or more samples gives
            at least one, and keeps at least one.
        seed: Seed of the draw.

    Returns:
        The indices that are kept and those that are held out, each in ascending order.

    Raises:
        ValueError: If `fraction` is not in [0, 1).

    Example::

        >>> kept, held_out = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), fraction=0.25, seed=0)
        >>> len(kept), len(held_out)
        (4, 2)
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"`fraction` must be at least 0 and below 1, got {fraction}.")
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    if fraction > 0:
        generator = torch.Generator().manual_seed(seed)
        for label in sorted(set(targets.tolist())):
            members = (targets == label).nonzero().squeeze(1)
            order = torch.randperm(len(members), generator=generator)
            count = min(max(round(len(members) * fraction), 1), len(members) - 1)
            held_out[members[order[:count]]] = True
    kept: list[int] = (~held_out).nonzero().squeeze(1).tolist()
    return kept, held_out.nonzero().squeeze(1).tolist()
