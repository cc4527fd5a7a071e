"""How many processes share the work makes no difference to what holds a network to its past."""

from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted
from tests.distributed.nearest_mean_runs import NoisyNormedNet
from tests.distributed.regulariser_runs import (
    ConvolvedNet,
    NormedConvolvedNet,
    Run,
    ScheduledConvolvedNet,
    StillNet,
    held,
    run_all,
)

RUNS = {
    "lwf": Run(held("lwf", weight=2.0)),
    "lwm": Run(held("lwm", gamma=3.0), ConvolvedNet),
    "ewc": Run(held("ewc", weight=50.0)),
    "ewc true": Run(held("ewc", weight=50.0, fisher="true")),
    # where ranks have unequal shares of a batch, DDP's mean is not that of one process: so nothing is trained here
    "ewc of uneven shares": Run(held("ewc", weight=50.0), StillNet, per_class=19),
}
NOISY = {
    "lwf": Run(held("lwf"), NoisyNormedNet),
    "ewc": Run(held("ewc", weight=10.0), NoisyNormedNet),
    "lwm": Run(held("lwm"), NormedConvolvedNet),
}
REFUSED = {
    "lwf": Run(held("lwf"), refuse=(1, 1)),
    "ewc": Run(held("ewc", weight=10.0), refuse=(1, 1)),
    "lwm": Run(held("lwm"), ConvolvedNet, refuse=(1, 1)),
}
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]
ENDS: dict[int, dict[Run, list[dict[str, Any]]]] = {}


def _ends(run: Run, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank saw of a run; all runs share the start of the processes."""
    if ranks not in ENDS:
        runs = [*RUNS.values(), *([*NOISY.values(), *REFUSED.values()] if ranks == 2 else [])]
        ends = run_ranks(run_all, ranks, ranks, runs)
        ENDS[ranks] = {run: [end[number] for end in ends] for number, run in enumerate(runs)}
    return ENDS[ranks][run]


def _close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, part in wanted.items():
        torch.testing.assert_close(got[name], part, rtol=1e-3, atol=1e-4 * float(part.abs().max()))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("ewc")])
def test_the_fisher_information_is_that_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    for end in _ends(RUNS[name], ranks):
        _close(end["state"]["importance"], one["state"]["importance"])
        _close(end["state"]["anchor"], one["state"]["anchor"])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["lwf", "lwm"])
def test_the_teacher_is_that_of_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    for end in _ends(RUNS[name], ranks):
        _close(end["state"]["teacher"], one["state"]["teacher"])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_weights_end_as_in_a_run_on_one(name: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    for end in _ends(RUNS[name], ranks):
        _close(end["weights"], one["weights"])


@pytest.mark.parametrize("name", NOISY)
def test_ranks_know_the_same_to_the_bit(name: str) -> None:
    """With batch norm, whose statistics differ between ranks, and dropout."""
    first, second = _ends(NOISY[name], 2)
    assert differences(first["state"], second["state"]) == []


@pytest.mark.parametrize("name", NOISY)
def test_each_rank_keeps_its_own_statistics(name: str) -> None:
    first, second = _ends(NOISY[name], 2)
    means = "layer.2.running_mean"
    assert not torch.equal(first["weights"][means], second["weights"][means])


@pytest.mark.parametrize("name", REFUSED)
def test_a_veto_of_one_rank_undoes_it_on_all(name: str) -> None:
    for end in _ends(REFUSED[name], 2):
        assert end["undone"] == [True]
        assert end["state"]["classes"] == [0, 1, 4, 5, 6, 7, 8, 9]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": held("lwf")},
        {"callbacks": held("ewc", weight=10.0)},
        {"callbacks": held("lwm"), "net": ScheduledConvolvedNet},
    ],
    ids=["lwf", "ewc", "lwm"],
)
def test_resume_on_two_processes_gives_the_same_end(options: dict[str, Any]) -> None:
    setting = Setting("onecycle", 0, 2, epochs=1, **options)
    end, saved = kill_and_resume(setting, Kill(52))
    assert saved == "step-step=49.ckpt"
    assert differences(uninterrupted(setting), end) == []
