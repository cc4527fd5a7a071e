"""Class means of features over the samples of a stream that prototypes are means of."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.heads import ClassMeans
from lightning_cl.memory import ReplayMemory
from lightning_cl.tasks import compat
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.evaluation import evaluating, sample_batches
from lightning_cl.tasks.stream import ReplayStream

Prototypes = Literal["memory+current", "memory", "all"]


class Source(NamedTuple):
    """Training samples of one task.

    Args:
        indices: Which they are.
        labels: The class of each, ``None`` if unknown.
    """

    indices: Tensor
    labels: Tensor | None


class StreamMeans:
    """Sum up features by class, of one layer or of several in one pass.

    Args:
        stream: The tasks.
        prototypes: Whose means they are; see `NearestMeanClassifier`.
        shapes: Number of classes and width of the features of each layer.
        normalize: Whether features and means are brought to length 1.
        features_of: Returns each layer's features of a batch, ``(batch, width)``; called in `evaluating`.
    """

    def __init__(
        self,
        stream: ReplayStream,
        prototypes: Prototypes,
        shapes: Sequence[tuple[int, int]],
        normalize: bool,
        features_of: Callable[[LightningModule, Any], Sequence[Tensor]],
    ) -> None:
        self._stream = stream
        self._prototypes = prototypes
        self.shapes = shapes
        self._normalize = normalize
        self._features_of = features_of
        self._past: list[ClassMeans] | None = None  # of tasks that are over, where no memory has their samples
        self._current: list[ClassMeans] | None = None  # of the current task's data, since the last batch

    def forget_current(self) -> None:
        """Say that the network has changed since the current task's data was summed up."""
        self._current = None

    def summed_up(self, trainer: Trainer, pl_module: LightningModule) -> list[ClassMeans]:
        """Return the sums over all samples that prototypes are to be means of; to be called on all ranks."""
        means = self.empty(pl_module)
        self.add_past(means)
        _add(means, self._sums(trainer, pl_module, self._remembered()))
        if self._prototypes != "memory":
            if self._current is None:
                task = self._stream.current_task.index
                self._current = self._sums(trainer, pl_module, {task: self._all_of(task)})
            _add(means, self._current)
        return means

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the sums of a task that is over, where no memory has its samples."""
        if self._sums_up:
            self._past = self.summed_up(trainer, pl_module)

    def sources(self) -> dict[int, Source]:
        """Return the training samples that prototypes are means of now, by task; those that were kept are none."""
        task = self._stream.current_task.index
        current = {} if self._prototypes == "memory" else {task: self._all_of(task)}
        return {**self._remembered(), **current}

    def empty(self, pl_module: LightningModule) -> list[ClassMeans]:
        """Return sums over no samples."""
        return [ClassMeans(*shape, self._normalize, pl_module.device) for shape in self.shapes]

    def add_past(self, means: list[ClassMeans]) -> None:
        """Add the sums that were kept."""
        if self._sums_up and self._past is not None:
            _add(means, self._past)

    @property
    def memory(self) -> ReplayMemory | None:
        """The replay memory."""
        return None if self._stream.replay is None else self._stream.replay.memory

    def state_dict(self) -> list[dict[str, Tensor]] | None:
        """Return copies of the sums that were kept."""
        return None if self._past is None else [means.state_dict() for means in self._past]

    def load_state_dict(self, state: list[dict[str, Tensor]] | None) -> None:
        """Go on from saved sums."""
        self._past = self._current = None
        if state is not None:
            self._past = []
            for sums in state:
                num_classes, width = sums["sums"].shape
                self._past.append(ClassMeans(num_classes, width, self._normalize))
                self._past[-1].load_state_dict(sums)

    @property
    def _sums_up(self) -> bool:
        return self._prototypes == "all" or (self._prototypes == "memory+current" and self.memory is None)

    def _all_of(self, task: int) -> Source:
        return Source(torch.arange(self._stream.samples_of(task) or 0), self._stream.labels_of(task, read=False))

    def _remembered(self) -> dict[int, Source]:
        """Return the samples that come from the memory, by task."""
        task, memory = self._stream.current_task.index, self.memory
        if self._sums_up or memory is None:
            return {}
        tasks = [t for t in memory.task_counts if self._prototypes == "memory" or t != task]
        return {t: Source(memory.indices[memory.tasks == t], memory.labels[memory.tasks == t].long()) for t in tasks}

    def _sums(self, trainer: Trainer, pl_module: LightningModule, sources: dict[int, Source]) -> list[ClassMeans]:
        """Sum up features of samples, given by task, over all ranks."""
        means = self.empty(pl_module)
        with evaluating(trainer, pl_module):
            for task, source in sources.items():
                for _, batch in sample_batches(trainer, pl_module, self._stream, task, source.indices):
                    labels = as_labels(self._stream.structure.find_targets(batch))
                    for sums, features in zip(means, self._features_of(pl_module, batch), strict=True):
                        sums.update(features, labels)
        reduce_means(trainer, means)
        return means


def validates_before_means(trainer: Trainer, stream: ReplayStream) -> bool:
    """Return whether classes are validated before their first epoch is over."""
    later = max(stream.served_tasks("val"), default=0) > stream.current_task.index
    return later or trainer.val_check_interval != 1.0


def refuse_infinite_losses(trainer: Trainer) -> None:
    """Refuse early stopping on a loss that would be infinite, since a class is not known yet when it is scored."""
    for callback in compat.callbacks_of(trainer):
        if isinstance(callback, EarlyStopping) and callback.check_finite and _is_loss(callback.monitor):
            raise MisconfigurationException(
                f"Early stopping on {callback.monitor!r} would end each task when it is infinite, as it is while a"
                " validated class is not known yet and so scores minus infinity. Monitor an accuracy, or say"
                " `check_finite=False`."
            )


def _is_loss(monitor: str) -> bool:
    return "loss" in monitor and "train" not in monitor


def reduce_means(trainer: Trainer, means: Sequence[ClassMeans]) -> None:
    """Add up the sums of all ranks."""
    for part in means:
        part.sums = trainer.strategy.reduce(part.sums, reduce_op="sum")
        part.counts = trainer.strategy.reduce(part.counts, reduce_op="sum")


def _add(means: Sequence[ClassMeans], others: Sequence[ClassMeans]) -> None:
    for own, other in zip(means, others, strict=True):
        own.add(other)
