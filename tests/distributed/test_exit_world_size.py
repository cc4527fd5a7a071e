"""Exits are trained alike however many processes share the work, and DDP needs no search for unused parameters."""

from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from benchmarks.resume import differences
from tests.distributed.exit_runs import Run, WorseOnTheLastRank, run_all
from tests.distributed.nearest_mean_runs import NoisyNormedNet

pytestmark = pytest.mark.slow
RUNS = {
    **{regime: Run(regime) for regime in ("joint", "mixed", "disjoint")},
    "ensemble": Run("mixed", ensemble="geometric"),
    "nearest means": Run("mixed", exit_classifier="nearest_mean"),
}
NORMED = Run("disjoint", NoisyNormedNet)
STOPPED = Run("disjoint", WorseOnTheLastRank, epochs=6, stops=True)
ENDS: dict[int, dict[Run, list[dict[str, Any]]]] = {}


def _ends(run: Run, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank saw of a run; all runs share the start of the processes."""
    if ranks not in ENDS:
        runs = [*RUNS.values(), NORMED, STOPPED]
        ends = run_ranks(run_all, ranks, ranks, runs)
        ENDS[ranks] = {run: [end[number] for end in ends] for number, run in enumerate(runs)}
    return ENDS[ranks][run]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_two_ranks_train_what_one_trains(run: Run) -> None:
    [one] = _ends(run, 1)
    for end in _ends(run, 2):
        for part in ("weights", "heads"):
            for name, expected in one[part].items():
                torch.testing.assert_close(end[part][name], expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(end["matrix"], one["matrix"], atol=0.02, rtol=0, equal_nan=True)


@pytest.mark.parametrize("run", [*RUNS.values(), NORMED, STOPPED], ids=[*RUNS, "batch norm", "stopped early"])
def test_all_ranks_hold_the_same_heads(run: Run) -> None:
    first, second = _ends(run, 2)
    assert differences(first["heads"], second["heads"]) == []
    assert all(first["modes"])


def test_a_network_that_stands_still_does_so_on_every_rank() -> None:
    for rank, end in enumerate(_ends(NORMED, 2)):
        for task in range(5):
            alone, still = end["epochs"][2 * task], end["epochs"][2 * task + 1]
            network = [name for name in alone if not name.startswith("early_exits")]
            if rank > 0:  # DDP gives it the buffers of the first
                network = [name for name in network if "running" not in name]
            assert differences({n: alone[n] for n in network}, {n: still[n] for n in network}) == []
            assert differences(alone, still) != []


def test_a_phase_that_one_rank_stops_ends_on_all() -> None:
    for end in _ends(STOPPED, 2):
        assert len(end["epochs"]) == 5 * 4
        for task in range(5):
            alone, still = end["epochs"][4 * task + 1], end["epochs"][4 * task + 2]
            moved = differences(alone, still)
            assert moved != []
            assert all("early_exits" in name for name in moved)
