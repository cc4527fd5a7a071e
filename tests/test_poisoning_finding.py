"""Real images show what single-task poisoning does, and that detection with rollback gives back what it took.

Half of the task's classes lose their contrast. Blur, which the paper's tables are of, does less in these small streams:
see docs/benchmarks.md.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.poison import Outcome, Outcomes, Run
from benchmarks.poison_streams import DATA, write_part

SEEDS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "cifar100").is_dir(), reason="no CIFAR-100 in ../shared/data"),
]


class Streams:
    """Outcomes of streams on part of CIFAR-100, each trained once for all tests."""

    def __init__(self, folder: Path) -> None:
        self._outcomes = Outcomes(folder)

    def outcomes(self, run: Run, seeds: int = SEEDS) -> list[Outcome]:
        return [self._outcomes.of(run, seed) for seed in range(seeds)]

    def damage(self, learner: str, seeds: int = SEEDS) -> np.ndarray:
        """What the bait changes of the accuracy on the tasks before it, by seed."""
        bait = self.outcomes(Run(learner, "bait", "contrast"), seeds)
        clean = self.outcomes(Run(learner), seeds)
        return np.array([poisoned.before - own.before for poisoned, own in zip(bait, clean, strict=True)])


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Streams:
    return Streams(write_part(tmp_path_factory.mktemp("cifar"), per_class=200))


def test_a_bait_damages_the_tasks_before_it(streams: Streams) -> None:
    damage = streams.damage("LwF")
    assert damage.mean() < -damage.std(ddof=1)
    assert damage.max() < 0


@pytest.mark.parametrize("learner", ["2000 exemplars", "joint"])
def test_the_damage_is_far_smaller_with_exemplars_and_in_joint_training(streams: Streams, learner: str) -> None:
    # of one seed, to save time; all three are in docs/benchmarks.md
    assert abs(streams.damage(learner, seeds=1).item()) < 0.5 * abs(streams.damage("LwF").mean())


def test_detection_with_rollback_gives_back_what_the_other_tasks_lost(streams: Streams) -> None:
    clean = streams.outcomes(Run())
    poisoned = streams.outcomes(Run(attack="bait", corruption="contrast"))
    watched = streams.outcomes(Run(attack="bait", corruption="contrast", detector=True))
    for own, lost, back in zip(clean, poisoned, watched, strict=True):
        assert own.others > lost.others
        assert back.flagged == (3,)
        assert back.others - lost.others >= 0.8 * (own.others - lost.others)
