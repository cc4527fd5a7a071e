"""What the exemplar-free benchmark shows, on one seed of its smaller stream; the others are in docs/benchmarks.md."""

from pathlib import Path

import pytest
import torch

from benchmarks.arrays import write_part
from benchmarks.exemplar_streams import STREAMS, WIDTH, learn
from benchmarks.stream_overhead import DATA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "FashionMNIST").exists(), reason=f"FashionMNIST is not in {DATA}"),
]

WITHOUT = "AdaGauss without the anti-collapse loss"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("fashion")
    stream = STREAMS["fashion"]
    write_part(folder, "fashion", stream.per_class, stream.classes, 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {learner: learn(learner, stream, folder, seed=0) for learner in ("naive", "LwF", "AdaGauss", WITHOUT)}
    torch.set_num_threads(threads)


def last(outcomes, learner, way=""):
    return outcomes[learner]["accuracies"][way][-1]


def test_final_accuracy_orders_naive_lwf_and_ada_gauss(outcomes):
    naive, lwf, ada_gauss = last(outcomes, "naive"), last(outcomes, "LwF"), last(outcomes, "AdaGauss", "full")
    assert naive + 0.05 < lwf
    assert lwf + 0.1 < ada_gauss


def test_adaptation_keeps_old_classes(outcomes):
    none, mean, full = (last(outcomes, "AdaGauss", way) for way in ("none", "mean", "full"))
    assert none + 0.05 < full
    assert none < mean < full


def test_the_callback_answers_with_fully_adapted_gaussians(outcomes):
    assert outcomes["AdaGauss"]["own"] == pytest.approx(outcomes["AdaGauss"]["accuracies"]["full"], abs=1e-6)


def test_the_anti_collapse_loss_keeps_the_rank_of_old_covariances_full(outcomes):
    assert min(outcomes["AdaGauss"]["ranks"]) > WIDTH - 1
    assert max(outcomes[WITHOUT]["ranks"]) < WIDTH / 2


def test_a_class_takes_no_more_than_a_mean_and_a_triangle(outcomes):
    assert outcomes["AdaGauss"]["numbers"] == WIDTH + WIDTH * (WIDTH + 1) // 2
