"""What the callbacks share that keep a network near to what it was, without exemplars."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_number
from lightning_cl.heads import pool_positions
from lightning_cl.taps import ClassMask, LogitTap, layer_named
from lightning_cl.tasks import compat
from lightning_cl.tasks.evaluation import find_call
from lightning_cl.tasks.exit_callback import ExitCallback
from lightning_cl.tasks.other_weights import WithWeights, held_in_eval_mode
from lightning_cl.tasks.stream_callback import StreamCallback
from lightning_cl.tasks.task import Task


class Regulariser(StreamCallback):
    """Base class of behaviours that add a term which holds the network to its past.

    While a task is trained, the module's own loss sees the logits of some classes only; see ``task_classes_only``. A
    fit without a task sequence has no past: nothing is added to it, and nothing hidden from it.

    Args:
        weight: Weight of the term.
        task_classes_only: Whether the module's loss sees the logits of the current task's classes alone, or, where past
            samples are replayed, those of all classes seen so far. The others are hidden from it by very low values.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Attributes:
        classes: The classes of the tasks that are over.
    """

    acts_innermost = True  # replay may give the module other rows
    needs_gradients = False  # whether logits are asked for to differentiate them

    def __init__(self, weight: float, task_classes_only: bool = True, head: str | None = None) -> None:
        check_number("weight", weight, 0)
        self.weight = weight
        self.task_classes_only = task_classes_only
        self.head = head
        self.classes: tuple[int, ...] = ()
        self._layer: str | None = None
        self._call: WithWeights | None = None
        self._mask = ClassMask(())
        self._read_classes: dict[int, tuple[int, ...]] = {}
        self._tap: LogitTap | None = None

    def reset(self) -> None:
        """Forget all tasks: a fit begins."""
        self.classes = ()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.reset()
        self.forget()
        if self.find_stream(trainer):
            self._check(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.in_stream:
            self.check_labels()
            self._layer = self.find_layer(pl_module, self.head)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.in_stream:
            return
        # a layer that is named may grow with the classes
        width = {} if self.head is None else {"num_outputs": None}
        options = {"head": self.layer, "differentiable": self.needs_gradients, **width}
        call, few = find_call(trainer, pl_module, self.stream, **options)
        self._call = WithWeights(pl_module, call)
        self.look_at_batch(trainer, pl_module, few)
        task = self.stream.current_task
        if task.index > 0 and not self.classes:
            rank_zero_warn(
                f"{self.name} begins at task {task.index} ({task.name}) without a past: the checkpoint holds"
                " none, so nothing holds the network in this task."
            )

    def look_at_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Called before the first step with a few real samples on the device; `call` is known by then."""

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        if not self.in_stream:
            return step(batch)
        mask = self.class_mask() if self.task_classes_only else None
        # by name: a module may put a new layer in the place of the old one
        self._tap = LogitTap(layer_named(pl_module, self.layer), mask)
        with self._tap:
            return step(batch)

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self._tap = None

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.in_stream:
            self.classes = self._with_past(self.classes_of(task))

    @override
    def forget(self) -> None:
        super().forget()
        self._call = self._tap = self._layer = None
        self._read_classes = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.in_stream or not self.classes:  # a test must not replace what a fit learnt
            self.restore(state_dict)

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Take over what was learnt of past tasks.

        Args:
            state_dict: What `state_dict` returned.
        """
        self.classes = tuple(state_dict["classes"])

    @property
    def layer(self) -> str:
        """Name of the classification layer."""
        if self._layer is None:
            raise RuntimeError(f"{self.name} was asked for its layer outside a fit of a task sequence.")
        return self._layer

    @property
    def call(self) -> WithWeights:
        """Calls the module for logits, with any weights."""
        if self._call is None:
            raise RuntimeError(f"{self.name} was asked for logits before training began.")
        return self._call

    def classes_of(self, task: Task) -> tuple[int, ...]:
        """Return the classes of a task, read from its data where the data set does not say."""
        if task.classes is not None:
            return task.classes
        if task.index not in self._read_classes:
            labels = self.stream.labels_of(task.index)
            self._read_classes[task.index] = () if labels is None else tuple(sorted(set(labels.tolist())))
        return self._read_classes[task.index]

    def class_mask(self) -> ClassMask:
        """Return what hides the classes that are not trained now."""
        classes = self.classes_of(self.stream.current_task)
        if self.stream.replay is not None:
            classes = self._with_past(classes)
        if self._mask.classes != classes:
            self._mask = ClassMask(classes)
        return self._mask

    def student_logits(self) -> Tensor:
        """Return what the classification layer put out in this training step, unmasked, ``(batch, outputs)``.

        Raises:
            ValueError: If ``training_step`` did not call the layer.
        """
        if self._tap is None or self._tap.logits is None:
            raise ValueError(
                f"{self.name} reads the logits of `head={self.layer!r}` in each training step, and"
                " `training_step` did not call that layer. Name the one that it calls with `head=...`."
            )
        return pool_positions(self._tap.logits)

    def logits_with(
        self, pl_module: LightningModule, weights: dict[str, Tensor], batch: Any, gradients: bool = False
    ) -> Tensor:
        """Return the logits of a batch with other weights, in eval mode, ``(batch, outputs)``.

        Args:
            pl_module: The module.
            weights: Parameters and buffers by name, on the module's device.
            batch: The batch, on the same device.
            gradients: Whether operations on what requires gradients are recorded; the weights need not.
        """
        with held_in_eval_mode(pl_module, gradients):
            return self.call.with_weights(weights, batch)

    def past_logits(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return what teacher and student say of the training batch about past classes, ``(batch, past classes)``.

        The student's are those of the module's own step. Where the layer has grown since, the teacher knows fewer
        classes, and these are compared.

        Args:
            wanted: The teacher's logits of the batch, ``(batch, outputs)``.

        Raises:
            ValueError: If the step put another number of rows through the layer than the batch has.
        """
        student = self.student_logits()
        self.check_rows(wanted, student)
        past = [label for label in self.classes if label < min(wanted.shape[1], student.shape[1])]
        return wanted[:, past].float(), student[:, past].float()

    def check_rows(self, wanted: Tensor, own: Tensor) -> None:
        """Refuse to compare what teacher and student say of different numbers of rows."""
        if len(wanted) != len(own):
            raise ValueError(
                f"`training_step` put {len(own)} rows through `head={self.layer!r}` at last, and the batch has"
                f" {len(wanted)}, so {self.name} cannot compare them. Let the step call the layer once, with"
                " a row for each sample."
            )

    def _with_past(self, classes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({*self.classes, *classes}))

    def _check(self, trainer: Trainer) -> None:
        name = self.name
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"{name} keeps a whole copy of the weights, and `Trainer(strategy=...)` is"
                f" {type(trainer.strategy).__name__}, which cuts them into shards. Use `ddp`."
            )
        if any(isinstance(callback, ExitCallback) for callback in compat.callbacks_of(trainer)):
            raise MisconfigurationException(
                f"{name} knows one classification layer, and early exits train others beside it, which it would not"
                " hold to their past. Take one of the two out."
            )
        self.check_indexed(self.stream.tasks)
