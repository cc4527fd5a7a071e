"""Nearest-mean classification in place of the classification layer."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count
from lightning_cl.heads import ClassMeans, NearestMeanHead
from lightning_cl.memory import ReplayMemory
from lightning_cl.tasks import Task, compat
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.evaluation import evaluating, sample_batches
from lightning_cl.tasks.head import HeadCallback, Source

Prototypes = Literal["memory+current", "memory", "all"]


class NearestMeanClassifier(HeadCallback):
    """Predict the class whose mean feature is nearest (NMC, arXiv 2411.04723; iCaRL, arXiv 1611.07725).

    Training is untouched. In eval mode the classification layer's output is replaced by nearest-mean scores of its
    input (minus the squared distance, with minus infinity for classes that were not seen), so the module's own
    validation, test and predict steps and their metrics use them. Before the first means are known, the layer answers
    for itself.

    The prototypes are means of features of training samples as an evaluation sees them, without augmentation. They are
    part of the checkpoint: ``trainer.test(ckpt_path=...)`` and `lightning_cl.load` have them.

    Args:
        head: Name of the classification layer; found by its number of outputs if ``None``.
        prototypes: "memory+current" takes past classes from the replay memory and the others from all data of the
            current task; without a memory, past classes keep the means that they had when their task ended. "memory"
            takes all from the memory. "all" takes every sample of the stream, at the end of its task: exact where the
            backbone is frozen.
        refresh: When means are taken: after each "epoch" and at the task's end, at the end of each "task" only, or
            after so many optimizer steps.
        normalize: Whether features and means are brought to length 1.
        temperature: What scores are divided by.

    Example::

        >>> NearestMeanClassifier(refresh="task").prototypes
        'memory+current'
    """

    def __init__(
        self,
        head: str | None = None,
        prototypes: Prototypes = "memory+current",
        refresh: Literal["epoch", "task"] | int = "epoch",
        normalize: bool = True,
        temperature: float = 1.0,
    ) -> None:
        check_choice("prototypes", prototypes, ("memory+current", "memory", "all"))
        if isinstance(refresh, int) and not isinstance(refresh, bool):
            check_count("refresh", refresh)
        elif refresh not in ("epoch", "task"):
            raise ValueError(f"`refresh` must be 'epoch', 'task' or a number of optimizer steps, got {refresh!r}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}.")
        super().__init__(head)
        self.prototypes = prototypes
        self.refresh = refresh
        self.normalize = normalize
        self.temperature = temperature
        self._past: ClassMeans | None = None  # of tasks that are over, where no memory has their samples
        self._current: ClassMeans | None = None  # of the current task's data, since the last batch
        self._refreshed_at = -1  # optimizer steps

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._past = self._current = None
            self._refreshed_at = -1
            self._check_early_stopping(trainer)

    def _check_early_stopping(self, trainer: Trainer) -> None:
        """Refuse early stopping on a loss that would be infinite, since a class has no prototype when it is scored."""
        later = max(self.stream.served_tasks("val"), default=0) > self.stream.current_task.index
        if self.refresh == "epoch" and self.prototypes != "memory" and not later:
            return
        for callback in compat.callbacks_of(trainer):
            if isinstance(callback, EarlyStopping) and callback.check_finite and _is_loss(callback.monitor):
                raise MisconfigurationException(
                    f"Early stopping on {callback.monitor!r} would end each task when it is infinite, as it is while a"
                    " validated class has no prototype and so scores minus infinity. Monitor an accuracy, or say"
                    " `check_finite=False`."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.prototypes == "memory" and self._memory is None:
            raise MisconfigurationException(
                "`prototypes='memory'` of NearestMeanClassifier needs a replay memory. Add `Replay(size=...)`, or say"
                " `prototypes='all'`."
            )
        super().on_train_start(trainer, pl_module)

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self._current = None
        if self.refresh == "epoch":
            due = trainer.is_last_batch
        else:
            step = trainer.global_step
            due = isinstance(self.refresh, int) and step not in (0, self._refreshed_at) and step % self.refresh == 0
        if due:
            self.refresh_now(trainer, pl_module)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._current = None

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._take_means(trainer, pl_module)
        if self._sums_up:
            self._past = self._summed_up(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        past = None if self._past is None else self._past.state_dict()
        options = {"normalize": self.normalize, "temperature": self.temperature}
        return {**super().state_dict(), **options, "past": past, "refreshed_at": self._refreshed_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["normalize"] != self.normalize:
            raise MisconfigurationException(
                f"The checkpoint's prototypes were taken with `normalize={state_dict['normalize']}`, this"
                f" NearestMeanClassifier has `normalize={self.normalize}`."
            )
        self._past = self._current = None
        self._refreshed_at = state_dict["refreshed_at"]
        if state_dict["past"] is not None:
            num_classes, width = state_dict["past"]["sums"].shape
            self._past = ClassMeans(num_classes, width, self.normalize)
            self._past.load_state_dict(state_dict["past"])
        # a checkpoint may be tested at another temperature
        super().load_state_dict({**state_dict, "temperature": self.temperature})

    @classmethod
    @override
    def build(cls, state: dict[str, Any]) -> NearestMeanHead | None:
        if not state["classifier"]:
            return None
        num_classes, width = state["classifier"]["prototypes"].shape
        classifier = NearestMeanHead(num_classes, width, state["normalize"], state["temperature"])
        classifier.load_state_dict(state["classifier"])
        return classifier

    @property
    def _memory(self) -> ReplayMemory | None:
        return None if self.stream.replay is None else self.stream.replay.memory

    @property
    def _sums_up(self) -> bool:
        """Whether the sums of past tasks are kept, since no memory has their samples."""
        return self.prototypes == "all" or (self.prototypes == "memory+current" and self._memory is None)

    @override
    def sources(self) -> dict[int, Source]:
        task = self.stream.current_task.index
        current = {} if self.prototypes == "memory" else {task: self._all_of(task)}
        return {**self._remembered(), **current}

    @override
    def learn_from(self, trainer: Trainer, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> NearestMeanHead | None:
        means = self._no_means(trainer.lightning_module)
        for features, labels, weights in rows:
            means.update(features, labels, weights)
        self._reduce(trainer, means)
        if self._sums_up and self._past is not None:
            means.add(self._past)
        return self._head_of(means)

    def _all_of(self, task: int) -> Source:
        return Source(torch.arange(self.stream.samples_of(task) or 0), self.stream.labels_of(task, read=False))

    def _remembered(self) -> dict[int, Source]:
        """Return the samples that come from the memory, by task."""
        task, memory = self.stream.current_task.index, self._memory
        if self._sums_up or memory is None:
            return {}
        tasks = [t for t in memory.task_counts if self.prototypes == "memory" or t != task]
        return {t: Source(memory.indices[memory.tasks == t], memory.labels[memory.tasks == t].long()) for t in tasks}

    def refresh_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the means anew; to be called on all ranks."""
        self._current = None
        self._take_means(trainer, pl_module)

    def _take_means(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refreshed_at = trainer.global_step
        head = self._head_of(self._summed_up(trainer, pl_module))
        if head is not None:
            self.learn(head)

    def _head_of(self, means: ClassMeans) -> NearestMeanHead | None:
        """Return a head with these means; classes that have none keep their prototypes."""
        head = NearestMeanHead(*self.shape, self.normalize, self.temperature).to(means.sums.device)
        if isinstance(self.classifier, NearestMeanHead):
            head.load_state_dict(self.classifier.state_dict())
        head.set_means(means)
        return head if bool(head.known.any()) else None

    def _summed_up(self, trainer: Trainer, pl_module: LightningModule) -> ClassMeans:
        """Return the sums over all samples that the prototypes are to be means of."""
        means = self._no_means(pl_module)
        if self._sums_up and self._past is not None:
            means.add(self._past)
        means.add(self._sums(trainer, pl_module, self._remembered()))
        if self.prototypes != "memory":
            if self._current is None:
                task = self.stream.current_task.index
                self._current = self._sums(trainer, pl_module, {task: self._all_of(task)})
            means.add(self._current)
        return means

    def _sums(self, trainer: Trainer, pl_module: LightningModule, sources: dict[int, Source]) -> ClassMeans:
        """Sum up features of samples, given by task, over all ranks."""
        means = self._no_means(pl_module)
        with evaluating(trainer, pl_module):
            for task, source in sources.items():
                for _, batch in sample_batches(trainer, pl_module, self.stream, task, source.indices):
                    labels = as_labels(self.stream.structure.find_targets(batch))
                    means.update(self.features_of(pl_module, batch), labels)
        self._reduce(trainer, means)
        return means

    def _no_means(self, pl_module: LightningModule) -> ClassMeans:
        return ClassMeans(*self.shape, self.normalize, pl_module.device)

    def _reduce(self, trainer: Trainer, means: ClassMeans) -> None:
        means.sums = trainer.strategy.reduce(means.sums, reduce_op="sum")
        means.counts = trainer.strategy.reduce(means.counts, reduce_op="sum")


def _is_loss(monitor: str) -> bool:
    return "loss" in monitor and "train" not in monitor
