"""How many processes share the work makes no difference to a Gaussian head."""

from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted
from tests.distributed.gaussian_runs import Run, WithGaussian, run_all
from tests.distributed.nearest_mean_runs import NoisyNormedNet

RUNS = {
    "shared": Run((("shrinkage", 1e-2),)),
    "full": Run((("covariance", "full"), ("shrinkage", 1e-2), ("flips", True), ("prior", "counts"))),
    "diagonal": Run((("covariance", "diagonal"), ("shrinkage", 1e-2), ("refresh", "epoch"))),
}
# what is drawn follows the last digits of the Gaussians
LINEAR = Run((("classifier", "linear"), ("samples_per_class", 20)))
# batch norm makes nothing of a single sample, so its batches divide by the number of ranks
TRAINED = Run((("refresh", "epoch"),), NoisyNormedNet, 24, "32-true")
# fewer samples of a class than ranks
FEW = {1: Run(per_class=1), 2: Run(per_class=1), 4: Run(per_class=3)}
ENDS: dict[int, dict[Run, list[dict[str, Any]]]] = {}


def _ends(run: Run, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank saw of a run; all runs share the start of the processes."""
    if ranks not in ENDS:
        runs = [*RUNS.values(), LINEAR, FEW[ranks], TRAINED]
        ends = run_ranks(run_all, ranks, ranks, runs)
        ENDS[ranks] = {run: [end[number] for end in ends] for number, run in enumerate(runs)}
    return ENDS[ranks][run]


RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@RANKS
@pytest.mark.parametrize("name", RUNS)
def test_gaussians_are_those_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    assert one["states"][-1]["gaussians"]["counts"].tolist() == [38 if name == "full" else 19] * 10
    for end in _ends(RUNS[name], ranks):
        for state, expected in zip(end["states"], one["states"], strict=True):
            for part in ("classes", "counts", "means", "scatter"):
                own, other = state["gaussians"][part], expected["gaussians"][part]
                torch.testing.assert_close(own, other, atol=1e-8, rtol=1e-8)


@RANKS
@pytest.mark.parametrize("name", RUNS)
def test_scores_are_those_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    assert one["matrix"][-1].mean() > 0.6
    for end in _ends(RUNS[name], ranks):
        for scores, expected in zip(end["scores"], one["scores"], strict=True):
            torch.testing.assert_close(scores, expected, atol=1e-8, rtol=1e-8)


@RANKS
@pytest.mark.parametrize("name", RUNS)
def test_accuracies_are_those_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    for end in _ends(RUNS[name], ranks):
        torch.testing.assert_close(end["matrix"], one["matrix"], atol=1e-6, rtol=0, equal_nan=True)


@RANKS
def test_a_linear_classifier_is_that_of_a_run_on_one(ranks: int) -> None:
    [one] = _ends(LINEAR, 1)
    for end in _ends(LINEAR, ranks):
        torch.testing.assert_close(end["scores"][-1], one["scores"][-1], atol=1e-3, rtol=1e-3)


@RANKS
@pytest.mark.parametrize("run", [*RUNS.values(), LINEAR, FEW, TRAINED], ids=[*RUNS, "linear", "few", "trained"])
def test_ranks_have_the_same_gaussians_and_head_to_the_bit(run: Run | dict[int, Run], ranks: int) -> None:
    first, *others = _ends(run[ranks] if isinstance(run, dict) else run, ranks)
    for end in others:
        for state, expected in zip(end["states"], first["states"], strict=True):
            for part in ("counts", "means", "scatter"):
                assert torch.equal(state["gaussians"][part], expected["gaussians"][part])
            if expected["classifier"] is not None:
                assert torch.equal(state["classifier"]["weight"], expected["classifier"]["weight"])


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_is_left_on_any_rank(ranks: int) -> None:
    assert [end["hooks"] for end in _ends(TRAINED, ranks)] == [0] * ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "kill", "checkpoint"),
    [
        (WithGaussian((("covariance", "full"),)), Kill(52), "step-step=49.ckpt"),
        (WithGaussian((("refresh", "epoch"),)), Kill(23), "epoch-epoch=0.ckpt"),
    ],
    ids=["in an epoch", "at a task's end"],
)
def test_resume_on_two_processes_gives_the_same_end(callbacks: WithGaussian, kill: Kill, checkpoint: str) -> None:
    setting = Setting("onecycle", 0, 2, epochs=1, callbacks=callbacks, seeded_once=True)
    end, saved = kill_and_resume(setting, kill)
    assert saved == checkpoint
    through = uninterrupted(setting)
    assert end["callbacks"][0]["gaussians"]["classes"].tolist() == list(range(10))
    assert differences(through, end) == []
