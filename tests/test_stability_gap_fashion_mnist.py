"""Real images show what the nearest-mean paper found: its head is steadier, and better where the memory is small."""

from pathlib import Path

import pytest

from benchmarks.stability_gap import compare_heads

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "FashionMNIST").is_dir(), reason="no FashionMNIST in ../shared/data"),
]


@pytest.mark.parametrize("exemplars", [2000, 200])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_nearest_mean_head_is_steadier_than_the_linear_one(exemplars: int, seed: int) -> None:
    heads = compare_heads(str(DATA), exemplars, seed)
    nearest_mean, linear = heads["nearest mean"], heads["linear"]
    assert nearest_mean["gap"] <= 0.5 * linear["gap"]
    assert nearest_mean["task_recency_bias"] < linear["task_recency_bias"]
    if exemplars == 200:
        assert nearest_mean["accuracy"] >= linear["accuracy"]
