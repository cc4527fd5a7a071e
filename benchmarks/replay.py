"""Measure replay beside Avalanche 0.6 and a plain PyTorch loop: speed, memory, checkpoints and accuracy.

    python benchmarks/replay.py [--speed] [--images] [--memory] [--checkpoint] [--accuracy]

Split-FashionMNIST, 5 tasks x 1 epoch, MLP 784-400-400-10, SGD 0.05, 2000 slots balanced over the classes, 128 + 128
samples a step. One thread, the sides in turn, medians of 5 rounds. Training steps alone are timed, evaluation is left
out. Without a flag every part is run; each alone takes less than ten minutes.

Avalanche has an environment of its own, where `replay_avalanche.py` is started once and answers requests:

    python -m venv avalanche-env && avalanche-env/bin/pip install ".[bench]"
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.fashion import CLASSES, TASKS, accuracy_of, build_mlp, image_transform, load_fashion, normalise
from benchmarks.quiet import silence
from benchmarks.replay_storage import measure_checkpoints, measure_memory
from benchmarks.stream_overhead import DATA, Net, fit
from lightning_cl.callbacks import DarkExperienceReplay, Replay
from lightning_cl.datamodules import ClassIncremental, TorchvisionData

ROOT = Path(__file__).parents[1]
BATCH = 128
IMAGES_PER_CLASS = 1280  # 100 steps: an image costs so much here that more would only take longer
MAKE_AVALANCHE = """\
Avalanche's side is left out: {reason}. To have it, run

    python -m venv avalanche-env && avalanche-env/bin/pip install ".[bench]"

and give `--avalanche-python avalanche-env/bin/python`, or set AVALANCHE_PYTHON to it.
"""


@dataclass(frozen=True)
class Run:
    """One stream: seconds and steps of each task, all seconds with the ways between tasks, and the final accuracy."""

    seconds: list[float]
    steps: list[int]
    total: float
    accuracy: float

    @property
    def step(self) -> float:
        """Milliseconds of a step."""
        return 1000 * sum(self.seconds) / sum(self.steps)

    @property
    def replay_step(self) -> float:
        """Milliseconds of a step from the second task on, where each step replays."""
        return 1000 * sum(self.seconds[1:]) / sum(self.steps[1:])

    @property
    def step_with_changes(self) -> float:
        """Milliseconds of a step with its share of the memory's updates and the ways to the next task."""
        return 1000 * self.total / sum(self.steps)


Side = Callable[[int], Run]


class Avalanche:
    """Avalanche in its own environment, as a process that answers requests.

    Args:
        python: The environment's interpreter.
        root: Folder that holds FashionMNIST.

    Raises:
        RuntimeError: If it cannot be started.
    """

    def __init__(self, python: str, root: str) -> None:
        self._root = root
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        try:
            self._process = subprocess.Popen(
                [python, str(ROOT / "benchmarks" / "replay_avalanche.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
        except OSError as error:
            raise RuntimeError(f"there is no Python at {python} ({error.strerror})") from error
        self.versions: dict[str, str] = self._read()

    def run(self, seed: int, **options: Any) -> Run:
        """Train over the stream once."""
        request = json.dumps({"root": self._root, "seed": seed, **options})
        print(request, file=self._process.stdin, flush=True)
        return Run(**self._read())

    def _read(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"its process ended with exit code {self._process.wait()}, see above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def start_avalanche(python: str, root: str) -> Avalanche | None:
    """Start Avalanche's side, or say how to make its environment."""
    try:
        return Avalanche(python, root)
    except RuntimeError as error:
        print(MAKE_AVALANCHE.format(reason=error), flush=True)
        return None


def run_plain(root: str, slots: int, seed: int) -> Run:
    """Train as a person would write it: tensors in memory, a memory of tensors, one batch put together a step."""
    torch.manual_seed(seed)
    train = load_fashion(root, train=True)
    images, labels = train.data, train.targets
    net = build_mlp()
    memory: dict[int, Tensor] = {}
    past_images, past_labels = images[:0], labels[:0]
    seconds, steps = [], []
    begun = time.perf_counter()
    for classes in torch.arange(CLASSES).chunk(TASKS):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        own = torch.isin(labels, classes).nonzero().squeeze(1)
        started = time.perf_counter()
        batches = own[torch.randperm(len(own))].split(BATCH)
        for rows in batches:
            x, y = images[rows], labels[rows]
            if memory:
                drawn = torch.randperm(len(past_labels))[:BATCH]
                x, y = torch.cat([x, past_images[drawn]]), torch.cat([y, past_labels[drawn]])
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(normalise(x)), y).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
        steps.append(len(batches))
        share = slots // (len(memory) + len(classes))
        for label in classes.tolist():
            rows = (labels == label).nonzero().squeeze(1)
            memory[label] = images[rows[torch.randperm(len(rows))]]
        memory = {label: kept[:share].clone() for label, kept in memory.items()}
        past_images = torch.cat(list(memory.values()))
        past_labels = torch.cat([torch.full((len(kept),), label) for label, kept in memory.items()])
    return Run(seconds, steps, time.perf_counter() - begun, accuracy_of(net, root))


class TaskTimes(Callback):
    """Time the training steps of each task, and the stream from its first step to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.steps: list[int] = []
        self.total = self._begun = self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(0)
        self._started = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps[-1] += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total = time.perf_counter() - self._begun


class Images(LightningDataModule):
    """FashionMNIST as anybody writes it: a dataset that opens, crops and normalises image by image."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root

    def train_dataloader(self) -> Any:
        images = load_fashion(self.root, True, IMAGES_PER_CLASS, image_transform(crop=True))
        return DataLoader(images, batch_size=BATCH, shuffle=True)


def run_ours(data: LightningDataModule, replay: Callback, root: str, seed: int) -> Run:
    """Train over the stream with a replay callback."""
    seed_everything(seed, verbose=False)
    net, times = Net(build_mlp()), TaskTimes()
    fit(net, ClassIncremental(data, num_tasks=TASKS), epochs=1, callbacks=[times, replay])
    return Run(times.seconds, times.steps, times.total, accuracy_of(net.model, root))


def arrays(root: str) -> TorchvisionData:
    """Return FashionMNIST in memory, with all training samples."""
    return TorchvisionData("FashionMNIST", root=root, batch_size=BATCH, val_fraction=0.0)


def in_turn(sides: dict[str, Side], rounds: int) -> dict[str, list[Run]]:
    """Run the sides in turn, each round with another seed."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for seed in range(rounds):
        for name, side in sides.items():
            runs[name].append(side(seed))
    steps = {tuple(run.steps) for of_side in runs.values() for run in of_side}
    if len(steps) != 1:
        raise RuntimeError(f"The sides took different numbers of steps: {steps}.")
    return runs


def print_speed(title: str, runs: dict[str, list[Run]], ratios: dict[tuple[str, str], str]) -> None:
    """Print the medians of each side, and the median ratios of two sides, round by round, with what is asked of them.

    A machine that others use is slow for minutes at a time, so what ran in the same round is compared.
    """
    columns = ("step", "replay_step", "step_with_changes")
    ms = {
        name: [statistics.median(getattr(run, c) for run in of_side) for c in columns] for name, of_side in runs.items()
    }
    steps = next(iter(runs.values()))[0].steps
    rounds = len(next(iter(runs.values())))
    print(f"{title}: {sum(steps)} steps, {sum(steps[1:])} of them with replay; medians of {rounds} rounds\n")
    print("| side | ms/step | steps/s | ms/step, tasks 2-5 | steps/s, tasks 2-5 | ms/step with task changes |")
    print("|---|---|---|---|---|---|")
    for name, (step, replay_step, with_changes) in ms.items():
        print(
            f"| {name} | {step:.2f} | {1000 / step:.1f} | {replay_step:.2f} | {1000 / replay_step:.1f} |"
            f" {with_changes:.2f} |"
        )
    print("\n| ratio of the times | all steps | tasks 2-5 | with task changes | asked |\n|---|---|---|---|---|")
    for (above, below), asked in ratios.items():
        shown = ["-"] * len(columns)  # a side may be missing
        if above in runs and below in runs:
            pairs = list(zip(runs[above], runs[below], strict=True))
            shown = [f"{statistics.median(getattr(a, c) / getattr(b, c) for a, b in pairs):.2f}" for c in columns]
        print(f"| {above} / {below} | {' | '.join(shown)} | {asked} |")
    print(flush=True)


def measure_speed(root: str, rounds: int, avalanche: Avalanche | None) -> None:
    """Compare with the plain loop and with Avalanche, whose samples come as its benchmark makes them and ready."""
    sides: dict[str, Side] = {
        "plain loop": lambda seed: run_plain(root, 2000, seed),
        "lightning-cl": lambda seed: run_ours(arrays(root), _replay(2000, seed), root, seed),
    }
    if avalanche is not None:
        sides["Avalanche (its SplitFMNIST)"] = lambda seed: avalanche.run(seed, inputs="images")
        sides["Avalanche (ready tensors)"] = lambda seed: avalanche.run(seed, inputs="tensors")
    ratios = {
        ("lightning-cl", "plain loop"): "at most 1.25",
        ("Avalanche (its SplitFMNIST)", "lightning-cl"): "at least 6",
        ("Avalanche (ready tensors)", "lightning-cl"): "",
    }
    print_speed("Split-FashionMNIST", in_turn(sides, rounds), ratios)


def measure_images(root: str, rounds: int, avalanche: Avalanche | None) -> None:
    """Compare with Avalanche where both sides open, crop and normalise image by image."""
    sides: dict[str, Side] = {"lightning-cl": lambda seed: run_ours(Images(root), _replay(2000, seed), root, seed)}
    if avalanche is not None:
        sides["Avalanche"] = lambda seed: avalanche.run(seed, inputs="crops", per_class=IMAGES_PER_CLASS)
    ratios = {("Avalanche", "lightning-cl"): "at least 1.0"}
    print_speed("Image by image, with a random crop", in_turn(sides, rounds), ratios)


def measure_accuracy(root: str, seeds: int, avalanche: Avalanche | None, alpha: float, beta: float) -> None:
    """Print the accuracy over the ten classes after the stream."""
    der = f"lightning-cl, DER++ ({alpha:g}, {beta:g}), 500 slots"
    sides: dict[str, Side] = {
        "plain loop, 2000 slots": lambda seed: run_plain(root, 2000, seed),
        "lightning-cl, 2000 slots": lambda seed: run_ours(arrays(root), _replay(2000, seed), root, seed),
        "lightning-cl, 500 slots": lambda seed: run_ours(arrays(root), _replay(500, seed), root, seed),
        der: lambda seed: run_ours(arrays(root), _dark_replay(500, seed, alpha, beta), root, seed),
    }
    if avalanche is not None:
        sides["Avalanche, 2000 slots"] = lambda seed: avalanche.run(seed)
    accuracies = {name: [100 * run.accuracy for run in runs] for name, runs in in_turn(sides, seeds).items()}
    print(f"Accuracy over all classes after the stream, {seeds} seeds\n")
    print("| side | mean, % | standard deviation | lowest | highest |\n|---|---|---|---|---|")
    for name, of_side in accuracies.items():
        spread = statistics.stdev(of_side) if seeds > 1 else 0.0
        print(f"| {name} | {statistics.mean(of_side):.2f} | {spread:.2f} | {min(of_side):.2f} | {max(of_side):.2f} |")
    print("\n| difference of the means | points | asked |\n|---|---|---|")
    for first, second, asked in (
        ("lightning-cl, 2000 slots", "Avalanche, 2000 slots", "within 1"),
        (der, "lightning-cl, 500 slots", "at least 0"),
    ):
        if first in accuracies and second in accuracies:
            points = statistics.mean(accuracies[first]) - statistics.mean(accuracies[second])
            print(f"| {first} - {second} | {points:+.2f} | {asked} |")
    print(flush=True)


def _replay(slots: int, seed: int) -> Replay:
    return Replay(size=slots, selection="class_balanced", batch_size=BATCH, seed=seed)


def _dark_replay(slots: int, seed: int, alpha: float, beta: float) -> DarkExperienceReplay:
    return DarkExperienceReplay(
        size=slots, alpha=alpha, beta=beta, selection="class_balanced", batch_size=BATCH, seed=seed
    )


def parse_arguments() -> argparse.Namespace:
    """Return the parts to run and their options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part, text in (
        ("speed", "steps per second beside a plain loop and Avalanche"),
        ("images", "the same with transforms of each image on both sides"),
        ("memory", "size and times of a memory of 1,000,000 slots"),
        ("checkpoint", "size of checkpoints and the time to save them"),
        ("accuracy", "accuracy after the stream"),
    ):
        parser.add_argument(f"--{part}", action="append_const", dest="parts", const=part, help=text)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=0.1, help="weight of the logits in DER++")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the labels in DER++")
    parser.add_argument("--data", default=str(DATA), help="folder that holds FashionMNIST")
    parser.add_argument(
        "--avalanche-python", default=os.environ.get("AVALANCHE_PYTHON", "avalanche-env/bin/python"), metavar="PATH"
    )
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or ["speed", "images", "memory", "checkpoint", "accuracy"]
    return arguments


def main() -> None:
    """Run the parts and print their tables."""
    arguments = parse_arguments()
    silence()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    print(f"{versions}; one thread of {os.cpu_count()} ({platform.machine()})\n", flush=True)
    avalanche = None
    if {"speed", "images", "accuracy"} & set(arguments.parts):
        avalanche = start_avalanche(arguments.avalanche_python, arguments.data)
    if avalanche is not None:
        print(f"Avalanche: {', '.join(f'{name} {version}' for name, version in avalanche.versions.items())}\n")
    parts: dict[str, Callable[[], None]] = {
        "speed": lambda: measure_speed(arguments.data, arguments.rounds, avalanche),
        "images": lambda: measure_images(arguments.data, arguments.rounds, avalanche),
        "memory": lambda: measure_memory(arguments.rounds),
        "checkpoint": lambda: measure_checkpoints(arguments.rounds),
        "accuracy": lambda: measure_accuracy(
            arguments.data, arguments.seeds, avalanche, arguments.alpha, arguments.beta
        ),
    }
    for part in arguments.parts:
        parts[part]()
    if avalanche is not None:
        avalanche.close()


if __name__ == "__main__":
    main()
