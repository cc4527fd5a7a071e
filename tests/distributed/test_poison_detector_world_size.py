"""A task is judged, and undone, alike on every rank, and as it would be on one."""

from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted
from tests.distributed.poison_runs import SETS, Run, VetoOfOneRank, Watched, run_all, run_of, watched

SKIPPING = {name: run_of(name, threshold=0.0, statistic="slope", detect_from=3, calibrate_task=2) for name in SETS}
MEASURED = run_of(threshold=90, action="warn", detect_from=0, samples=None)
FEW = run_of(threshold=90, action="warn", detect_from=0, samples=1)
ODD = run_of(threshold=90, action="warn", detect_from=0, samples=17)
VETO = run_of(None, VetoOfOneRank, threshold=90)
CALIBRATED = run_of(calibration_runs=2, margin=1e6)
PLAIN = run_of(threshold=90, detect_from=2)
RUNS = [SKIPPING["replay"], SKIPPING["held"], MEASURED, FEW, ODD, VETO, CALIBRATED, PLAIN]
ENDS: dict[int, list[list[dict[str, Any]]]] = {}


def _ends(run: Run, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank saw of a run; all runs share the start of the processes."""
    if run not in RUNS:
        return [end for [end] in run_ranks(run_all, ranks, ranks, [run])]
    if ranks not in ENDS:
        ENDS[ranks] = run_ranks(run_all, ranks, ranks, RUNS)
    return [end[RUNS.index(run)] for end in ENDS[ranks]]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("behaviours", ["replay", pytest.param("der", marks=pytest.mark.slow), "held"])
def test_of_a_poisoned_task_nothing_is_left_in_any_behaviour(behaviours: str, ranks: int) -> None:
    for end in _ends(SKIPPING[behaviours], ranks):
        assert sorted(end["undone"]) == [3, 4]
        assert len(end["undone"][3]["callbacks"]) >= len(SETS[behaviours])
        assert differences(end["ended"][2], end["undone"][3]) == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("behaviours", "names"),
    [
        ("replay", {"NearestMeanClassifier", "EarlyExits", "Replay"}),
        ("held", {"LearningWithoutForgetting", "ElasticWeightConsolidation", "SampleScreen", "GaussianClassifier"}),
    ],
)
def test_what_is_compared_is_changed_by_a_task_that_is_kept(behaviours: str, names: set[str], ranks: int) -> None:
    for end in _ends(SKIPPING[behaviours], ranks):
        changed = {path.split("/")[2] for path in differences(end["ended"][1], end["ended"][2])}
        assert names <= changed


def test_ranks_judge_alike() -> None:
    for run in (MEASURED, FEW, ODD, CALIBRATED, SKIPPING["replay"]):
        first, second = _ends(run, 2)
        assert first["record"] == second["record"]
        assert first["threshold"] == second["threshold"]


@pytest.mark.parametrize("run", [MEASURED, ODD], ids=["all", "some"])
def test_means_are_those_of_a_run_on_one(run: Run) -> None:
    [one] = _ends(run, 1)
    for end in _ends(run, 2):
        assert end["means"].keys() == one["means"].keys()
        for name, mean in end["means"].items():
            torch.testing.assert_close(mean, one["means"][name], atol=1e-6, rtol=0)


def test_fewer_samples_than_ranks_are_enough() -> None:
    assert [entry["verdict"] for entry in _ends(FEW, 2)[0]["record"]] == ["clean"] * 5


def test_the_veto_of_one_rank_undoes_the_task_on_all() -> None:
    for end in _ends(VETO, 2):
        assert end["refused"] == [2]
        assert [entry["task"] for entry in end["record"]] == [1, 3, 4]
        assert torch.equal(end["undone"][2]["module"]["layer.1.weight"], end["ended"][1]["module"]["layer.1.weight"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_a_calibration_each_rank_goes_on_as_if_there_had_been_none(ranks: int) -> None:
    for calibrated, plain in zip(_ends(CALIBRATED, ranks), _ends(PLAIN, ranks), strict=True):
        assert len(set(calibrated["record"][0]["runs"])) == 2
        assert calibrated["epochs"] == plain["epochs"] + 2
        assert differences(calibrated["weights"], plain["weights"]) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_left_on_any_rank(ranks: int) -> None:
    assert [end["hooks"] for run in RUNS for end in _ends(run, ranks)] == [0] * ranks * len(RUNS)


def test_one_rank_speaks_for_all() -> None:
    first, second = _ends(CALIBRATED, 2)
    assert len(first["said"]) == 2
    assert second["said"] == []


# ------------------------------------------------------------------ killed and resumed

# Of one epoch each, the tasks have 22 steps (30 and more with a joined memory), and the second is trained three times.
POISONED = watched(calibration_runs=2, margin=1e-6)
ALONE = watched(None, calibration_runs=2, margin=1e-6)
THROUGH: dict[Setting, dict[str, Any]] = {}


def _through(setting: Setting) -> dict[str, Any]:
    if setting not in THROUGH:
        THROUGH[setting] = uninterrupted(setting)
    return THROUGH[setting]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("callbacks", [ALONE, POISONED], ids=["alone", "everything"])
@pytest.mark.parametrize(
    ("kill", "checkpoint"),
    [
        (Kill(32), "step-step=28.ckpt"),
        (Kill(45), "epoch-epoch=1.ckpt"),
        (Kill(53), "step-step=49.ckpt"),
        (Kill(75), "step-step=70.ckpt"),
        (Kill(101), "step-step=98.ckpt"),
        (Kill(111), "epoch-epoch=4.ckpt"),
    ],
    ids=["first attempt", "first undoing", "second attempt", "kept attempt", "poisoned task", "its undoing"],
)
def test_a_run_that_is_killed_and_resumed_ends_the_same(
    callbacks: Watched, kill: Kill, checkpoint: str, ranks: int
) -> None:
    setting = Setting("onecycle", 0, ranks, epochs=1, callbacks=callbacks, seeded_once=True)
    end, saved = kill_and_resume(setting, kill)
    assert saved == checkpoint
    assert [entry["verdict"] for entry in end["callbacks"][0]["record"]] == ["calibration", *["poisoned"] * 3]
    assert differences(_through(setting), end) == []
