"""Measure what one poisoned task does to the others, what the detector gives back, and what it costs.

    python benchmarks/poison.py damage recovery
    python benchmarks/poison.py cost

Single-task poisoning (arXiv 2507.04106) of task 3 of the stream of `poison_streams.py`. Accuracy on the test set over
all 40 classes, of the network as the stream leaves it; mean and standard deviation over the seeds, differences to the
clean run of the same seed. ``cost`` times training and the detector in one run, one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn

from benchmarks.poison_streams import (
    CLASSES,
    CLASSES_PER_TASK,
    EPOCHS,
    MEAN,
    STD,
    Classifier,
    ConvNet,
    part_of_cifar,
    spread,
    write_part,
)
from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import LearningWithoutForgetting, PoisonDetector, Replay
from lightning_cl.datamodules import ClassIncremental, Joint, PoisonedTask
from lightning_cl.models import build_backbone
from lightning_cl.tasks import ContinualCallback, Task, TaskClock, rollback

TASK = 3
ATTACKS = (("bait", "contrast"), ("bait", "gaussian_blur"))
LEARNERS = ("LwF", "2000 exemplars", "joint")


class Outcome(NamedTuple):
    """What a stream left behind.

    Args:
        before: Mean accuracy on the tasks before the poisoned one.
        poisoned: Accuracy on that task.
        after: Mean accuracy on the tasks after it.
        flagged: The tasks that the detector undid.
    """

    before: float
    poisoned: float
    after: float
    flagged: tuple[int, ...] = ()

    @property
    def others(self) -> float:
        """Mean accuracy on all tasks but the poisoned one."""
        return (TASK * self.before + (len(CLASSES_PER_TASK) - TASK - 1) * self.after) / (len(CLASSES_PER_TASK) - 1)


class Run(NamedTuple):
    """One training of the stream.

    Args:
        learner: "LwF", "2000 exemplars" (fine-tuning with replay) or "joint" (all classes at once).
        attack: "clean", "base" or "bait".
        corruption: Of the images.
        detector: Whether a `PoisonDetector` watches, with a margin of 1.25.
    """

    learner: str = "LwF"
    attack: str = "clean"
    corruption: str = "gaussian_blur"
    detector: bool = False

    def outcome(self, folder: Path, seed: int) -> Outcome:
        """Train, and measure."""
        seed_everything(seed, verbose=False)
        stream: Any = self._stream(folder, seed)
        detector = PoisonDetector(margin=1.25)
        callbacks: list[Any] = [detector] if self.detector else []
        if self.learner != "joint":
            lwf = LearningWithoutForgetting(weight=10)
            callbacks.append(lwf if self.learner == "LwF" else Replay(size=2000, seed=seed))
        module = ConvNet()
        quiet_trainer(callbacks=callbacks, max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=stream)
        undone = tuple(entry["task"] for entry in detector.record if entry["verdict"] == "poisoned")
        order = [task.classes for task in self._tasks(folder, seed).tasks]
        by_class = class_accuracies(module, folder)
        accuracies = [float(by_class[list(classes)].mean()) for classes in order]
        return Outcome(
            statistics.mean(accuracies[:TASK]), accuracies[TASK], statistics.mean(accuracies[TASK + 1 :]), undone
        )

    def _tasks(self, folder: Path, seed: int) -> ClassIncremental:
        return ClassIncremental(
            part_of_cifar(folder),
            classes_per_task=CLASSES_PER_TASK,
            class_order=seed,
            epochs_per_task=EPOCHS,
            seed=seed,
        )

    def _stream(self, folder: Path, seed: int) -> Any:
        tasks = self._tasks(folder, seed)
        poisoned = (
            None if self.attack == "clean" else PoisonedTask(tasks, TASK, self.attack, self.corruption, seed=seed)
        )
        if self.learner != "joint":
            return poisoned or tasks
        joint = Joint(part_of_cifar(folder), epochs_per_task=EPOCHS[0], seed=seed)
        if poisoned is None:
            return joint
        poisoned.setup("fit")
        return PoisonedTask(joint, 0, "base", self.corruption, classes=list(poisoned.poisoned_classes()), seed=seed)


@torch.no_grad()
def class_accuracies(module: nn.Module, folder: Path) -> np.ndarray:
    """Return the accuracy on the test images of each class, over all classes."""
    test = np.load(folder / "test.npz")
    images = torch.from_numpy(test["images"]).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    predicted = torch.cat([module.eval()(part).argmax(1) for part in images.split(500)]).numpy()
    return np.array([(predicted[test["labels"] == label] == label).mean() for label in range(CLASSES)])


class Outcomes:
    """Outcomes of runs, each trained at most once.

    Args:
        folder: Where the data are.
        save: A file that keeps them.
    """

    def __init__(self, folder: Path, save: Path | None = None) -> None:
        self._folder = folder
        self._save = save
        self._known: dict[tuple[Run, int], Outcome] = {}

    def load(self, path: Path) -> None:
        """Take in what such a file kept."""
        self._known.update({(Run(*run), seed): Outcome(*rest) for run, seed, rest in json.loads(path.read_text())})

    def of(self, run: Run, seed: int) -> Outcome:
        """Return the outcome of a run; a clean one does not depend on the corruption."""
        run = run._replace(corruption="none") if run.attack == "clean" else run
        if (run, seed) not in self._known:
            self._known[run, seed] = run.outcome(self._folder, seed)
            if self._save is not None:
                self._save.write_text(json.dumps([[*key, outcome] for key, outcome in self._known.items()]))
        return self._known[run, seed]


def damage(outcomes: Outcomes, seeds: int, learners: Sequence[str] = LEARNERS) -> None:
    """Print what the attacks change, by learner."""
    rows = []
    for learner in learners:
        attacks = ATTACKS if learner == "LwF" else ATTACKS[:1]
        rows += [Run(learner), *(Run(learner, *attack) for attack in attacks)]
    print("\n| learner | attack | task 3 | before | after |\n|---|---|---|---|---|")
    for run in rows:
        pairs = [(outcomes.of(run, seed), outcomes.of(Run(run.learner), seed)) for seed in range(seeds)]
        cells = []
        for part in ("poisoned", "before", "after"):
            values = [getattr(own, part) for own, _ in pairs]
            changes = [getattr(own, part) - getattr(clean, part) for own, clean in pairs]
            cells.append(spread(values) + (f" ({spread(changes, sign=True)})" if run.attack != "clean" else ""))
        name = run.attack if run.attack == "clean" else f"{run.attack}, {run.corruption}"
        print(f"| {run.learner} | {name} | {' | '.join(cells)} |", flush=True)


def recovery(outcomes: Outcomes, seeds: int) -> None:
    """Print what detection and rollback give back of the accuracy on the other tasks."""
    print("\n| attack | seed | undone | clean | poisoned | with detector | given back |\n|---|---|---|---|---|---|---|")
    for attack, corruption in ATTACKS:
        for seed in range(seeds):
            clean, poisoned, undone = (
                outcomes.of(Run("LwF", a, corruption, d), seed)
                for a, d in (("clean", False), (attack, False), (attack, True))
            )
            lost = clean.others - poisoned.others
            back = f"{(undone.others - poisoned.others) / lost:.0%}" if lost > 0 else "nothing was lost"
            figures = " | ".join(f"{100 * outcome.others:.1f}" for outcome in (clean, poisoned, undone))
            tasks = ", ".join(map(str, undone.flagged)) or "none"
            print(f"| {attack}, {corruption} | {seed} | {tasks} | {figures} | {back} |", flush=True)


class Meter(ContinualCallback):
    """Time the tasks, and copying and going back."""

    wants_rollback = True

    def __init__(self) -> None:
        self.tasks: list[float] = []
        self.copies: list[float] = []
        self.returns: list[float] = []

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        clock = TaskClock.of(trainer)
        assert clock is not None
        for _ in range(5):
            started = time.perf_counter()
            copy, parts = rollback.take_copy(trainer, keep=clock), rollback.Parts.of(trainer, pl_module)
            copied = time.perf_counter()
            rollback.go_back(trainer, pl_module, copy, keep=clock, parts=parts, renews_optimizers=True)
            self.copies.append(copied - started)
            self.returns.append(time.perf_counter() - copied)
        self.bytes = size_of(copy) / size_of(pl_module.state_dict())
        self._started = time.process_time()

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.tasks.append(time.process_time() - self._started)


class TimedDetector(PoisonDetector):
    """Times itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds: dict[int, float] = {}

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        started = time.process_time()
        super().on_task_start(trainer, pl_module, task)
        self.seconds[task.index] = time.process_time() - started

    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        started = time.process_time()
        accepted = super().accept_task(trainer, pl_module, task)
        self.seconds[task.index] += time.process_time() - started
        return accepted


def size_of(value: Any) -> int:
    """Return the bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0


def cost(folder: Path, per_class: int = 500) -> None:
    """Print the detector's CPU time beside the task's training, and time and memory of undoing one.

    Args:
        folder: An empty one.
        per_class: Training images of each of the four classes of a task.
    """
    write_part(folder, per_class)
    print("\n| network | `samples` | detector / training of a task | copy, ms | going back, ms | copy / weights |")
    print("|---|---|---|---|---|---|")
    networks = {"convnet": ConvNet(32), "resnet32": Classifier(build_backbone("resnet32", CLASSES, (3, 32, 32)))}
    for (name, module), samples in product(networks.items(), (500, 1000)):
        seed_everything(0, verbose=False)
        data = ClassIncremental(part_of_cifar(folder), classes_per_task=[4] * 4, epochs_per_task=EPOCHS[-1], seed=0)
        meter, detector = Meter(), TimedDetector(threshold=89.9, samples=samples)
        quiet_trainer(callbacks=[meter, detector], max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=data)
        # callbacks hear of tasks in the order of their names: all that the detector does lies within the meter's time
        shares = [own / (meter.tasks[task] - own) for task, own in detector.seconds.items() if task > 0]
        share, *seconds = (statistics.median(values) for values in (shares, meter.copies, meter.returns))
        copied, back = (f"{1000 * value:.0f}" for value in seconds)
        print(f"| {name} | {samples} | {share:.1%} | {copied} | {back} | {meter.bytes:.1f} |", flush=True)


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["damage", "recovery", "cost"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-class", type=int, default=200, help="training images of each class")
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=LEARNERS, help="for damage")
    parser.add_argument("--save", type=Path, help="where to keep the outcomes, as JSON")
    parser.add_argument("--load", type=Path, nargs="*", default=[], help="such files, not to train again")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outcomes = Outcomes(write_part(folder, arguments.per_class), arguments.save)
        for path in arguments.load:
            outcomes.load(path)
        for part in arguments.parts:
            if part == "cost":
                (folder / "cost").mkdir()
                cost(folder / "cost")
            elif part == "damage":
                damage(outcomes, arguments.seeds, arguments.learners)
            else:
                recovery(outcomes, arguments.seeds)


if __name__ == "__main__":
    main()
