"""How many processes share the work makes no difference to the nearest-mean head."""

from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted
from tests.distributed.nearest_mean_runs import NoisyNormedNet, Run, WithHead, run_all, with_head
from tests.distributed.replay_runs import NetOfItsRank
from tests.distributed.runs import Net

RUNS = {
    "memory+current": Run(with_head()),
    "memory": Run(with_head(prototypes="memory")),
    "all": Run(with_head(size=None, prototypes="all")),
    "plain means": Run(with_head(normalize=False)),
}
TRAINED = Run(with_head(), Net, 24)
# batch norm makes nothing of a single sample, so its batches divide by the number of ranks
OF_THEIR_RANK = {
    "augmented": Run(with_head(), NetOfItsRank),
    "batch norm": Run(with_head(refresh=2), NoisyNormedNet, 24),
}
SELDOM = Run(with_head(refresh="task"), NoisyNormedNet, 24)
FEW = Run(with_head(size=10, prototypes="memory"))
ENDS: dict[int, dict[Run, list[dict[str, Any]]]] = {}


def _ends(run: Run, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank saw of a run; all runs share the start of the processes."""
    if ranks not in ENDS:
        runs = [*RUNS.values(), TRAINED, *([*OF_THEIR_RANK.values(), SELDOM] if ranks == 2 else [])]
        ends = run_ranks(run_all, ranks, ranks, runs)
        ENDS[ranks] = {run: [end[number] for end in ends] for number, run in enumerate(runs)}
    return ENDS[ranks][run]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RUNS)
def test_prototypes_are_those_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    assert len(one["heads"]) == 5
    for end in _ends(RUNS[name], ranks):
        for head, expected in zip(end["heads"], one["heads"], strict=True):
            assert torch.equal(head["known"], expected["known"])
            torch.testing.assert_close(head["prototypes"], expected["prototypes"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RUNS)
def test_predictions_are_those_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    assert len(set(one["predictions"][-1])) > 5
    for end in _ends(RUNS[name], ranks):
        assert end["predictions"] == one["predictions"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RUNS)
def test_accuracies_are_those_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    for end in _ends(RUNS[name], ranks):
        torch.testing.assert_close(end["matrix"], one["matrix"], atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_where_all_layers_are_trained_prototypes_follow_the_weights(ranks: int) -> None:
    # weights differ in float rounding between numbers of ranks
    [one] = _ends(TRAINED, 1)
    for head, expected in zip(_ends(TRAINED, ranks)[0]["heads"], one["heads"], strict=True):
        torch.testing.assert_close(head["prototypes"], expected["prototypes"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("run", "ranks"),
    [
        *((run, 2) for run in (*RUNS.values(), TRAINED)),
        *(pytest.param(run, 4, marks=pytest.mark.slow) for run in (*RUNS.values(), TRAINED)),
        *((r, 2) for r in OF_THEIR_RANK.values()),
    ],
)
def test_ranks_have_the_same_head_to_the_bit(run: Run, ranks: int) -> None:
    ends = _ends(run, ranks)
    for end in ends[1:]:
        for head, expected in zip(end["heads"], ends[0]["heads"], strict=True):
            assert torch.equal(head["prototypes"], expected["prototypes"])
            assert torch.equal(head["known"], expected["known"])


def test_training_on_two_ranks_does_not_depend_on_the_head_being_refreshed() -> None:
    """With batch norm and dropout: a refresh puts back each rank's own buffers and random state."""
    often, seldom = _ends(OF_THEIR_RANK["batch norm"], 2), _ends(SELDOM, 2)
    for first, second in zip(often, seldom, strict=True):
        for name, value in first["weights"].items():
            assert torch.equal(value, second["weights"][name]), name
    means = "layer.2.running_mean"
    assert not torch.equal(often[0]["weights"][means], often[1]["weights"][means])


def test_fewer_exemplars_of_a_task_than_ranks_are_enough() -> None:
    ends = {ranks: run_ranks(run_all, ranks, ranks, [FEW], timeout=20) for ranks in (1, 4)}
    [[one]] = ends[1]
    for [end] in ends[4]:
        for head, expected in zip(end["heads"], one["heads"], strict=True):
            torch.testing.assert_close(head["prototypes"], expected["prototypes"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_is_left_on_any_rank(ranks: int) -> None:
    assert [end["hooks"] for end in _ends(TRAINED, ranks)] == [0] * ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "kill", "checkpoint"),
    [
        (with_head(size=100), Kill(52), "step-step=49.ckpt"),
        (with_head(size=None, refresh=5), Kill(23), "epoch-epoch=0.ckpt"),
    ],
    ids=["in an epoch", "at a task's end"],
)
def test_resume_on_two_processes_gives_the_same_end_and_head(callbacks: WithHead, kill: Kill, checkpoint: str) -> None:
    setting = Setting("onecycle", 0, 2, epochs=1, callbacks=callbacks, seeded_once=True)
    end, saved = kill_and_resume(setting, kill)
    assert saved == checkpoint
    through = uninterrupted(setting)
    for state in (*end["callbacks"][1:], *through["callbacks"][1:]):
        del state["store"]["folder"]
    assert end["callbacks"][0]["classifier"]["known"].all()
    assert differences(through, end) == []
