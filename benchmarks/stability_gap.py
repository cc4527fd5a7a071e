"""Measure what the stability-gap tracker and the nearest-mean head cost, and what they show.

    python benchmarks/stability_gap.py --avalanche-python avalanche-env/bin/python

Split-FashionMNIST, MLP 784-400-400-10, batch 128, SGD 0.05, one thread, everything in one process but Avalanche, which
has an environment of its own; the sides in turn, medians of the rounds.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.fashion import TASKS, build_mlp
from benchmarks.quiet import quiet_trainer, silence
from benchmarks.replay import Avalanche, TaskTimes, start_avalanche
from benchmarks.stream_overhead import DATA, Net
from lightning_cl.callbacks import ContinualMetrics, NearestMeanClassifier, Replay, StabilityGapTracker
from lightning_cl.datamodules import ClassIncremental, TorchvisionData
from lightning_cl.tasks.evaluation import evaluating, sample_batches

BATCH = 128
FIRST_TASKS = 3
STEPS = 20  # of each task, beside Avalanche: its side takes long
PROBES = 1000
FIGURES = {
    "gap": "SG",
    "gap_norm": "SG_norm",
    "recovery": "REC",
    "wc_acc": "WC-ACC",
    "task_recency_bias": "task-recency bias",
    "final_task_recency_bias": "at the end",
}


class StopAfter(Callback):
    """End the run after a number of tasks."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.tasks


def fit(
    callbacks: list[Callback],
    root: str,
    seed: int = 0,
    epochs: int = 1,
    data: TorchvisionData | None = None,
    **flags: Any,
) -> tuple[TaskTimes, float]:
    """Train over the stream, and return the times of its tasks and all its seconds."""
    seed_everything(seed, verbose=False)
    times = TaskTimes()
    trainer = quiet_trainer(
        max_epochs=epochs,
        callbacks=[times, *callbacks],
        **flags,
    )
    data = data or TorchvisionData("FashionMNIST", root=root, batch_size=BATCH, val_fraction=0.1)
    trainer.fit(Net(build_mlp()), datamodule=ClassIncremental(data, num_tasks=TASKS))
    return times, times.total


def forward_times(probes: int, tasks: int) -> list[float]:
    """Return the seconds of a bare forward of the probes of 1, 2, ... tasks in one batch."""
    net, seconds = build_mlp().eval(), []
    for seen in range(1, tasks + 1):
        images = torch.rand(seen * probes, 1, 28, 28)
        with torch.inference_mode():
            started = time.perf_counter()
            for _ in range(STEPS):
                net(images)
        seconds.append((time.perf_counter() - started) / STEPS)
    return seconds


def measure_probes(root: str, rounds: int, avalanche: Avalanche | None) -> None:
    """Compare what probes add to a step with their bare forward and with what Avalanche adds."""

    def ours(seed: int, probes: int) -> float:
        tracker = [StabilityGapTracker(probe_size=probes)] if probes else []
        times, _ = fit([*tracker, StopAfter(FIRST_TASKS)], root, seed, limit_train_batches=STEPS)
        return 1000 * sum(times.seconds) / sum(times.steps)

    def theirs(seed: int, probes: int, inputs: str) -> float:
        options = {"per_class": STEPS * BATCH // 2, "probes": probes, "tasks": FIRST_TASKS, "inputs": inputs}
        return avalanche.run(seed, **options).step if avalanche is not None else 0.0

    sides: dict[str, Callable[[int, int], float]] = {"lightning-cl": ours}
    if avalanche is not None:
        sides["Avalanche (its SplitFMNIST)"] = lambda seed, probes: theirs(seed, probes, "images")
        sides["Avalanche (ready tensors)"] = lambda seed, probes: theirs(seed, probes, "tensors")
    added: dict[str, list[float]] = {name: [] for name in sides}
    bare = []
    for seed in range(rounds):
        bare.append(1000 * statistics.mean(forward_times(PROBES, FIRST_TASKS)))
        for name, side in sides.items():
            added[name].append(side(seed, PROBES) - side(seed, 0))
    print(f"{PROBES} probes a task, every step, the first {FIRST_TASKS} tasks; medians of {rounds} rounds\n")
    print("| side | added to a step, ms | beside the bare forward | asked |\n|---|---|---|---|")
    print(f"| bare forward | {statistics.median(bare):.2f} | 1.00 | |")
    for name, values in added.items():
        ratio = statistics.median(value / base for value, base in zip(values, bare, strict=True))
        asked = "at most 1.15" if name == "lightning-cl" else ""
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f} | {asked} |")
    for name in list(added)[1:]:
        ratio = statistics.median(a / b for a, b in zip(added[name], added["lightning-cl"], strict=True))
        asked = " (asked: at least 15)" if "SplitFMNIST" in name else ""
        print(f"\n{name} adds {ratio:.1f} times as much as lightning-cl{asked}.")
    print(flush=True)


def measure_sparse(root: str, rounds: int) -> None:
    """Compare a sparse tracker with none in time and with a dense one in its gap, with and without replay."""
    print("10 epochs a task, 256 probes, `dense_steps=50, every_n_steps=20`\n")
    print(
        "| replay | run beside one without | asked | with bare forwards alone | gap, sparse | gap, every step |"
        " points apart | asked |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for slots in (None, 2000):
        ratios, floors, apart, gaps = [], [], [], []
        for seed in range(rounds):
            replay = [Replay(slots, batch_size=BATCH)] if slots else []
            _, without = fit([*replay], root, seed, epochs=10)
            sparse = StabilityGapTracker(every_n_steps=20, dense_steps=50)
            _, seconds = fit([*replay, sparse], root, seed, epochs=10)
            dense = StabilityGapTracker()
            fit([*replay, dense], root, seed, epochs=10)
            ratios.append(seconds / without)
            bare = forward_times(sparse.probe_size, TASKS)
            floors.append(1 + sum(bare[task] for task in sparse.curve.trained.tolist()) / without)
            gaps.append((sparse.figures["gap"], dense.figures["gap"]))
            apart.append(100 * abs(gaps[-1][0] - gaps[-1][1]))
        few, all_ = (statistics.mean(column) for column in zip(*gaps, strict=True))
        print(
            f"| {slots or 'none'} | {statistics.median(ratios):.2f} | at most 1.15 | {statistics.median(floors):.2f} |"
            f" {few:.3f} | {all_:.3f} |"
            f" {statistics.mean(apart):.2f} (most {max(apart):.2f}) | less than 0.5 |",
            flush=True,
        )
    print()


class RefreshTimes(Callback):
    """Time, at the end of the second task, the head's refresh and an evaluation of the same samples."""

    def __init__(self, head: NearestMeanClassifier, rounds: int) -> None:
        self.head = head
        self.rounds = rounds
        self.ratios: list[float] = []
        self.samples = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != 1:
            return
        for _ in range(self.rounds):
            sources = self.head.sources()
            self.samples = sum(len(source.indices) for source in sources.values())
            started = time.perf_counter()
            with evaluating(trainer, pl_module):
                for task, source in sources.items():
                    for _, batch in sample_batches(trainer, pl_module, self.head.stream, task, source.indices):
                        pl_module(batch[0])
            evaluated = time.perf_counter()
            self.head.refresh_now(trainer, pl_module)
            self.ratios.append((time.perf_counter() - evaluated) / (evaluated - started))


def measure_refresh(root: str, rounds: int) -> None:
    """Compare a refresh of the prototypes with an evaluation of the samples that they are means of."""
    head = NearestMeanClassifier(refresh="task")
    times = RefreshTimes(head, rounds)
    fit([Replay(2000, batch_size=BATCH), head, times, StopAfter(2)], root)
    print(f"Refresh of the prototypes from {times.samples} samples, medians of {rounds} rounds: ", end="")
    print(f"{statistics.median(times.ratios):.2f} times an evaluation of them (asked: at most 1.1)\n", flush=True)


class TestAsValidation(TorchvisionData):
    """All training images train, and the test images are the validation set, as in the nearest-mean paper's code."""

    def __init__(self, root: str) -> None:
        super().__init__("FashionMNIST", root=root, batch_size=BATCH, val_fraction=0.0)

    def val_dataloader(self) -> Any:
        """Return a loader over the test images."""
        self.setup("test")
        return self.test_dataloader()


def compare_heads(root: str, slots: int, seed: int) -> dict[str, dict[str, float]]:
    """Train over the stream for two epochs a task with replay, and return the figures of both heads."""
    tracker = StabilityGapTracker(compare_heads=True)
    metrics = ContinualMetrics(print_table=False, compare_heads=True)
    callbacks = [Replay(slots, batch_size=BATCH), NearestMeanClassifier(), tracker, metrics]
    fit(callbacks, root, seed, epochs=2, data=TestAsValidation(root))
    heads = ("nearest mean", "", metrics.matrix), ("linear", "linear_", metrics.linear_matrix)
    return {
        name: {
            **{key: tracker.figures[prefix + key] for key in FIGURES},
            "accuracy": float(matrix[-1].mean()),
        }
        for name, prefix, matrix in heads
    }


def measure_gap(root: str, seeds: int) -> None:
    """Print gap, recency bias and final accuracy of both heads, with 2000 and 200 exemplars."""
    print(
        f"Two epochs a task, 128 + 128 samples a step, 256 probes a task after every step, {seeds} seeds:"
        " mean (lowest, highest)\n"
    )
    print(f"| exemplars | head | {' | '.join(FIGURES.values())} | final accuracy |")
    print(f"|---|---|{'---|' * (len(FIGURES) + 1)}")
    for slots in (2000, 200):
        runs = [compare_heads(root, slots, seed) for seed in range(seeds)]
        for name in runs[0]:
            columns = [torch.tensor([run[name][key] for run in runs]) for key in (*FIGURES, "accuracy")]
            print(f"| {slots} | {name} | {' | '.join(map(_spread, columns))} |", flush=True)
    print()


def _spread(values: Tensor) -> str:
    return f"{values.mean():.3f} ({values.min():.3f}, {values.max():.3f})"


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part, text in (
        ("probes", "what probes add to a step, beside their bare forward and Avalanche"),
        ("sparse", "what a sparse tracker costs and misses"),
        ("refresh", "what a refresh of the prototypes costs"),
        ("gap", "gap and accuracy of both heads"),
    ):
        parser.add_argument(f"--{part}", action="append_const", dest="parts", const=part, help=text)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default=str(DATA), help="folder that holds FashionMNIST")
    parser.add_argument(
        "--avalanche-python", default=os.environ.get("AVALANCHE_PYTHON", "avalanche-env/bin/python"), metavar="PATH"
    )
    arguments = parser.parse_args()
    parts = arguments.parts or ["probes", "sparse", "refresh", "gap"]
    silence()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    print(f"{versions}; one thread of {os.cpu_count()} ({platform.machine()})\n", flush=True)
    if "probes" in parts:
        avalanche = start_avalanche(arguments.avalanche_python, arguments.data)
        measure_probes(arguments.data, arguments.rounds, avalanche)
        if avalanche is not None:
            avalanche.close()
    if "sparse" in parts:
        measure_sparse(arguments.data, arguments.rounds)
    if "refresh" in parts:
        measure_refresh(arguments.data, arguments.rounds)
    if "gap" in parts:
        measure_gap(arguments.data, arguments.seeds)


if __name__ == "__main__":
    main()
