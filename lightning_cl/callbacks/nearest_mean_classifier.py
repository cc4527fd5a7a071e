"""Nearest-mean classification in place of the classification layer."""

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count
from lightning_cl.heads import ClassMeans, NearestMeanHead
from lightning_cl.tasks import Task
from lightning_cl.tasks.head import HeadCallback
from lightning_cl.tasks.stream_means import (
    Prototypes,
    Source,
    StreamMeans,
    reduce_means,
    refuse_infinite_losses,
    validates_before_means,
)


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
        self._known_means: StreamMeans | None = None
        self._refreshed_at = -1  # optimizer steps

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._known_means = StreamMeans(self.stream, self.prototypes, [], self.normalize, self._features)
            self._refreshed_at = -1
            if self.refresh != "epoch" or self.prototypes == "memory" or validates_before_means(trainer, self.stream):
                refuse_infinite_losses(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.prototypes == "memory" and self.means.memory is None:
            raise MisconfigurationException(
                "`prototypes='memory'` of NearestMeanClassifier needs a replay memory. Add `Replay(size=...)`, or say"
                " `prototypes='all'`."
            )
        super().on_train_start(trainer, pl_module)
        self.means.shapes = [self.shape]

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self.means.forget_current()
        if self.refresh == "epoch":
            due = trainer.is_last_batch
        else:
            step = trainer.global_step
            due = isinstance(self.refresh, int) and step not in (0, self._refreshed_at) and step % self.refresh == 0
        if due:
            self.refresh_now(trainer, pl_module)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.means.forget_current()

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._take_means(trainer, pl_module)
        self.means.keep(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        past = None if self._known_means is None else self._known_means.state_dict()
        options = {"normalize": self.normalize, "temperature": self.temperature}
        return {**super().state_dict(), **options, "past": past, "refreshed_at": self._refreshed_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["normalize"] != self.normalize:
            raise MisconfigurationException(
                f"The checkpoint's prototypes were taken with `normalize={state_dict['normalize']}`, this"
                f" NearestMeanClassifier has `normalize={self.normalize}`."
            )
        self._refreshed_at = state_dict["refreshed_at"]
        if self._known_means is not None:
            self._known_means.load_state_dict(state_dict["past"])
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

    @override
    def sources(self) -> dict[int, Source]:
        return self.means.sources()

    @override
    def learn_from(self, trainer: Trainer, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> NearestMeanHead | None:
        means = self.means.empty(trainer.lightning_module)
        for features, labels, weights in rows:
            means[0].update(features, labels, weights)
        reduce_means(trainer, means)
        self.means.add_past(means)
        return self._head_of(means[0])

    @property
    def means(self) -> StreamMeans:
        """What the prototypes are means of, in the running fit."""
        if self._known_means is None:
            raise RuntimeError("NearestMeanClassifier was asked for its means before a fit.")
        return self._known_means

    def refresh_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the means anew; to be called on all ranks."""
        self.means.forget_current()
        self._take_means(trainer, pl_module)

    def _take_means(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refreshed_at = trainer.global_step
        head = self._head_of(self.means.summed_up(trainer, pl_module)[0])
        if head is not None:
            self.learn(head)

    def _head_of(self, means: ClassMeans) -> NearestMeanHead | None:
        """Return a head with these means; classes that have none keep their prototypes."""
        head = NearestMeanHead(*self.shape, self.normalize, self.temperature).to(means.sums.device)
        if isinstance(self.classifier, NearestMeanHead):
            head.load_state_dict(self.classifier.state_dict())
        head.set_means(means)
        return head if bool(head.known.any()) else None

    def _features(self, pl_module: LightningModule, batch: Any) -> list[Tensor]:
        return [self.features_of(pl_module, batch)]
