"""Train with Avalanche 0.6, for `replay.py` and `stability_gap.py`, which start this script in its own environment.

It answers each request, a line of JSON on stdin, with a line of JSON on stdout, and needs nothing of lightning-cl. To
try it alone, on the folder that holds FashionMNIST:

    echo '{"root": "data"}' | PYTHONPATH=. avalanche-env/bin/python benchmarks/replay_avalanche.py
"""

import importlib.metadata
import json
import os
import sys
import time
import warnings
from typing import Any

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.fashion import TASKS, accuracy_of, build_mlp, image_transform, load_fashion, normalise


class TaskTimes(SupervisedPlugin):
    """Time the training steps of each task."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.steps: list[int] = []
        self._started = 0.0

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.steps.append(0)
        self._started = time.perf_counter()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.steps[-1] += 1

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def make_stream(root: str, inputs: str, per_class: int | None, test_per_class: int | None = None) -> Any:
    """Return the tasks, two classes each.

    Args:
        root: Folder that holds FashionMNIST.
        inputs: "tensors" for floats that are ready, "images" for images that become normalised floats one by one, as in
            Avalanche's `SplitFMNIST`, "crops" for the same with a random crop.
        per_class: Training samples of each class; None for all.
        test_per_class: Test samples of each class; None for all.
    """
    sets = load_fashion(root, True, per_class), load_fashion(root, False, test_per_class)
    transforms: dict[str, Any] = {"train_transform": None, "eval_transform": None}
    if inputs == "tensors":
        sets = tuple(TensorDataset(normalise(images.data), images.targets) for images in sets)
    else:
        transforms["train_transform"] = image_transform(crop=inputs == "crops")
        transforms["eval_transform"] = image_transform(crop=False)
    return nc_benchmark(*sets, TASKS, task_labels=False, shuffle=False, **transforms)


def run(
    root: str, inputs: str = "tensors", slots: int = 2000, seed: int = 0, per_class: int | None = None
) -> dict[str, Any]:
    """Train over the stream, and return seconds and steps of each task, all seconds, and the accuracy after it."""
    torch.manual_seed(seed)
    stream = make_stream(root, inputs, per_class)
    net, times = build_mlp(), TaskTimes()
    replay = ReplayPlugin(
        mem_size=slots,
        batch_size=128,
        batch_size_mem=128,
        storage_policy=ClassBalancedBuffer(slots, adaptive_size=True),
    )
    strategy = Naive(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=128,
        train_epochs=1,
        plugins=[replay, times],
        evaluator=None,
    )
    experiences = list(stream.train_stream)
    started = time.perf_counter()
    for experience in experiences:
        strategy.train(experience)
    total = time.perf_counter() - started
    return {"seconds": times.seconds, "steps": times.steps, "total": total, "accuracy": accuracy_of(net, root)}


def run_probed(
    root: str, per_class: int, probes: int, tasks: int, seed: int = 0, inputs: str = "tensors"
) -> dict[str, Any]:
    """Train on the first tasks without replay, evaluating all tasks seen after each step, and return seconds and steps.

    Args:
        root: Folder that holds FashionMNIST.
        per_class: Training samples of each class.
        probes: Test samples of each task that are evaluated; 0 to train without any evaluation.
        tasks: How many tasks are trained.
        seed: Seed of weights and order.
        inputs: As in `make_stream`.
    """
    torch.manual_seed(seed)
    stream = make_stream(root, inputs, per_class, probes // 2 or None)
    net, times = build_mlp(), TaskTimes()
    strategy = Naive(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=128,
        eval_mb_size=max(probes, 1),
        plugins=[times],
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]) if probes else None,
        eval_every=1 if probes else -1,
        peval_mode="iteration",
    )
    for task, experience in enumerate(list(stream.train_stream)[:tasks]):
        seen = [[list(stream.test_stream)[: task + 1]]] if probes else []
        strategy.train(experience, *seen)
    return {"seconds": times.seconds, "steps": times.steps, "total": sum(times.seconds), "accuracy": 0.0}


def main() -> None:
    """Say which versions these are, then answer requests until stdin ends."""
    warnings.showwarning = lambda *args, **kwargs: None  # a filter would not do: Avalanche sets its own
    torch.set_num_threads(1)
    # what a library prints must not come between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({name: importlib.metadata.version(name) for name in ("avalanche-lib", "torch")}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run_probed(**request) if "probes" in request else run(**request)), file=answers)


if __name__ == "__main__":
    main()
