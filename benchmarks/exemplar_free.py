"""Measure what is left of past classes without exemplars, and what each method costs.

    python benchmarks/exemplar_free.py fashion cifar --seeds 3 --save outcomes.json --plot docs/exemplar_free.png
    python benchmarks/exemplar_free.py steps

"fashion" is FashionMNIST in 5 tasks of 2 classes, 500 training images a class, 6 epochs a task; "cifar" the first 50
classes of CIFAR-100 in 10 tasks of 5, 150 images a class, 8 epochs a task. The network is a small convnet with 32
features, batch 64, SGD with momentum, one thread. A_last is the accuracy over all classes after the last task, A_inc
the mean over the tasks of the accuracy over the classes seen; both on 1000 (fashion) or 100 test images a class. The
ways of adapting Gaussians share one training, which does not see them. "steps" times training steps of `resnet32`.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from benchmarks.arrays import write_part
from benchmarks.exemplar_streams import LEARNERS, OTHER_HEADS, STREAMS, WIDTH, learn
from benchmarks.poison_streams import spread
from benchmarks.quiet import silence
from benchmarks.regularisers import SIDES, steps_of
from lightning_cl.callbacks import AdaGauss, AntiCollapse, ProjectedDistillation
from lightning_cl.reporting.plots import png_of

WITHOUT = "AdaGauss without the anti-collapse loss"
MOST_OF_ADA_GAUSS = 1.7
TITLES = {"fashion": "FashionMNIST, 5 tasks", "cifar": "CIFAR-100, 10 tasks"}

STEPS: dict[str, Callable[[], list[Callback]]] = {
    **SIDES,
    "AntiCollapse": lambda: [AntiCollapse()],
    "ProjectedDistillation": lambda: [ProjectedDistillation()],
    "AdaGauss": lambda: [AdaGauss()],
}


class Outcomes:
    """Outcomes of trainings, each done at most once and kept in a file.

    Args:
        folder: Where the images are written.
        files: Files with known outcomes; new ones go into the first.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._file = files[0] if files else None
        self._known: dict[str, dict[str, Any]] = {}
        for file in files:
            if file.exists():
                self._known.update(json.loads(file.read_text()))

    def of(self, learner: str, stream: str, seed: int) -> dict[str, Any]:
        """Return what a training gave."""
        key = f"{learner}, {stream}, {seed}"
        if key not in self._known:
            folder = self._folder / stream
            if not folder.exists():
                folder.mkdir()
                part = STREAMS[stream]
                test_images = 1000 if part.data == "fashion" else 100
                write_part(folder, part.data, part.per_class, part.classes, test_images)
            self._known[key] = learn(learner, STREAMS[stream], folder, seed)
            if self._file is not None:
                self._file.write_text(json.dumps(self._known))
        return self._known[key]


def print_accuracies(outcomes: Outcomes, stream: str, seeds: int, learners: Sequence[str]) -> None:
    """Print A_last and A_inc of each learner, and of each way of adapting Gaussians."""
    print(f"\n{stream}\n\n| method | A_last | A_inc |\n|---|---|---|")
    for learner in learners:
        runs = [outcomes.of(learner, stream, seed)["accuracies"] for seed in range(seeds)]
        for way in runs[0]:
            last, mean = ([figure(run[way]) for run in runs] for figure in (lambda a: a[-1], statistics.mean))
            print(f"| {learner}{_described(way)} | {spread(last)} | {spread(mean)} |", flush=True)


def _described(way: str) -> str:
    if way in OTHER_HEADS:
        return f", adapt full, {way} head"
    return f", adapt {way}" if way else ""


def print_order(outcomes: Outcomes, stream: str, seeds: int) -> None:
    """Print, for each seed, whether the methods come in the order that is asked for, and full before none."""
    print(
        "\n| seed | naive | LwF | AdaGauss, none | AdaGauss, full | in this order | full - none |\n" + "|---" * 7 + "|"
    )
    for seed in range(seeds):
        naive, lwf = (outcomes.of(name, stream, seed)["accuracies"][""][-1] for name in ("naive", "LwF"))
        ways = outcomes.of("AdaGauss", stream, seed)["accuracies"]
        none, full = ways["none"][-1], ways["full"][-1]
        figures = " | ".join(f"{100 * figure:.1f}" for figure in (naive, lwf, none, full))
        ordered = "yes" if naive < lwf < full else "no"
        print(f"| {seed} | {figures} | {ordered} | {100 * (full - none):+.1f} |", flush=True)


def print_costs(outcomes: Outcomes, stream: str, seeds: int) -> None:
    """Print what Gaussians cost, and the ranks of their covariances."""
    runs = {name: [outcomes.of(name, stream, seed) for seed in range(seeds)] for name in ("AdaGauss", WITHOUT)}
    seconds = np.array([run["seconds"] for run in runs["AdaGauss"]]).reshape(-1, 2)
    adapter, adaptation = np.median(seconds, axis=0)
    print(
        f"\nA task's adapter takes {adapter:.1f} s, features included, and adapting the Gaussians {adaptation:.2f} s"
        f" (medians, CPU time). Of a class {runs['AdaGauss'][0]['numbers']} numbers are kept."
    )
    for name, those in runs.items():
        ranks = np.array([run["ranks"] for run in those])
        print(f"{name}: mean rank of old classes' covariances, of {WIDTH}, by task: {_row(ranks.mean(0))}.")


def _row(values: np.ndarray) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def plot_ranks(outcomes: Outcomes, streams: Sequence[str], seeds: int, path: Path) -> None:
    """Draw the mean rank of old classes' covariances over the tasks, with the anti-collapse loss and without."""
    figure = Figure(figsize=(4.5 * len(streams), 3.2), layout="constrained")
    axes = figure.subplots(1, len(streams), squeeze=False)[0]
    for ax, stream in zip(axes, streams, strict=True):
        for name in ("AdaGauss", WITHOUT):
            ranks = np.array([outcomes.of(name, stream, seed)["ranks"] for seed in range(seeds)])
            tasks = np.arange(2, 2 + ranks.shape[1])
            (line,) = ax.plot(tasks, ranks.mean(0), marker="o", label="with" if name == "AdaGauss" else "without")
            ax.fill_between(tasks, ranks.min(0), ranks.max(0), color=line.get_color(), alpha=0.2)
        ax.set(title=TITLES[stream], xlabel="task", ylabel="mean rank of old covariances", ylim=(0, WIDTH + 2))
        ax.set_xticks(tasks)
        ax.axhline(WIDTH, color="grey", linewidth=0.8, linestyle="--")
        ax.legend(title="anti-collapse loss", loc="center", bbox_to_anchor=(0.5, 0.65))
    path.write_bytes(png_of(figure))


def print_steps(rounds: int) -> bool:
    """Print what a training step costs beside one without callbacks; return whether AdaGauss's costs too much."""
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name, make in STEPS.items():
            seconds[name].append(statistics.median(steps_of(make())))
    print("\n| | ms/step | beside naive |\n|---|---|---|")
    ratios = {}
    for name, times in seconds.items():
        # round by round: what else the machine does then falls on all sides
        ratios[name] = statistics.median(own / naive for own, naive in zip(times, seconds["naive"], strict=True))
        print(f"| {name} | {statistics.median(times) * 1000:.0f} | {ratios[name]:.2f} |")
    return ratios["AdaGauss"] > MOST_OF_ADA_GAUSS


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=[*STREAMS, "steps"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    parser.add_argument("--save", type=Path, nargs="*", default=[], help="files with outcomes; the first gets new ones")
    parser.add_argument("--plot", type=Path, help="where to draw the ranks")
    parser.add_argument("--rounds", type=int, default=7, help="of steps")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    streams = [part for part in arguments.parts if part != "steps"]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {arguments.seeds} seeds")
    with tempfile.TemporaryDirectory() as name:
        outcomes = Outcomes(Path(name), arguments.save)
        for stream in streams:
            print_accuracies(outcomes, stream, arguments.seeds, arguments.learners)
            if set(arguments.learners) == set(LEARNERS):
                print_order(outcomes, stream, arguments.seeds)
                print_costs(outcomes, stream, arguments.seeds)
        if arguments.plot is not None:
            plot_ranks(outcomes, streams, arguments.seeds, arguments.plot)
    if "steps" in arguments.parts and print_steps(arguments.rounds):
        raise SystemExit("A step of AdaGauss costs more than it may.")


if __name__ == "__main__":
    main()
