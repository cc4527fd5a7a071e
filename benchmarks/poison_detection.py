"""Measure how well poisoned tasks are told from clean ones, and what else raises the alarm (arXiv 2507.04106).

    python benchmarks/poison_detection.py

LwF on the stream of `poison_streams.py`. In each seed every task from the third on is trained three times from the same
state: all its classes poisoned (base), half of them (bait), and clean; the first two times are undone. The second task
is trained five times, in other orders, for the calibration. Seeds take turns with the corruptions. Then streams without
poison, one of whose tasks is unlike the others.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from benchmarks.poison_streams import CLASSES_PER_TASK, EPOCHS, ConvNet, part_of_cifar, write_part
from benchmarks.quiet import quiet_trainer, silence
from lightning_cl.callbacks import LearningWithoutForgetting, PoisonDetector
from lightning_cl.datamodules import ClassIncremental, PoisonedTask, Rotate
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.metrics.poisoning import AGGREGATES, DetectionScores, clean_limit, detection_scores, shift_slope
from lightning_cl.tasks import ContinualCallback, Task, TaskClock, TaskDataset
from lightning_cl.tasks.layer_shift import LayerStates, shifts_between
from lightning_cl.tasks.loader import InputTransform

CORRUPTIONS = ("gaussian_blur", "contrast")
NORMS = ("model.0.1", "model.1.1", "model.2.1")
OTHERS = ("model.0.0", "model.1.0", "model.2.0", "model.4", "model.6")
FIGURES = ("ACC", "CLEAN", "ATTACK", "F1", "F1 at 45:20")
RUNS = 5
CALIBRATE = 1
Shifts = dict[str, float]


class Variants(ClassIncremental):
    """Hand out the data of another sequence for the current task while there is one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.variant: TaskSequence | None = None

    def task_data(self, task: int, split: Any) -> TaskDataset | None:
        if self.variant is not None and task == self.current_task.index:
            return self.variant.task_data(task, split)
        return super().task_data(task, split)


class Trials(ContinualCallback):
    """Train each task several times from one state, and keep how far the layers moved each time."""

    wants_rollback = True

    def __init__(self, data: Variants, poisoned: dict[int, dict[str, TaskSequence]]) -> None:
        self.data = data
        self.poisoned = poisoned
        self.shifts: dict[int, dict[str, list[Shifts]]] = {}
        self._layers = LayerStates([*NORMS, *OTHERS], "activation", PoisonDetector().samples)
        self._left: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers.check(trainer, pl_module, self.data)

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._before = self._layers.take(trainer, pl_module, self.data, task)

    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        shifts = shifts_between(self._before, self._layers.take(trainer, pl_module, self.data, task))
        of_task = self.shifts.setdefault(task.index, {})
        clock = TaskClock.of(trainer)
        assert clock is not None
        if task.index == CALIBRATE:
            runs = of_task.setdefault("clean", [])
            if len(runs) < RUNS:
                runs.append(shifts)
                clock.repeat_task(len(runs) % RUNS)
                return False
        else:
            of_task.setdefault(self._left[0] if self._left else "clean", []).append(shifts)
            if self._left:
                self._left.pop(0)
                self.data.variant = self.poisoned[task.index][self._left[0]] if self._left else None
                clock.repeat_task(0)
                return False
        return True

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        upcoming = self.poisoned.get(task.index + 1, {})
        self._left = list(upcoming)
        self.data.variant = upcoming[self._left[0]] if upcoming else None


class Rotated(ClassIncremental):
    """The same tasks in another domain: all images turned by 90 degrees."""

    def task_data(self, task: int, split: Any) -> TaskDataset | None:
        return self.base_of(task).task_dataset(
            split, super().task_data(task, split).indices, transform=InputTransform(Rotate(90), self.structure)
        )


def run_stream(
    folder: Path,
    seed: int,
    sizes: Sequence[int] = CLASSES_PER_TASK,
    epochs: Sequence[int] = EPOCHS,
    poison: str | None = None,
    rotated: int | None = None,
) -> dict[int, dict[str, list[Shifts]]]:
    """Train a stream, and return the shifts of all layers by task and kind."""
    seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"classes_per_task": list(sizes), "class_order": seed, "seed": seed}
    data = Variants(part_of_cifar(folder), epochs_per_task=list(epochs), **options)
    others: dict[int, dict[str, TaskSequence]] = {}
    if poison is not None:
        for task in range(CALIBRATE + 1, len(sizes)):
            for attack in ("base", "bait"):
                clean = ClassIncremental(part_of_cifar(folder), **options)
                poisoned = PoisonedTask(clean, task, attack, poison, seed=seed)
                poisoned.setup("fit")
                others.setdefault(task, {})[attack] = poisoned.sequence
    if rotated is not None:
        turned = Rotated(part_of_cifar(folder), **options)
        turned.setup("fit")
        others[rotated] = {"rotated": turned}
    trials = Trials(data, others)
    lwf = LearningWithoutForgetting(weight=10)
    trainer = quiet_trainer(callbacks=[lwf, trials], max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(ConvNet(), datamodule=data)
    return trials.shifts


def slope_of(shifts: Shifts, layers: str = "norms") -> float:
    """Return the statistic of the detector as a slope, of the norms, as it chooses by itself, or of all layers."""
    chosen = [shift for name, shift in shifts.items() if layers == "all" or name in NORMS]
    return float(shift_slope(torch.tensor(chosen, dtype=torch.float64)))


def angle_of(shifts: Shifts, layers: str) -> float:
    """Return the angle in degrees."""
    return float(np.degrees(np.arctan(slope_of(shifts, layers))))


def print_detection(seeds: dict[int, dict[int, dict[str, list[Shifts]]]]) -> None:
    """Print the table of the paper: how well each way to a threshold tells poisoned tasks from clean ones."""
    counts = {kind: sum(kind in tasks for s in seeds.values() for tasks in s.values()) for kind in ("base", "bait")}
    clean = sum(task > CALIBRATE for s in seeds.values() for task in s)
    print(f"\n{clean} clean tasks, {counts['base']} base, {counts['bait']} bait, {len(seeds)} seeds")
    columns = [f"{attack}: {figure}" for attack in ("base", "bait") for figure in FIGURES]
    print(f"\n| layers | threshold | trainings | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}")
    ways: list[tuple[str, str, float]] = [("repeats", aggregate, 1.0) for aggregate in AGGREGATES]
    ways += [("repeats", "p90", 1.25), ("history", "max", 1.0), ("history", "max", 1.25)]
    for layers, (way, aggregate, margin) in product(("norms", "all"), ways):
        cells = []
        for attack in ("base", "bait"):
            flagged, poisoned = judge(seeds, attack, way, aggregate, margin, layers)
            scores = detection_scores(torch.tensor(flagged), torch.tensor(poisoned))
            cells += [f"{100 * value:.1f}" for value in scores[:3]] + [f"{scores.f1:.2f}", f"{f1_at(scores):.2f}"]
        name = f"{way}: {aggregate}" + (f", margin {margin}" if margin != 1 else "")
        print(f"| {layers} | {name} | {RUNS + 1 if way == 'repeats' else 1} | {' | '.join(cells)} |")


def f1_at(scores: DetectionScores, clean: int = 45, poisoned: int = 20) -> float:
    """Return the F1 of these rates among the paper's tasks: where few are poisoned, false alarms weigh more."""
    hits, alarms = scores.true_positive_rate * poisoned, (1 - scores.true_negative_rate) * clean
    return 2 * hits / (hits + poisoned + alarms)


def judge(
    seeds: dict[int, dict[int, dict[str, list[Shifts]]]],
    attack: str,
    way: str,
    aggregate: Any,
    margin: float,
    layers: str,
) -> tuple[list[bool], list[bool]]:
    """Judge every clean and every poisoned task as the detector does."""
    flagged, poisoned = [], []
    for tasks in seeds.values():
        runs = [angle_of(shifts, layers) for shifts in tasks[CALIBRATE]["clean"]]
        known = runs if way == "repeats" else runs[:1]
        for task in sorted(task for task in tasks if task > CALIBRATE):
            limit = clean_limit(known, "angle", aggregate, margin)
            assert limit is not None
            own = angle_of(tasks[task]["clean"][0], layers)
            for kind in ("clean", attack):
                if kind in tasks[task]:
                    flagged.append(not angle_of(tasks[task][kind][0], layers) <= limit)
                    poisoned.append(kind != "clean")
            if way == "history" and own <= limit:
                known = [*known, own]
    return flagged, poisoned


def print_alarms(shifts: dict[str, list[tuple[float, list[float]]]]) -> None:
    """Print how often tasks that are unlike the others, and not poisoned, are flagged, and what would keep them."""
    print("\n| the task | streams | flagged | margin that keeps all |\n|---|---|---|---|")
    for name, streams in shifts.items():
        ratios = [value / limit for limit, values in streams for value in values]
        print(f"| {name} | {len(streams)} | {np.mean(np.array(ratios) > 1):.0%} | {max(ratios):.2f} |")


def main() -> None:
    """Run the streams and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--alarm-seeds", type=int, default=2)
    parser.add_argument("--per-class", type=int, default=200, help="training images of each class")
    parser.add_argument("--save", type=Path, help="where to keep what was measured, as JSON")
    parser.add_argument("--load", type=Path, nargs="*", default=[], help="such files, instead of training")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    measured: dict[str, dict[str, Any]] = {"poison": {}, "alarm": {}}
    for path in arguments.load:
        for part, found in json.loads(path.read_text()).items():
            measured[part].update(found)
    with tempfile.TemporaryDirectory() as name:
        if not arguments.load:
            measure(write_part(Path(name), arguments.per_class), arguments, measured)
    print_detection({int(s): {int(t): kinds for t, kinds in tasks.items()} for s, tasks in measured["poison"].items()})
    print_alarms(measured["alarm"])


def measure(folder: Path, arguments: argparse.Namespace, measured: dict[str, dict[str, Any]]) -> None:
    """Train all streams."""
    first = arguments.first_seed
    for seed in range(first, first + arguments.seeds):
        started = time.perf_counter()
        measured["poison"][str(seed)] = run_stream(folder, seed, poison=CORRUPTIONS[seed % len(CORRUPTIONS)])
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        keep(arguments.save, measured)
    longer = [*EPOCHS[:3], 3 * EPOCHS[3], *EPOCHS[4:]]
    unlike: dict[str, dict[str, Any]] = {
        "like the others": {"tasks": [2, 3], "sizes": [20, 4, 4, 4], "epochs": EPOCHS[:4]},
        "8 classes instead of 4": {"tasks": [2], "sizes": [20, 4, 8], "epochs": EPOCHS[:3]},
        "2 classes instead of 4": {"tasks": [2], "sizes": [20, 4, 2], "epochs": EPOCHS[:3]},
        "three times the epochs": {"tasks": [3], "sizes": [20, 4, 4, 4], "epochs": longer[:4]},
        "images turned by 90 degrees": {"tasks": [2], "sizes": [20, 4, 4], "epochs": EPOCHS[:3], "rotated": 2},
    }
    for seed in range(first, first + arguments.alarm_seeds):
        for name, settings in unlike.items():
            options = {key: value for key, value in settings.items() if key != "tasks"}
            shifts = run_stream(folder, seed, **options)
            limit = clean_limit([slope_of(run) for run in shifts[CALIBRATE]["clean"]], "slope", "p90")
            kind = "rotated" if "rotated" in settings else "clean"
            values = [slope_of(shifts[task][kind][0]) for task in settings["tasks"]]
            measured["alarm"].setdefault(name, []).append((limit, values))
            keep(arguments.save, measured)
        print(f"unlike tasks, seed {seed} done", flush=True)


def keep(path: Path | None, measured: dict[str, Any]) -> None:
    """Write what was measured so far."""
    if path is not None:
        path.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
