"""How many processes share the work makes no difference to what is learnt."""

from itertools import chain
from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from tests.distributed.runs import run_stream

GLOBAL_BATCH = 16
RUNS: dict[tuple[int, int], list[dict[str, Any]]] = {}


def _run(ranks: int, per_class: int) -> list[dict[str, Any]]:
    if (ranks, per_class) not in RUNS:
        RUNS[ranks, per_class] = run_ranks(run_stream, ranks, ranks, GLOBAL_BATCH, per_class)
    return RUNS[ranks, per_class]


def _steps(ends: list[dict[str, Any]]) -> list[list[int]]:
    """Return the sample ids of each step over all ranks."""
    return [list(chain(*shares)) for shares in zip(*(end["ids"] for end in ends), strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("per_class", [64, 63])
def test_every_step_sees_the_same_samples_on_any_number_of_ranks(ranks: int, per_class: int) -> None:
    assert _steps(_run(ranks, per_class)) == _steps(_run(1, per_class))


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_agree_where_tasks_divide_by_the_global_batch(ranks: int) -> None:
    one, many = _run(1, 64)[0]["weights"], _run(ranks, 64)[0]["weights"]
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_accuracy_matrix_is_the_same_on_all_ranks_and_counts_every_sample_once(ranks: int) -> None:
    one = _run(1, 64)[0]["matrix"]
    for end in _run(ranks, 64):
        torch.testing.assert_close(end["matrix"], one, atol=0.05, rtol=0, equal_nan=True)
        assert torch.equal(end["matrix"].nan_to_num(), _run(ranks, 64)[0]["matrix"].nan_to_num())


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_short_last_batch_is_shared_out_evenly_and_nothing_is_seen_twice(ranks: int) -> None:
    # 126 samples a task: seven batches of 16 and a rest of 14
    ends = _run(ranks, 63)
    last = [len(end["ids"][7]) for end in ends]
    assert sum(last) == 14
    assert max(last) - min(last) <= 1
    epoch = list(chain(*_steps(ends)[:8]))
    assert sorted(epoch) == list(range(126))


def test_a_rest_smaller_than_the_number_of_ranks_joins_the_batch_before_it() -> None:
    # 114 samples a task: seven batches of 16 and a rest of 2, too few for four ranks
    ends = _run(4, 57)
    assert [len(end["ids"][6]) for end in ends] == [5, 5, 4, 4]
    assert sorted(chain(*_steps(ends)[:7])) == list(range(114))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_veto_of_one_rank_undoes_the_task_on_all(rank: int) -> None:
    ends = run_ranks(run_stream, 2, 2, GLOBAL_BATCH, 64, "ddp", (2, rank))
    assert [end["undone"] for end in ends] == [[True], [True]]
    for name, value in ends[0]["weights"].items():
        assert torch.equal(ends[1]["weights"][name], value)


@pytest.mark.slow
def test_ddp_spawn_trains_as_ddp_does() -> None:
    # the launcher starts the two processes itself and gives the weights back to this one
    spawned = run_ranks(run_spawning_stream, 1)[0]
    for name, value in _run(2, 64)[0]["weights"].items():
        assert torch.equal(spawned[name], value)


def run_spawning_stream() -> dict[str, Any]:
    """Run the stream with the launcher that spawns its processes."""
    weights: dict[str, Any] = run_stream(2, GLOBAL_BATCH, 64, "ddp_spawn")["weights"]
    return weights
