"""Exemplar-free learning with Gaussians of classes that follow the features."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count, check_list, check_number
from lightning_cl.hashing import mix
from lightning_cl.heads import ClassGaussians
from lightning_cl.heads.adaptation import Adaptation, adapt_gaussians
from lightning_cl.reporting.progress import show_progress
from lightning_cl.tasks import Task, compat
from lightning_cl.tasks.adapter_training import AdapterTraining
from lightning_cl.tasks.evaluation import evaluate_samples
from lightning_cl.tasks.feature_regulariser import FeatureRegulariser, Reduction
from lightning_cl.tasks.gaussian_callback import GaussianCallback, GaussianClassifierKind

_FEW = 64  # samples of a Gaussian are enough to try a run out
_SALT = 0xADA


class AdaGauss(GaussianCallback):
    r"""Describe each class by a Gaussian of its features, and move the Gaussians along with them (arXiv 2409.18265).

    No sample of past tasks is kept, but a mean and a covariance of each class, and a copy of the last task's network.
    To the module's loss, which sees the logits of the current task's classes alone, come the anti-collapse loss and,
    from the second task on, projected distillation; see `AntiCollapse` and `ProjectedDistillation`. At the end of a
    task a small network, the adapter, learns to map the features before the task to those after it, on the task's own
    data; samples drawn from each past Gaussian are pushed through it, and their mean and covariance are the new ones.
    Then the classes of the task get Gaussians, from its training images and their mirror images, and the head is made
    of all of them.

    Where the paper and its code differ, each side is an option. The head's defaults are the code's, with which the
    published figures were measured: three times the mean variance is added to each variance, correlations are made of
    the covariances, features and means are brought to length 1, and the determinant is left out. The paper's text says
    a Bayes classifier without shrinkage, ``shrinkage=0.0, correlation=False, normalize=False, log_determinant=True``;
    on small streams it does far worse, since adapted covariances are too narrow in what the adapter does not foresee.
    Distillation takes the mean over the features as the code does, since the published weights go with it. The
    adapter's milestones are the paper's. Unlike both, the adapter is trained on features that are computed once, not on
    freshly augmented images in each of its epochs; ``adapt="diag"`` keeps correlations where the code drops them, and
    ``normalize`` counts for "nearest_mean" too; and in place of a new layer for the classes of each task, the module's
    own classification layer is trained with the other classes hidden.

    Args:
        distillation: Weight of projected distillation (the paper's lambda: 10 from scratch, less for a pretrained
            network).
        anti_collapse: Weight of the anti-collapse loss, in training and in that of the adapter.
        bound: Spread beyond which a feature gains nothing in it (the paper's beta).
        adapt: What of past Gaussians follows the features: nothing, the "mean", means and variances ("diag"), or means
            and covariances ("full").
        classifier: "bayes" takes the class whose Gaussian fits best, "nearest_mean" the one whose mean is nearest, and
            "linear" trains a linear layer on samples drawn from the Gaussians.
        shrinkage: Share of the mean variance that is added to the variances when the head is made.
        correlation: Whether the head makes correlations of the covariances.
        normalize: Whether features and means are brought to length 1 before distances are taken.
        log_determinant: Whether the determinants count, as in a Bayes classifier.
        expansion: How many times wider than the features the hidden layers of projector and adapter are.
        adapter_epochs: Epochs of the adapter's training.
        adapter_lr: Its learning rate.
        adapter_batch_size: Samples of its batches, over all processes.
        adapter_milestones: Shares of its epochs after which the learning rate is a tenth; the code has 0.3, 0.6, 0.9.
        samples: How many samples are drawn of each Gaussian to adapt it; more than there are features.
        adaptation_shrinkage: Share of the mean variance that is added to adapted variances.
        samples_per_class: Features that a "linear" classifier draws of each class.
        reduction: Whether distillation averages over the features or sums them up, see `ProjectedDistillation`.
        warmup: Share of a task's epochs in which nothing but the classification layer and the projector is trained;
            none where only steps limit a task.
        flips: Whether Gaussians and adapter also see the mirror image of each image.
        refresh: When the head is made: at the end of each "task", or after each "epoch" with the classes of the task
            that is trained.
        head: Name of the classification layer; found by its number of outputs if ``None``. The features are its input.

    Attributes:
        gaussians: Of the classes of all tasks that are over; ``None`` before.

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument is out of its range.

    Example::

        >>> AdaGauss(distillation=10, adapt="full").adaptation
        'full'
    """

    acts_innermost = True  # the teacher gets the very batch that the module gets

    def __init__(
        self,
        distillation: float = 10.0,
        anti_collapse: float = 1.0,
        bound: float = 1.0,
        adapt: Adaptation = "full",
        classifier: GaussianClassifierKind = "bayes",
        shrinkage: float = 3.0,
        correlation: bool = True,
        normalize: bool = True,
        log_determinant: bool = False,
        expansion: int = 32,
        adapter_epochs: int = 100,
        adapter_lr: float = 0.01,
        adapter_batch_size: int = 256,
        adapter_milestones: tuple[float, ...] = (0.45, 0.9),
        samples: int = 10_000,
        adaptation_shrinkage: float = 0.0,
        samples_per_class: int = 500,
        reduction: Reduction = "mean",
        warmup: float = 0.01,
        flips: bool = True,
        refresh: Literal["task", "epoch"] = "task",
        head: str | None = None,
    ) -> None:
        check_choice("adapt", adapt, ("none", "mean", "diag", "full"))
        check_count("samples", samples, optional=False)
        check_count("adapter_epochs", adapter_epochs, optional=False)
        check_count("adapter_batch_size", adapter_batch_size, optional=False)
        check_number("adapter_lr", adapter_lr, 0, above=True)
        check_number("adaptation_shrinkage", adaptation_shrinkage, 0)
        check_list("adapter_milestones", adapter_milestones, (int, float), "shares of the epochs")
        for milestone in adapter_milestones:
            check_number("adapter_milestones", milestone, 0, 1)
        super().__init__(
            head=head,
            shrinkage=shrinkage,
            correlation=correlation,
            normalize=normalize,
            log_determinant=log_determinant,
            flips=flips,
            classifier=classifier,
            refresh=refresh,
            samples_per_class=samples_per_class,
        )
        self.adaptation: Adaptation = adapt
        self.samples = samples
        self.adaptation_shrinkage = adaptation_shrinkage
        self.regulariser = FeatureRegulariser(
            anti_collapse,
            bound,
            distillation,
            expansion,
            reduction,
            warmup,
            head=head,
            name=self.name,
            keeps_teacher=adapt != "none",
        )
        self.adapter_training = AdapterTraining(
            adapter_epochs,
            adapter_lr,
            tuple(adapter_milestones),
            adapter_batch_size,
            anti_collapse=anti_collapse,
            bound=bound,
            expansion=expansion,
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for callback in compat.callbacks_of(trainer):
            if isinstance(callback, FeatureRegulariser):
                raise MisconfigurationException(
                    f"{self.name} has the term of {type(callback).__name__} already. Take one of the two out."
                )
        self.regulariser.setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.regulariser.on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.regulariser.on_train_start(trainer, pl_module)
        width = self.shape[1]
        if self.adaptation in ("diag", "full") and self.samples <= width:
            raise MisconfigurationException(
                f"`samples={self.samples}` of {self.name} give no covariance of {width} features. Draw more"
                " samples than there are features, or say `adapt='mean'`."
            )
        if self.gaussians is not None and self.adaptation != "none" and self.regulariser.teacher is None:
            raise MisconfigurationException(
                f"{self.name} was resumed with `adapt={self.adaptation!r}`, and the checkpoint has no"
                " teacher, since it was written with `adapt='none'` and `distillation=0`. Go on with these."
            )

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        self.regulariser.on_task_start(trainer, pl_module, task)

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        def own_step(given: Any) -> Any:
            return super(AdaGauss, self).around_training_step(trainer, pl_module, given, batch_idx, step)

        return self.regulariser.around_training_step(trainer, pl_module, batch, batch_idx, own_step)

    @override
    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        return self.regulariser.training_loss(trainer, pl_module, batch, batch_idx, outputs)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.regulariser.on_after_backward(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.regulariser.on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self.regulariser.on_batch_trained(trainer, pl_module, batch_idx)
        super().on_batch_trained(trainer, pl_module, batch_idx)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        self.regulariser.on_task_end(trainer, pl_module, task)  # the teacher of this task was needed till now

    @override
    def take(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> ClassGaussians:
        gaussians = super().take(trainer, pl_module, task)
        if not gaussians.finite:
            raise ValueError(
                f"{self.name} needs finite features, and those of task {task.index} ({task.name}) are not:"
                " its training diverged. Use a smaller learning rate, a smaller `distillation`, or"
                " `Trainer(gradient_clip_val=1)`."
            )
        return gaussians

    @override
    def adapt(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.gaussians is None or self.adaptation == "none":
            return
        adapter = self.train_adapter(trainer, pl_module, task)
        generator = torch.Generator().manual_seed(mix(self.stream.seed, _SALT, task.index))
        count = min(self.samples, _FEW) if trainer.fast_dev_run else self.samples  # type: ignore[attr-defined]
        moved = adapt_gaussians(self.gaussians, adapter, self.adaptation, count, generator, self.adaptation_shrinkage)
        if not moved.finite:
            raise ValueError(
                f"{self.name} cannot bring Gaussians along with task {task.index} ({task.name}): what its"
                " adapter puts out is not finite. Use a smaller `adapter_lr`; if the features themselves have grown,"
                " a smaller learning rate, or `Trainer(gradient_clip_val=1)`."
            )
        # computed on each rank from the same numbers, and the same to the bit all the same
        moved.load_state_dict(trainer.strategy.broadcast(moved.state_dict()))
        self.gaussians = moved

    def train_adapter(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> Callable[[Tensor], Tensor]:
        """Return what maps features before a task to features after it; to be called on all ranks, at the task's end.

        It takes features on any device.
        """

        def of_batch(batch: Any) -> Tensor:
            views = [batch, self._flipped(batch)] if self.flips else [batch]
            before = [self.regulariser.teacher_features(pl_module, view) for view in views]
            after = [self.features_of(pl_module, view).float() for view in views]
            return torch.cat([*before, *after], dim=1)

        samples = self.samples_of(trainer, task)
        rows = evaluate_samples(trainer, pl_module, self.stream, task.index, samples, of_batch)
        before, after = (part.reshape(-1, self.shape[1]) for part in rows.to(pl_module.device).chunk(2, dim=1))
        tries_out = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        training = replace(self.adapter_training, epochs=1) if tries_out else self.adapter_training
        progress = partial(show_progress, trainer, description="Adapter")
        adapter = training.run(trainer, before, after, self.stream.seed, task.index, progress)
        return lambda features: adapter(features.to(before.device))

    @override
    def forget(self) -> None:
        super().forget()
        self.regulariser.forget()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        self.regulariser.match_optimizer(checkpoint, None if state is None else state["regulariser"])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "regulariser": self.regulariser.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.regulariser.load_state_dict(state_dict["regulariser"])
