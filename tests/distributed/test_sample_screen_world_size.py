"""However many processes share the work, the same samples are screened, and none of them changes the run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.processes import run_ranks
from benchmarks.resume import differences
from tests.distributed.sample_screen_runs import run_all

SAMPLES = [None, 1, 0]  # of a task: all, fewer than there are ranks, none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def on_one(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(run_all, 1, 1, str(folder), SAMPLES)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def on_two(folder: Path) -> list[list[dict[str, Any]]]:
    return run_ranks(run_all, 2, 2, str(folder), SAMPLES)


def _by_sample(ranking: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    indices, scores = ranking
    return scores[indices.argsort()]


@pytest.mark.parametrize("run", [0, 1], ids=["all", "fewer than ranks"])
def test_samples_are_scored_as_on_one_rank(
    run: int, on_one: list[dict[str, Any]], on_two: list[list[dict[str, Any]]]
) -> None:
    expected = on_one[run]["rankings"]
    assert list(expected) == [1, 2]
    for end in on_two:
        for task, ranking in end[run]["rankings"].items():
            assert sorted(ranking[0].tolist()) == sorted(expected[task][0].tolist())
            # up to the rounding of outputs to half precision
            torch.testing.assert_close(_by_sample(ranking), _by_sample(expected[task]), atol=0.1, rtol=0.05)
    assert differences(on_two[0][run]["rankings"], on_two[1][run]["rankings"]) == []


def test_screening_changes_no_bit_of_the_run_on_two_ranks(on_two: list[list[dict[str, Any]]]) -> None:
    for end in on_two:
        assert differences(end[0]["weights"], end[2]["weights"]) == []


def test_the_files_are_those_of_one_rank(folder: Path, on_one: object, on_two: object) -> None:
    names = [sorted(path.name for path in (folder / f"{ranks}-None").glob("suspicious*")) for ranks in (1, 2)]
    assert names[0] == names[1]
    assert {Path(name).suffix for name in names[0]} == {".csv", ".png"}
    rows = [(folder / f"{ranks}-None" / "suspicious_task_1.csv").read_text().splitlines() for ranks in (1, 2)]
    assert len(rows[0]) == len(rows[1]) == 33
