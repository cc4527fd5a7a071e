"""What the callbacks share whose loss acts on the features that the classification layer gets."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count, check_number
from lightning_cl.heads import pool_positions
from lightning_cl.heads.anti_collapse import anti_collapse_loss
from lightning_cl.taps import LayerTap, layer_named
from lightning_cl.tasks.clock import TaskClock
from lightning_cl.tasks.other_weights import Weights, on_device
from lightning_cl.tasks.projector import Projector, match_optimizer_state
from lightning_cl.tasks.rank_rows import of_all_ranks
from lightning_cl.tasks.sampler import TaskSampler
from lightning_cl.tasks.standing_still import drop_gradients
from lightning_cl.tasks.task import Task
from lightning_cl.tasks.teacher import TeacherRegulariser

Reduction = Literal["mean", "sum"]


class FeatureRegulariser(TeacherRegulariser):
    """Base class of behaviours whose loss acts on the features: the input of the classification layer.

    Args:
        anti_collapse: Weight of the anti-collapse loss.
        bound: Spread beyond which a feature gains nothing in it.
        distillation: Weight of projected distillation.
        expansion: How many times wider than the features the projector's hidden layer is.
        reduction: Whether distillation takes the mean of the squared differences of a sample's features, or their sum.
        warmup: Share of a task's epochs in which nothing but the classification layer and the projector is trained.
        task_classes_only: Whether the module's loss sees the logits of the current task's classes alone.
        head: Name of the classification layer; found by its number of outputs if ``None``.
        name: What it is called in errors, if it is a part of another callback.
        keeps_teacher: Whether the teacher is kept for others even if nothing is distilled.

    Attributes:
        teacher: Weights and buffers of the last task's end, by name; ``None`` before.
        projector: From features in training to the teacher's; ``None`` outside a fit.
    """

    def __init__(
        self,
        anti_collapse: float = 0.0,
        bound: float = 1.0,
        distillation: float = 0.0,
        expansion: int = 32,
        reduction: Reduction = "mean",
        warmup: float = 0.0,
        task_classes_only: bool = True,
        head: str | None = None,
        name: str | None = None,
        keeps_teacher: bool = False,
    ) -> None:
        check_number("anti_collapse", anti_collapse, 0)
        check_number("bound", bound, 0, above=True)
        check_number("distillation", distillation, 0)
        check_count("expansion", expansion, optional=False)
        check_choice("reduction", reduction, ("mean", "sum"))
        check_number("warmup", warmup, 0, 1)
        super().__init__(distillation, task_classes_only, head)
        self.anti_collapse = anti_collapse
        self.bound = bound
        self.distillation = distillation
        self.expansion = expansion
        self.reduction: Reduction = reduction
        self.warmup = warmup
        self._name = name
        self.keeps_teacher = keeps_teacher or distillation > 0
        self.asks_teacher = distillation > 0
        self.projector: Projector | None = None
        self._projector_state: Weights | None = None  # from a checkpoint, which is read before there is a projector

    @property
    @override
    def name(self) -> str:
        return self._name or super().name

    @override
    def reset(self) -> None:
        super().reset()
        self.projector = self._projector_state = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.anti_collapse:
            reason = "needs to know the classes, to find the classification layer"
            self.need_stream(trainer, reason, sequence="Joint(your_datamodule)")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.in_stream and self.distillation:
            width = features_of_layer(layer_named(pl_module, self.layer))
            if width is None:
                raise MisconfigurationException(
                    f"{self.name} needs the width of the features, and `head={self.layer!r}` is"
                    f" {type(layer_named(pl_module, self.layer)).__name__}, which has no `in_features`. Name the last"
                    " linear layer or 1x1 convolution with `head=...`."
                )
            self.projector = Projector(width, self.expansion, pl_module.device)
            self.projector.draw(self.stream.seed, self.stream.current_task.index)
            if self._projector_state is not None:
                self._check_projector(self._projector_state)
                self.projector.load_state_dict(self._projector_state)
            self.projector.join(trainer)  # before a checkpoint's optimizer state comes

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.match_optimizer(checkpoint, checkpoint["callbacks"].get(self.state_key))

    def match_optimizer(self, checkpoint: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Let a checkpoint's optimizer have a projector if this run's has one, whatever the run before distilled.

        Args:
            checkpoint: The checkpoint that is loaded.
            state: This callback's state in it; ``None`` if it was not there.
        """
        if self.in_stream and checkpoint.get("optimizer_states"):
            had = state is not None and state["projector"] is not None
            match_optimizer_state(checkpoint["optimizer_states"][0], had, self.distillation > 0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.in_stream and self.anti_collapse:
            self._check_batches(trainer, features_of_layer(layer_named(pl_module, self.layer)))

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.projector is not None:
            self.projector.begin_task(trainer, self.stream.seed, task.index)

    @override
    def ask_teacher(self, pl_module: LightningModule, teacher: Weights, batch: Any) -> Tensor:
        """Return the features of a batch under the teacher's weights, ``(batch, width)``."""
        with LayerTap({self.layer: layer_named(pl_module, self.layer)}) as tap:
            self.logits_with(pl_module, teacher, batch)
        return pool_positions(tap.inputs[self.layer]).float()

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        if self.projector is not None:
            self.projector.join(trainer)  # the module may have made a new optimizer in its `on_task_start`
        return super().around_training_step(trainer, pl_module, batch, batch_idx, step)

    @override
    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        if not self.in_stream:
            return None
        terms = []
        features = self.student_features()
        if self.anti_collapse:
            term = self._spread(trainer, features)
            if term is not None:
                terms.append(self.anti_collapse * term)
        if self.projector is not None and self.wanted is not None:
            self.check_rows(self.wanted, features)
            squares = F.mse_loss(self.projector(features), self.wanted, reduction="none")
            each = squares.mean(1) if self.reduction == "mean" else squares.sum(1)
            terms.append(self.distillation * each.mean())
        return sum(terms[1:], terms[0]) if terms else None

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.projector is not None:
            self.projector.average_gradients(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        clock = TaskClock.of(trainer)
        if not self.in_stream or clock is None or clock.progress.epochs >= int(self.warmup * clock.planned_epochs):
            return
        trained: set[Tensor] = set(layer_named(pl_module, self.layer).parameters())
        trained.update(() if self.projector is None else self.projector.parameters())
        drop_gradients(optimizer, lambda parameter: parameter not in trained)

    @override
    def forget(self) -> None:
        super().forget()
        if self.projector is not None:  # a checkpoint may be written after the fit
            self._projector_state = self.projector.state_dict()
        self.projector = None

    @override
    def state_dict(self) -> dict[str, Any]:
        projector = self._projector_state if self.projector is None else self.projector.state_dict()
        return {**super().state_dict(), "projector": projector}

    @override
    def restore(self, state_dict: dict[str, Any]) -> None:
        super().restore(state_dict)
        self._projector_state = state_dict["projector"]
        if self.projector is not None and self._projector_state is not None:
            self.projector.load_state_dict(self._projector_state)

    def student_features(self) -> Tensor:
        """Return what the classification layer got in this training step, ``(batch, width)``."""
        self.student_logits()  # or the layer was not called
        features = None if self._tap is None else self._tap.features
        if features is None or pool_positions(features).ndim != 2:
            raise ValueError(
                f"{self.name} needs one row of features for each sample, and `head={self.layer!r}` gets"
                f" {'no tensor' if features is None else tuple(features.shape)}."
            )
        return pool_positions(features).float()

    def teacher_features(self, pl_module: LightningModule, batch: Any) -> Tensor:
        """Return the features of a batch under the teacher's weights, in eval mode, ``(batch, width)``."""
        if self.teacher is None:
            raise RuntimeError(f"{self.name} was asked for its teacher before the first task had ended.")
        self.teacher = on_device(self.teacher, pl_module.device)
        return self.ask_teacher(pl_module, self.teacher, batch)

    def _spread(self, trainer: Trainer, features: Tensor) -> Tensor | None:
        """Return the anti-collapse loss of the whole batch; ``None`` for a rest of an epoch that is too small."""
        rows = of_all_ranks(trainer, features)
        if len(rows) <= rows.shape[1]:
            return None
        loss = anti_collapse_loss(rows, self.bound)
        # each rank's gradient is that of its own rows, and DDP divides their sum by the number of ranks
        return loss.detach() + trainer.world_size * (loss - loss.detach())

    def _check_projector(self, state: Weights) -> None:
        hidden, width = state["widen.weight"].shape
        if hidden != self.expansion * width:
            raise MisconfigurationException(
                f"The checkpoint's projector has `expansion={hidden // width}`, this {self.name} has"
                f" `expansion={self.expansion}`."
            )

    def _check_batches(self, trainer: Trainer, width: int | None) -> None:
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if width is None or not isinstance(sampler, TaskSampler):
            return
        replayed = self.stream.replay is not None
        for task in self.stream.tasks:
            rows = sampler.global_batch
            rows = rows if replayed else min(rows, self.stream.samples_of(task.index) or rows)
            if rows <= width:
                raise MisconfigurationException(
                    f"The anti-collapse loss of {self.name} needs more samples in a batch than there are"
                    f" features, and in task {task.index} ({task.name}) a batch has {rows} samples, while"
                    f" `head={self.layer!r}` gets {width} features. Use a larger `batch_size`, or put a linear layer of"
                    " fewer features before the classification layer."
                )


def features_of_layer(layer: torch.nn.Module) -> int | None:
    """Return how many features a linear layer or a convolution gets; ``None`` if it does not say."""
    width = getattr(layer, "in_features", getattr(layer, "in_channels", None))
    return width if isinstance(width, int) else None
