"""However many processes share the work, the same accuracies are tracked, and none of them changes the run."""

from typing import Any

import pytest

from benchmarks.processes import run_ranks
from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted
from tests.distributed.stability_gap_runs import Run, Tracking, run_all

RUNS = {
    "linear": Run(Tracking()),
    "both heads": Run(Tracking(head=True, nmc_refresh=2)),
    "online": Run(Tracking(start="online", every_n_steps=2)),
}
FEW = {
    "fewer probes than ranks": Run(Tracking(probe_size=3)),
    "fewer exemplars of a task than ranks": Run(Tracking(head=True, memory=10)),
}
ON_AND_OFF = {
    "on": Run(Tracking(head=True, start="online"), drops=True),
    "off": Run(Tracking(head=True, start="online", tracked=False), drops=True),
}
ENDS: dict[int, dict[Run, list[dict[str, Any]]]] = {}


def _ends(run: Run, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank saw of a run; all runs share the start of the processes."""
    if ranks not in ENDS:
        runs = [*RUNS.values(), *(ON_AND_OFF.values() if ranks == 2 else ())]
        ends = run_ranks(run_all, ranks, ranks, runs)
        ENDS[ranks] = {run: [end[number] for end in ends] for number, run in enumerate(runs)}
    return ENDS[ranks][run]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RUNS)
def test_each_rank_tracks_the_accuracies_of_a_run_on_one(name: str, ranks: int) -> None:
    expected = _ends(RUNS[name], 1)[0]
    assert len(expected["curve"]["steps"]) == (5 if name == "online" else 10)
    assert len(expected["curve"]["accuracies"].nan_to_num(-1.0).unique()) > 4
    for end in _ends(RUNS[name], ranks):
        assert differences(expected["curve"], end["curve"]) == []
        assert {**end["figures"]} == pytest.approx(expected["figures"], nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_rank_may_be_without_a_sample(name: str) -> None:
    """They track what one rank does, or the run is refused before its first step."""
    curves = [run_ranks(run_all, ranks, ranks, [FEW[name]], timeout=60)[0][0]["curve"] for ranks in (1, 4)]
    assert differences(*curves) == []


def test_tracking_does_not_change_a_bit_of_the_run_on_two_ranks() -> None:
    tracked, untracked = (_ends(ON_AND_OFF[state], 2) for state in ("on", "off"))
    for rank in range(2):
        assert differences(tracked[rank]["run"], untracked[rank]["run"]) == []
    assert differences(tracked[0]["run"]["weights"], tracked[1]["run"]["weights"]) == _of_batch_norm(tracked)


def _of_batch_norm(ends: list[dict[str, Any]]) -> list[str]:
    """Name the buffers in which the ranks differ because each has its own batches."""
    first, second = (end["run"]["weights"] for end in ends)
    return [
        f"/{name}"
        for name in first.keys() | second.keys()
        if "running" in name and differences(first[name], second[name])
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_warning_is_about_the_tracker(ranks: int) -> None:
    warnings = [warning for run in RUNS.values() for end in _ends(run, ranks) for warning in end["warnings"]]
    assert [warning for warning in warnings if "stability" in warning or "sync_dist" in warning] == []


# Of one epoch each, the five tasks have 22 steps (the last one 21); checkpoints every 7 steps and at each epoch's end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "checkpoint"),
    [
        pytest.param(Kill(52), "step-step=49.ckpt", id="in a task"),
        pytest.param(Kill(23), "epoch-epoch=0.ckpt", id="end", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_on_two_ranks_goes_on_with_the_curve(kill: Kill, checkpoint: str) -> None:
    tracking = Tracking(head=True, start="online", probe_size=15, every_n_steps=2, nmc_refresh=3)
    setting = Setting("onecycle", ranks=2, epochs=1, callbacks=tracking, seeded_once=True)
    if setting not in UNINTERRUPTED:
        UNINTERRUPTED[setting] = _without_folder(uninterrupted(setting))
    resumed, name = kill_and_resume(setting, kill)
    assert name == checkpoint
    expected = UNINTERRUPTED[setting]
    curve = expected["callbacks"][-1]["curve"]
    assert curve["steps"][-1] == expected["steps"]
    assert len(curve["accuracies"].nan_to_num(-1.0).unique()) > 4
    assert differences(expected, _without_folder(resumed)) == []


UNINTERRUPTED: dict[Setting, dict[str, Any]] = {}


def _without_folder(end: dict[str, Any]) -> dict[str, Any]:
    del end["callbacks"][0]["store"]["folder"]
    return end
