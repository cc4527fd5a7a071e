"""Real images show what exits do for old tasks: early ones forget less, and the correction of logits helps them."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.exit_regimes import run

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "FashionMNIST").is_dir(), reason="no FashionMNIST in ../shared/data"),
]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run("fashion", DATA, "joint", seed=0, epochs=4)


def test_early_exits_forget_less_of_the_first_task_than_the_last_head(measured: dict[str, Any]) -> None:
    plain = measured["none"]
    *exits, last = (
        before - after for before, after in zip(plain["first task, learnt"], plain["first task"], strict=True)
    )
    assert sum(exits) / len(exits) < last
    assert exits[0] < last


def test_the_correction_raises_accuracy_at_equal_cost(measured: dict[str, Any]) -> None:
    assert measured["tlc"]["0.25"] > measured["none"]["0.25"]
