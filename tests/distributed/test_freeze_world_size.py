"""Layers stand still on any number of processes, and the others are trained as on one."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from benchmarks.processes import run_ranks
from tests.distributed.freeze_runs import DecayingNormedNet, Run, run_all

RUNS = {
    "all but the last": Run(),
    "one layer": Run(("layer.1",)),
    "from the start": Run(after_task=None),
    "everything": Run(("*",)),
}
NORMED = Run(net=DecayingNormedNet)
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]
ENDS: dict[int, dict[Run, list[list[dict[str, Tensor]]]]] = {}


def _ends(run: Run, ranks: int) -> list[list[dict[str, Tensor]]]:
    """Return what each rank held at the end of each task; all runs share the start of the processes."""
    if ranks not in ENDS:
        runs = [*RUNS.values(), NORMED]
        ends = run_ranks(run_all, ranks, ranks, runs)
        ENDS[ranks] = {run: [end[number] for end in ends] for number, run in enumerate(runs)}
    return ENDS[ranks][run]


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_the_chosen_layers_alone_stand_still(name: str, ranks: int) -> None:
    still = "layer." if name == "everything" else "layer.1."
    for tasks in _ends(RUNS[name], ranks):
        for before, after in pairwise(tasks):
            assert _moved(before, after) == {part for part in before if not part.startswith(still)}


@pytest.mark.parametrize("ranks", RANKS)
def test_layers_that_stand_still_keep_the_statistics_of_the_first_rank(ranks: int) -> None:
    ends = _ends(NORMED, ranks)
    first = ends[0][0]
    for tasks in ends:
        assert _moved(first, tasks[-1]) == {"layer.5.weight", "layer.5.bias"}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_weights_end_as_in_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    for tasks in _ends(RUNS[name], ranks):
        for part, wanted in one[-1].items():
            got = tasks[-1][part]
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
