"""How many processes share the work makes no difference to AdaGauss and its pieces."""

from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted
from tests.distributed.ada_gauss_runs import NarrowNoisy, Quick, Run, Still, run_all

RUNS = {
    "AdaGauss": Run("ada_gauss"),
    "warm-up": Run("ada_gauss", (("warmup", 1.0), ("refresh", "epoch"))),
    "anti-collapse": Run("spread", (("weight", 2.0),)),
    "sum": Run("projected", (("weight", 1.0), ("expansion", 4), ("reduction", "sum"))),
    # where ranks have unequal shares of a batch, DDP's mean is not that of one process: so nothing is trained here
    "uneven shares": Run("ada_gauss", (), Still, per_class=19),
}
NOISY = Run("ada_gauss", (("refresh", "epoch"),), NarrowNoisy)
REFUSED = Run("ada_gauss", (), refuse=(1, 1))
ENDS: dict[int, list[list[dict[str, Any]]]] = {}


def _ends(run: Run | None, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank saw of a run, or of the adapter alone; all runs share the start of the processes."""
    runs = [*RUNS.values(), *([NOISY, REFUSED] if ranks == 2 else [])]
    if ranks not in ENDS:
        ENDS[ranks] = run_ranks(run_all, ranks, ranks, runs)
    return [end[-1 if run is None else runs.index(run)] for end in ENDS[ranks]]


def _assert_close(got: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for name, part in wanted.items():
            _assert_close(got[name], part)
    elif isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted)
    else:
        assert got == wanted


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["weights", "state"])
@pytest.mark.parametrize("name", RUNS)
def test_the_end_is_that_of_a_run_on_one(name: str, part: str, ranks: int) -> None:
    [one] = _ends(RUNS[name], 1)
    for end in _ends(RUNS[name], ranks):
        _assert_close(end[part], one[part])


def test_the_anti_collapse_loss_is_that_of_the_whole_batch() -> None:
    """A half of it has three samples more than there are features, and another spread."""
    [one] = _ends(RUNS["anti-collapse"], 1)
    for end in _ends(RUNS["anti-collapse"], 2):
        assert end["terms"] == pytest.approx(one["terms"], rel=1e-3)


def test_ranks_have_the_same_to_the_bit() -> None:
    first, second = _ends(RUNS["AdaGauss"], 2)
    assert differences(first["state"], second["state"]) == []
    assert differences(first["weights"], second["weights"]) == []


def test_ranks_know_the_same_to_the_bit_where_their_networks_differ() -> None:
    """With batch norm, whose statistics differ between ranks, and dropout."""
    first, second = _ends(NOISY, 2)
    assert differences(first["state"], second["state"]) == []
    means = "layer.2.0.running_mean"
    assert not torch.equal(first["weights"][means], second["weights"][means])


def test_a_veto_of_one_rank_undoes_a_task_on_all() -> None:
    first, second = _ends(REFUSED, 2)
    assert differences(first["state"], second["state"]) == []
    assert first["state"]["gaussians"]["classes"].tolist() == [0, 1, 4, 5, 6, 7, 8, 9]


def test_an_adapter_is_the_same_on_every_rank_and_that_of_one() -> None:
    [one] = _ends(None, 1)
    first, second = _ends(None, 2)
    assert differences(first["weights"], second["weights"]) == []
    for name, weights in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weights, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_resume_on_two_processes_gives_the_same_end() -> None:
    setting = Setting("onecycle", 0, 2, epochs=1, callbacks=Quick())
    end, saved = kill_and_resume(setting, Kill(52))
    assert saved == "step-step=49.ckpt"
    assert differences(uninterrupted(setting), end) == []
