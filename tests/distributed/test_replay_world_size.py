"""How many processes share the work makes no difference to what is remembered and replayed."""

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.processes import run_ranks
from tests.distributed.replay_runs import ExactNet, NetOfItsRank, Run, dark_replay, replay, run_all

SIZE = 30
SLOTS = ("tasks", "indices", "keys", "labels")
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]

RUNS = {
    "class_balanced": Run(replay(size=SIZE), epochs=2),
    "class_balanced per class": Run(replay(per_class=5)),
    "reservoir": Run(replay(size=SIZE, selection="reservoir")),
    "random": Run(replay(size=SIZE, selection="random")),
    # A trained backbone has other float rounding with every number of ranks, and features that differ in their last
    # bits may be ranked otherwise. So what herding chooses is compared on a backbone without rounding.
    "herding": Run(replay(size=SIZE, selection="herding"), ExactNet),
    "class_balanced online": Run(replay(size=SIZE, start="online")),
    "reservoir online": Run(replay(size=SIZE, selection="reservoir", start="online")),
    "random online": Run(replay(size=SIZE, selection="random", start="online")),
    "herding joint": Run(replay(size=SIZE, selection="herding", mix="joint"), ExactNet, epochs=2),
    "der": Run(dark_replay(size=SIZE, beta=0.0), per_class=24),
    "der online": Run(dark_replay(size=SIZE, start="online"), per_class=24),
    "der batches of 3": Run(dark_replay(size=SIZE, batch_size=3)),
}
RUNS_OF_THEIR_RANK = {
    "class_balanced": Run(replay(size=SIZE), NetOfItsRank, epochs=2),
    "reservoir": Run(replay(size=SIZE, selection="reservoir"), NetOfItsRank),
    "random": Run(replay(size=SIZE, selection="random"), NetOfItsRank),
    "reservoir online": Run(replay(size=SIZE, selection="reservoir", start="online"), NetOfItsRank),
    "der": Run(dark_replay(size=SIZE, beta=0.0), NetOfItsRank, per_class=24),
    "der online": Run(dark_replay(size=SIZE, start="online"), NetOfItsRank, per_class=24),
    "herding": Run(replay(size=SIZE, selection="herding"), NetOfItsRank),
    "der of few": Run(dark_replay(size=10), NetOfItsRank),
}
ENDS: dict[int, dict[Run, list[dict[str, Any]]]] = {}


def _ends(name: str, ranks: int, runs: dict[str, Run] = RUNS) -> list[dict[str, Any]]:
    """Return what each rank saw of a run; all runs share the start of the processes."""
    if ranks not in ENDS:
        ENDS[ranks] = _run([*RUNS.values(), *(RUNS_OF_THEIR_RANK.values() if ranks > 1 else ())], ranks)
    return ENDS[ranks][runs[name]]


def _run(runs: list[Run], ranks: int) -> dict[Run, list[dict[str, Any]]]:
    ends = run_ranks(run_all, ranks, ranks, runs)
    return {run: [end[number] for end in ends] for number, run in enumerate(runs)}


def _steps(ends: list[dict[str, Any]]) -> list[list[tuple[int, int]]]:
    """Return the task and index of each sample that a step replays on any rank."""
    return [sorted(chain(*shares)) for shares in zip(*(end["drawn"] for end in ends), strict=True)]


def _slots(end: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Return what each slot holds, after each task."""
    return [{name: memory[name].tolist() for name in SLOTS} for memory in end["memories"]]


def _logits(end: dict[str, Any]) -> list[Tensor]:
    return [memory["extras"]["logits"] for memory in end["memories"]]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_each_rank_holds_the_memory_of_a_run_on_one(name: str, ranks: int) -> None:
    expected = _slots(_ends(name, 1)[0])
    assert len(expected) == 5
    for end in _ends(name, ranks):
        assert _slots(end) == expected


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_every_step_replays_the_same_samples_on_any_number_of_ranks(name: str, ranks: int) -> None:
    assert _steps(_ends(name, ranks)) == _steps(_ends(name, 1))


@pytest.mark.parametrize("ranks", [1, *RANKS])
@pytest.mark.parametrize("name", [name for name in RUNS if "joint" not in name])
def test_a_step_replays_as_many_samples_as_asked_for_and_none_twice(name: str, ranks: int) -> None:
    ends, steps = _ends(name, ranks), _steps(_ends(name, ranks))
    wanted = [3] * 3 if "batches of 3" in name else [16, 16, 2 * RUNS[name].per_class - 32]
    assert len(steps) == 5 * 3 * RUNS[name].epochs
    for number, drawn in enumerate(steps):
        assert len(set(drawn)) == len(drawn) == min(wanted[number % 3], ends[0]["lengths"][number])
    shares = [[len(drawn) for drawn in step] for step in zip(*(end["drawn"] for end in ends), strict=True)]
    assert all(max(share) - min(share) <= 1 for share in shares)


@pytest.mark.parametrize("ranks", [1, *RANKS])
@pytest.mark.parametrize("name", RUNS)
def test_the_rows_that_are_named_as_replayed_hold_the_samples_drawn(name: str, ranks: int) -> None:
    assert all(end["has_rows_as_drawn"] for end in _ends(name, ranks))


@pytest.mark.parametrize("ranks", [1, *RANKS])
@pytest.mark.parametrize("name", [name for name in RUNS if name != "class_balanced per class"])
def test_the_memory_is_never_above_its_size_and_ends_full(name: str, ranks: int) -> None:
    for end in _ends(name, ranks):
        assert max(end["lengths"]) == SIZE
        assert end["lengths"][-1] == SIZE


@pytest.mark.parametrize("name", ["class_balanced online", "reservoir online", "random online", "der online"])
def test_an_online_memory_grows_and_is_replayed_within_the_first_task(name: str) -> None:
    ends = _ends(name, 2)
    assert ends[0]["lengths"][:3] == [0, 16, 30]
    assert [len(drawn) for drawn in _steps(ends)[:2]] == [0, 16]
    assert {task for task, _ in _steps(ends)[1]} == {0}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["class_balanced", "reservoir", "random", "reservoir online", "der", "der online"])
def test_augmentation_and_dropout_that_differ_between_ranks_do_not_change_the_memory(name: str, ranks: int) -> None:
    # In DyTox each rank kept exemplars of its own, so that all of them together were more than the memory's size.
    plain = _ends(name, 1)
    noisy = _ends(name, ranks, RUNS_OF_THEIR_RANK)
    for end in noisy:
        assert _slots(end) == _slots(plain[0])
    assert _steps(noisy) == _steps(plain)


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_herd_the_same_exemplars_even_where_their_features_differ(ranks: int) -> None:
    ends = _ends("herding", ranks, RUNS_OF_THEIR_RANK)
    for end in ends[1:]:
        assert _slots(end) == _slots(ends[0])
    assert {sample for step in _steps(ends) for sample in step} <= {
        sample for memory in _slots(ends[0]) for sample in zip(memory["tasks"], memory["indices"], strict=True)
    }


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["der", "der online", "der batches of 3"])
def test_ranks_hold_the_same_logits_bit_for_bit(name: str, ranks: int) -> None:
    _assert_same_logits(_ends(name, ranks))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["der", "der online"])
def test_ranks_hold_the_same_logits_even_where_their_networks_answer_differently(name: str, ranks: int) -> None:
    _assert_same_logits(_ends(name, ranks, RUNS_OF_THEIR_RANK))


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_hold_the_same_logits_of_a_task_with_fewer_slots_than_ranks(ranks: int) -> None:
    _assert_same_logits(_ends("der of few", ranks, RUNS_OF_THEIR_RANK))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["der", "der online"])
def test_each_slot_has_the_logits_that_it_has_on_one_rank(name: str, ranks: int) -> None:
    # Weights differ in float rounding between numbers of ranks, and logits with them. Batches of these runs divide by
    # the number of ranks, so that the mean over ranks is the mean over samples.
    for logits, expected in zip(_logits(_ends(name, ranks)[0]), _logits(_ends(name, 1)[0]), strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_loader_workers_that_prefetch_change_nothing_in_memory_and_draws(ranks: int) -> None:
    names = ["class_balanced", "reservoir online", "herding joint", "der online"]
    runs = {name: replace(RUNS[name], workers=2) for name in names}
    ends = _run(list(runs.values()), ranks)
    for name, run in runs.items():
        assert _slots(ends[run][0]) == _slots(_ends(name, ranks)[0])
        assert _steps(ends[run]) == _steps(_ends(name, ranks))
        assert all(end["has_rows_as_drawn"] for end in ends[run])


def _assert_same_logits(ends: list[dict[str, Any]]) -> None:
    for end in ends[1:]:
        for logits, expected in zip(_logits(end), _logits(ends[0]), strict=True):
            assert not expected.isnan().any()
            assert torch.equal(logits, expected)
