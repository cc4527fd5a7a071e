"""Compare the three regimes of early exits on streams of real images, and look at what exits do for old tasks.

    python benchmarks/exit_regimes.py fashion
    python benchmarks/exit_regimes.py cifar

ResNet-32 with six exits where the paper has them (arXiv 2403.07404), replay, five tasks of a part of FashionMNIST
or of CIFAR-100 (its first ten classes). Each run trains with the task-wise correction of logits, and is measured
with it and without. Mean and standard deviation over the seeds.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from benchmarks.arrays import write_part
from benchmarks.quiet import quiet_trainer, silence
from benchmarks.stream_overhead import DATA, Net
from lightning_cl.callbacks import EarlyExits, Replay
from lightning_cl.datamodules import ArrayData, ClassIncremental
from lightning_cl.metrics.early_exit import ExitSummary, exit_summary
from lightning_cl.models import build_backbone
from lightning_cl.reporting.exits import BUDGETS, exit_figures
from lightning_cl.tasks import Task

LAYERS = [f"model.stages.{stage}.{block}" for stage, block in ((0, 2), (0, 4), (1, 1), (1, 3), (2, 0), (2, 2))]
REGIMES = ("disjoint", "joint", "mixed")
SHAPES = {"fashion": (1, 28, 28), "cifar": (3, 32, 32)}
CLASSES = {"fashion": 10, "cifar": 10}
PER_CLASS = {"fashion": 400, "cifar": 250}


class ResNet(Net):
    """ResNet-32 and its optimizer."""

    def __init__(self, data: str) -> None:
        super().__init__(build_backbone("resnet32", CLASSES[data], SHAPES[data]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.001)


class MeasuredTwice(EarlyExits):
    """Measures the end of the last task without the correction too."""

    without_correction: dict[str, Any]

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        with self.hooks.uncorrected():
            scores = self.score_seen(trainer, pl_module)
        self.without_correction = summary(self, {seen: exit_summary(scored) for seen, scored in scores.items()})


def summary(exits: EarlyExits, summaries: Mapping[int, ExitSummary]) -> dict[str, Any]:
    """Return what the tables show of a run."""
    figures = exit_figures(summaries, exits.found.costs, exits.threshold_in_use, exits.record.accuracies)
    return {
        **{str(budget): figures["accuracy_at_budget"][str(budget)] for budget in BUDGETS},
        "last head": float(figures["exit_accuracies"][-1]),
        "area": figures["area_under_curve"],
        "overthinking": figures["overthinking"],
        "first task": summaries[0].exit_accuracies.tolist(),
        "first task, learnt": exits.record.accuracies[0, 0].tolist(),
    }


def run(data: str, root: Path, regime: Any, seed: int, epochs: int) -> dict[str, Any]:
    """Train a stream, and return its figures with the correction and without."""
    seed_everything(seed, verbose=False)
    exits = MeasuredTwice(LAYERS, regime, correction="tlc", threshold="auto:0.5pp", print_table=False)
    with tempfile.TemporaryDirectory() as folder:
        write_part(Path(folder), data, PER_CLASS[data], CLASSES[data], root=root)
        files = {name: str(Path(folder) / f"{name}.npz") for name in ("train", "test")}
        base = ArrayData(files["train"], val=files["test"], batch_size=32)
        trainer = quiet_trainer(
            max_epochs=epochs,
            callbacks=[Replay(size=20 * CLASSES[data]), exits],
        )
        trainer.fit(ResNet(data), datamodule=ClassIncremental(base, num_tasks=5))
    return {"tlc": summary(exits, exits.record.summaries), "none": exits.without_correction}


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation in percent."""
    known = 100 * np.array(values)
    return "-" if np.isnan(known).any() else f"{known.mean():.1f} ± {known.std():.1f}"


def print_tables(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print accuracy at each budget, and what each exit forgot of the first task."""
    columns = [*map(str, BUDGETS), "last head", "area", "overthinking"]
    print(f"\n| regime | correction | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for regime, seeds in runs.items():
        for correction in ("none", "tlc"):
            cells = [spread([seed[correction][column] for seed in seeds]) for column in columns]
            print(f"| {regime} | {correction} | {' | '.join(cells)} |")
    print(f"\n| regime | seeds in which TLC is ahead: {' | '.join(columns[:-1])} |\n|---|{'---|' * (len(columns) - 1)}")
    for regime, seeds in runs.items():
        ahead = [sum(s["tlc"][c] > s["none"][c] for s in seeds) for c in columns[:-1]]
        print(f"| {regime} | {' | '.join(f'{count} of {len(seeds)}' for count in ahead)} |")
    heads = [f"exit {number}" for number in range(1, len(LAYERS) + 1)]
    print(f"\n| first task, no correction | {' | '.join([*heads, 'last head'])} |\n|---|{'---|' * (len(LAYERS) + 1)}")
    for regime, seeds in runs.items():
        learnt, left = (
            np.array([seed["none"][name] for seed in seeds]) for name in ("first task, learnt", "first task")
        )
        for name, rows in (("kept", left), ("forgotten", learnt - left)):
            print(f"| {regime}: {name} | {' | '.join(spread(list(column)) for column in rows.T)} |")


def main() -> None:
    """Run the regimes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=sorted(SHAPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of each task")
    parser.add_argument("--root", type=Path, default=DATA, help="folder that holds FashionMNIST and cifar100")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    print(f"{arguments.data}, {arguments.seeds} seeds, {arguments.epochs} epochs of each task", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {regime: [] for regime in REGIMES}
    for seed in range(arguments.seeds):
        for regime, done in runs.items():
            started = time.perf_counter()
            done.append(run(arguments.data, arguments.root, regime, seed, arguments.epochs))
            print(f"{regime}, seed {seed}: {time.perf_counter() - started:.0f} s; {json.dumps(done[-1])}", flush=True)
    print_tables(runs)


if __name__ == "__main__":
    main()
