"""What the callbacks share whose head is made of Gaussians of the classes."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count, check_number
from lightning_cl.hashing import mix
from lightning_cl.heads import ClassGaussians, ClassMeans, GaussianHead, NearestMeanHead
from lightning_cl.heads.class_gaussians import Covariance
from lightning_cl.heads.gaussian_head import Prior
from lightning_cl.heads.sampled_linear import LinearHead, fit_linear
from lightning_cl.tasks.batches import as_labels, describe, replace_part
from lightning_cl.tasks.evaluation import evaluating, sample_batches
from lightning_cl.tasks.head import HeadCallback
from lightning_cl.tasks.stream_means import Source, refuse_infinite_losses, validates_before_means
from lightning_cl.tasks.task import Task

GaussianClassifierKind = Literal["bayes", "nearest_mean", "linear"]

_FEW = 16  # samples are enough to try a run out
_SALT = 0x6A055
_FIXED = ("covariance", "normalize", "classifier")  # options that a checkpoint's head must share


class GaussianCallback(HeadCallback):
    """Base class of callbacks that keep a Gaussian of each class's features and predict by them.

    At the end of each task, one pass over its training data as an evaluation sees it gives the Gaussians of its
    classes. No sample is kept. A class that comes again in a later task is merged into its Gaussian.

    `adapt` is what a method overrides that moves the Gaussians of past classes after the network that has changed.

    Args:
        head: Name of the classification layer; found by its number of outputs if ``None``.
        covariance: "full" keeps a matrix of each class, "diagonal" variances only, "shared" one matrix for all.
        shrinkage: Share of the mean variance that is added to the variances when the head is made.
        off_diagonal_shrinkage: Share of the mean covariance that is added to the others.
        correlation: Whether the head takes correlations in place of covariances.
        normalize: Whether features and means are brought to length 1; a "linear" classifier takes them as they are.
        log_determinant: Whether the head minds the determinants of the covariances.
        prior: Whether classes are equally probable, or as their "counts" are.
        temperature: What scores are divided by.
        flips: Whether the mirror image of each image is taken as one more sample.
        classifier: "bayes" takes the class of the greatest density, "nearest_mean" that of the nearest mean, "linear"
            trains a linear layer on features drawn from the Gaussians.
        refresh: Whether the head is made at the end of each "task", or also after each "epoch", with Gaussians of the
            current task's data that are not kept.
        samples_per_class: Features that a "linear" classifier draws of each class.

    Attributes:
        gaussians: Those of the tasks that are over, on the CPU; ``None`` before.
    """

    def __init__(
        self,
        head: str | None = None,
        covariance: Covariance = "full",
        shrinkage: float = 0.0,
        off_diagonal_shrinkage: float = 0.0,
        correlation: bool = False,
        normalize: bool = False,
        log_determinant: bool = True,
        prior: Prior = "equal",
        temperature: float = 1.0,
        flips: bool = False,
        classifier: GaussianClassifierKind = "bayes",
        refresh: Literal["task", "epoch"] = "task",
        samples_per_class: int = 500,
    ) -> None:
        check_choice("covariance", covariance, ("full", "diagonal", "shared"))
        check_choice("prior", prior, ("equal", "counts"))
        check_choice("classifier", classifier, ("bayes", "nearest_mean", "linear"))
        check_choice("refresh", refresh, ("task", "epoch"))
        check_number("shrinkage", shrinkage, 0)
        check_number("off_diagonal_shrinkage", off_diagonal_shrinkage, 0)
        check_number("temperature", temperature, 0, above=True)
        check_count("samples_per_class", samples_per_class, optional=False)
        if covariance == "diagonal" and off_diagonal_shrinkage:
            raise ValueError(
                f"`off_diagonal_shrinkage={off_diagonal_shrinkage}` has nothing to shrink where"
                " `covariance='diagonal'`. Leave it out, or say `covariance='full'`."
            )
        super().__init__(head)
        self.covariance: Covariance = covariance
        self.flips = flips
        self.refresh = refresh
        self.samples_per_class = samples_per_class
        self.options: dict[str, Any] = {
            "covariance": covariance,
            "shrinkage": float(shrinkage),
            "off_diagonal_shrinkage": float(off_diagonal_shrinkage),
            "correlation": correlation,
            "normalize": normalize,
            "log_determinant": log_determinant,
            "prior": prior,
            "temperature": float(temperature),
            "classifier": classifier,
        }
        self.gaussians: ClassGaussians | None = None
        self._committed = -1  # the last task whose Gaussians there are
        self._current: ClassGaussians | None = None  # of the current task's data, since the last batch
        self._of_gaussians: nn.Module | None = None  # the head that can be made again from what is kept

    def adapt(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Change ``self.gaussians``, those of past tasks, before the finished task's are added; on all ranks.

        What is done must come out the same on every rank.
        """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.gaussians = self._current = self._of_gaussians = None
            self._committed = -1
            if self.refresh == "task" or validates_before_means(trainer, self.stream):
                refuse_infinite_losses(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.flips:
            task = self.stream.current_task.index
            with evaluating(trainer, pl_module):
                _, batch = next(sample_batches(trainer, pl_module, self.stream, task, torch.arange(1), every_rank=True))
                self._flipped(batch)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._current = None

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self._current = None
        if self.refresh == "epoch" and trainer.is_last_batch:
            self._current = self.take(trainer, pl_module, self.stream.current_task)
            self.learn(self.head_of(trainer, self._merged(self._current)))

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.adapt(trainer, pl_module, task)
        current = self.take(trainer, pl_module, task) if self._current is None else self._current
        self.gaussians, self._current, self._committed = self._merged(current), None, task.index
        self._of_gaussians = self.head_of(trainer, self.gaussians)
        self.learn(self._of_gaussians)

    def take(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> ClassGaussians:
        """Return the Gaussians of a task's training data under the weights of this moment; to be called on all ranks.

        They are on the CPU, and the same on every rank.
        """
        own = ClassGaussians(*self.shape, self.covariance, pl_module.device)
        with evaluating(trainer, pl_module):
            indices = self.samples_of(trainer, task)
            for _, batch in sample_batches(trainer, pl_module, self.stream, task.index, indices):
                labels = as_labels(self.stream.structure.find_targets(batch))
                own.update(self.features_of(pl_module, batch), labels)
                if self.flips:
                    own.update(self.features_of(pl_module, self._flipped(batch)), labels)
        return merged_over_ranks(trainer, own)

    def samples_of(self, trainer: Trainer, task: Task) -> Tensor:
        """Return which training samples of a task are looked at: all, or in a ``fast_dev_run`` a few."""
        indices = self._all_of(task.index).indices
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            return indices
        return indices[:: max(1, len(indices) // _FEW)]  # data are often sorted by class

    def head_of(self, trainer: Trainer, gaussians: ClassGaussians) -> nn.Module | None:
        """Return the head of Gaussians, the same on every rank; ``None`` if they know no class."""
        if self.options["classifier"] != "linear" or not bool(gaussians.known.any()):
            return _head_of(gaussians, self.options)
        head = None
        if trainer.is_global_zero:
            generator = torch.Generator().manual_seed(mix(self.stream.seed, _SALT, self.stream.current_task.index))
            head = fit_linear(gaussians, self.samples_per_class, generator)
        return trainer.strategy.broadcast(head)

    @property
    def memory_per_class(self) -> int:
        """How many numbers are kept of each class, 0 before any; a shared covariance is kept once and not in them."""
        return 0 if self.gaussians is None else self.gaussians.numbers_per_class

    @override
    def sources(self) -> dict[int, Source]:
        task = self.stream.current_task.index
        return {task: self._all_of(task)}

    @override
    def learn_from(self, trainer: Trainer, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> nn.Module | None:
        if self.gaussians is not None and self._committed >= self.stream.current_task.index:
            return self.head_of(trainer, self.gaussians)  # they have all that the rows are a sample of
        own = ClassGaussians(*self.shape, self.covariance, trainer.lightning_module.device)
        for features, labels, weights in rows:
            own.update(features, labels, weights)
        return self.head_of(trainer, self._merged(merged_over_ranks(trainer, own)))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the Gaussians, and the head unless it can be made from them."""
        kept = self.classifier is not None and self.classifier is self._of_gaussians
        if kept and self.options["classifier"] != "linear":
            state: dict[str, Any] = {"layer": self._layer, "classifier": None}
        else:
            state = super().state_dict()
        gaussians = None if self.gaussians is None else self.gaussians.state_dict()
        return {**state, "options": dict(self.options), "gaussians": gaussians, "committed": self._committed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, name = state_dict["options"], self.name
        for option in _FIXED:
            if saved[option] != self.options[option]:
                raise MisconfigurationException(
                    f"The checkpoint's Gaussians were taken with `{option}={saved[option]!r}`, this {name} has"
                    f" `{option}={self.options[option]!r}`."
                )
        gaussians = state_dict["gaussians"]
        self.gaussians = None if gaussians is None else ClassGaussians.from_state(gaussians)
        self._committed, self._current = state_dict["committed"], None
        # a checkpoint may be tested with other options of the head
        super().load_state_dict({**state_dict, "options": self.options})
        self._of_gaussians = self.classifier if state_dict["classifier"] is None else None

    @classmethod
    @override
    def build(cls, state: dict[str, Any]) -> nn.Module | None:
        tensors, options = state["classifier"], state["options"]
        if tensors is None:
            return _head_of(ClassGaussians.from_state(state["gaussians"]), options)
        if not tensors:
            return None
        kind = options["classifier"]
        shape = tensors[{"bayes": "means", "nearest_mean": "prototypes", "linear": "weight"}[kind]].shape
        head = LinearHead(shape[1], shape[0]) if kind == "linear" else _empty_head(shape[0], shape[1], options)
        head.load_state_dict(tensors)
        return head.requires_grad_(False)

    def _merged(self, current: ClassGaussians) -> ClassGaussians:
        """Return past and current Gaussians together."""
        total = ClassGaussians(*self.shape, self.covariance)
        if self.gaussians is not None:
            total.add(self.gaussians)
        total.add(current)
        return total

    def _all_of(self, task: int) -> Source:
        return Source(torch.arange(self.stream.samples_of(task) or 0), self.stream.labels_of(task, read=False))

    def _flipped(self, batch: Any) -> Any:
        try:
            images = self.stream.structure.find_inputs(batch)
        except ValueError:
            images = None
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise MisconfigurationException(
                f"`flips=True` of {self.name} mirrors images, (batch, channels, height, width), and the batch"
                f" has {describe(batch if images is None else images)}. Say `flips=False`, or name the images with"
                " `inputs=...` on the task sequence."
            )
        return replace_part(batch, images, images.flip(-1))


def merged_over_ranks(trainer: Trainer, own: ClassGaussians) -> ClassGaussians:
    """Return the Gaussians of all ranks' samples, on the CPU and the same on every rank to the bit."""
    states: list[Any] = [own.state_dict()]
    if trainer.world_size > 1:
        states = [None] * trainer.world_size
        torch.distributed.all_gather_object(states, own.state_dict())
    num_classes, width = own.means.shape
    total = ClassGaussians(num_classes, width, own.covariance)
    for state in states:
        total.add(ClassGaussians.from_state(state))
    return total


def _head_of(gaussians: ClassGaussians, options: dict[str, Any]) -> nn.Module | None:
    if not bool(gaussians.known.any()):
        return None
    num_classes, width = gaussians.means.shape
    head = _empty_head(num_classes, width, options)
    if isinstance(head, GaussianHead):
        names = ("shrinkage", "off_diagonal_shrinkage", "correlation", "prior")
        head.set_gaussians(gaussians, **{name: options[name] for name in names})
    else:
        means = ClassMeans(num_classes, width, options["normalize"])
        means.sums, means.counts = gaussians.means, gaussians.known.double()
        head.set_means(means)
    return head


def _empty_head(num_classes: int, width: int, options: dict[str, Any]) -> GaussianHead | NearestMeanHead:
    normalize, temperature = options["normalize"], options["temperature"]
    if options["classifier"] == "nearest_mean":
        return NearestMeanHead(num_classes, width, normalize, temperature)
    return GaussianHead(num_classes, width, options["covariance"], normalize, options["log_determinant"], temperature)
