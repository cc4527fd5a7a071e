"""The streams of the exemplar-free benchmark, and what learns them."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.arrays import DataName, part_in
from benchmarks.quiet import quiet_trainer
from benchmarks.stream_overhead import Net
from lightning_cl.callbacks import (
    AdaGauss,
    ContinualMetrics,
    ElasticWeightConsolidation,
    LearningWithoutForgetting,
    LearningWithoutMemorizing,
)
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.hashing import mix
from lightning_cl.heads import ClassGaussians, adapt_gaussians
from lightning_cl.heads.adaptation import Adaptation
from lightning_cl.tasks import Task
from lightning_cl.tasks.evaluation import evaluating, sample_batches

WIDTH = 32  # of the features
SAMPLES = 2000  # drawn of each Gaussian
ADAPTATIONS: tuple[Adaptation, ...] = ("none", "mean", "diag", "full")
OTHER_HEADS: dict[str, dict[str, Any]] = {  # the first is what the paper's text says
    "Bayes": {"shrinkage": 0.0, "correlation": False, "normalize": False, "log_determinant": True},
    "nearest mean": {"classifier": "nearest_mean"},
    "linear": {"classifier": "linear"},
}


class Stream(NamedTuple):
    """A part of a data set in tasks.

    Args:
        data: Which data set.
        classes: How many classes.
        tasks: How many tasks of as many classes.
        per_class: Training images of each class.
        epochs: Of each task.
    """

    data: DataName
    classes: int
    tasks: int
    per_class: int
    epochs: int

    def sequence(self, folder: Path, seed: int) -> ClassIncremental:
        """Return the tasks, in an order of the classes that the seed says."""
        base = part_in(folder, self.data, batch_size=64, augment="flip")
        return ClassIncremental(base, num_tasks=self.tasks, class_order=seed, seed=seed)


STREAMS = {"fashion": Stream("fashion", 10, 5, 500, 6), "cifar": Stream("cifar", 50, 10, 150, 8)}


class NarrowConvNet(Net):
    """Three blocks of convolution, batch norm and pooling, a linear layer to the features, and the classes."""

    def __init__(self, stream: Stream, width: int = 16) -> None:
        channels = [1 if stream.data == "fashion" else 3, width, 2 * width, 4 * width]
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
            for i, o in pairwise(channels)
        ]
        pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        head = [nn.Linear(4 * channels[-1], WIDTH), nn.Linear(WIDTH, stream.classes)]
        super().__init__(nn.Sequential(*blocks, *pool, *head))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        first = self.trainer.datamodule.current_task.index == 0  # type: ignore[attr-defined]
        return torch.optim.SGD(self.parameters(), lr=0.05 if first else 0.01, momentum=0.9, weight_decay=5e-4)


class EachAdaptation(AdaGauss):
    """Adapt Gaussians in every way beside each other: the ways share the training, which does not see Gaussians.

    Attributes:
        accuracies: By way of adaptation, and by other heads of fully adapted Gaussians, the accuracy over all classes
            seen, after each task.
        ranks: After each task but the first, the mean numerical rank of the covariances of the classes before it.
        seconds: Of the adapter's training and of one adaptation, after each task but the first.
    """

    accuracies: dict[str, list[float]]
    ranks: list[float]
    seconds: list[tuple[float, float]]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._by_way: dict[Adaptation, ClassGaussians] = {}
        self.accuracies = {name: [] for name in (*ADAPTATIONS, *OTHER_HEADS)}
        self.ranks, self.seconds = [], []

    @override
    def adapt(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.gaussians is None:
            return
        started = time.process_time()
        adapter = self.train_adapter(trainer, pl_module, task)
        trained = time.process_time()
        for way in ADAPTATIONS:
            generator = torch.Generator().manual_seed(mix(self.stream.seed, task.index))
            before = self._by_way[way]
            self._by_way[way] = adapt_gaussians(before, adapter, way, self.samples, generator)
        self.seconds.append((trained - started, (time.process_time() - trained) / 2))  # two of the ways draw samples
        self.gaussians = self._by_way["full"]
        self.ranks.append(mean_rank(self.gaussians))

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        current = self.take(trainer, pl_module, task)
        for way in ADAPTATIONS:
            gaussians = self._by_way.setdefault(way, ClassGaussians(*self.shape))
            gaussians.add(current)
        usual = self.options
        heads = {way: self.head_of(trainer, self._by_way[way]) for way in ADAPTATIONS}
        for name, options in OTHER_HEADS.items():
            self.options = {**usual, **options}
            heads[name] = self.head_of(trainer, self._by_way["full"])
        self.options = usual
        features, labels = self._test_features(trainer, pl_module, task.index + 1)
        for name, head in heads.items():
            self.accuracies[name].append(float((head(features).argmax(1) == labels).double().mean()))

    def _test_features(self, trainer: Trainer, pl_module: LightningModule, tasks: int) -> tuple[Tensor, Tensor]:
        """Return features and labels of the test images of the first tasks."""
        rows, targets = [], []
        with evaluating(trainer, pl_module):
            for task in range(tasks):
                samples = torch.arange(self.stream.samples_of(task, "test") or 0)
                for _, (images, labels) in sample_batches(trainer, pl_module, self.stream, task, samples, "test"):
                    rows.append(self.features_of(pl_module, (images, labels)))
                    targets.append(labels)
        return torch.cat(rows), torch.cat(targets)


def mean_rank(gaussians: ClassGaussians) -> float:
    """Return the mean over the classes of the numerical rank of their covariances (1e-3 of the largest eigenvalue)."""
    covariances = gaussians.covariances()[gaussians.known]
    return float(torch.linalg.matrix_rank(covariances, rtol=1e-3, hermitian=True).double().mean())


LEARNERS: dict[str, Callable[[], list[Any]]] = {
    "naive": list,
    "EWC": lambda: [ElasticWeightConsolidation()],
    "LwF": lambda: [LearningWithoutForgetting(weight=10)],
    "LwM": lambda: [LearningWithoutMemorizing(weight=10)],
    "AdaGauss": lambda: [EachAdaptation(samples=SAMPLES)],
    "AdaGauss without the anti-collapse loss": lambda: [EachAdaptation(anti_collapse=0.0, samples=SAMPLES)],
}


def learn(learner: str, stream: Stream, folder: Path, seed: int) -> dict[str, Any]:
    """Train a stream, and return what came of it.

    Args:
        learner: One of `LEARNERS`.
        stream: The tasks.
        folder: Where `benchmarks.arrays.write_part` wrote the images.
        seed: Of weights, order of the classes and batches.

    Returns:
        ``accuracies``, over all classes seen after each task, by way of adaptation ("" for one without Gaussians), and
        of those with Gaussians also ``ranks``, ``seconds`` and ``numbers``, which are kept of a class.
    """
    seed_everything(seed, verbose=False)
    callbacks = LEARNERS[learner]()
    metrics = ContinualMetrics(split="test", print_table=False)
    trainer = quiet_trainer(
        max_epochs=stream.epochs, callbacks=[metrics, *callbacks], num_sanity_val_steps=0, gradient_clip_val=1.0
    )
    trainer.fit(NarrowConvNet(stream), datamodule=stream.sequence(folder, seed))
    matrix = metrics.matrix
    after = [float(row[: task + 1].mean()) for task, row in enumerate(matrix)]  # tasks are of one size
    if not callbacks or not isinstance(callbacks[0], EachAdaptation):
        return {"accuracies": {"": after}}
    adapted = callbacks[0]
    kept = {"ranks": adapted.ranks, "seconds": adapted.seconds, "numbers": adapted.memory_per_class}
    return {"accuracies": adapted.accuracies, "own": after, **kept}
