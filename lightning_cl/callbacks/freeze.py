"""Layers that stand still from a task on."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.arguments import check_list
from lightning_cl.taps import find_head
from lightning_cl.tasks import ContinualCallback, Task, TaskClock, compat
from lightning_cl.tasks.regulariser import Regulariser
from lightning_cl.tasks.standing_still import StillLayers, drop_gradients
from lightning_cl.tasks.stream import ReplayStream


class Freeze(ContinualCallback):
    """Let layers stand still from the end of a task on: first-session adaptation (arXiv 2303.13199).

    The network learns its features in the first task, and later ones train what is left, or only a head such as that of
    `NearestMeanClassifier`. Layers that stand still keep every bit: their parameters have no gradient when an optimizer
    steps, so that neither weight decay nor momentum moves them, and they are in eval mode while a batch is trained, so
    that batch norm keeps its statistics and dropout is off. On one device the backward pass ends above them.

    What is frozen depends on the index of the current task alone: so it is again after a resume, and a task that was
    refused counts as one that is over once the next one begins. Between batches, modes and ``requires_grad`` are those
    that the module had, and ``configure_optimizers`` gets all parameters in every task.

    Args:
        layers: Name of the layers, or a pattern as in ``model.layer?``, or a list of them; everything inside them
            belongs to them. ``None`` for all parameters and layers but the classification layer; the mode of the
            LightningModule itself stays its own.
        after_task: Index of the last task in which they are trained; ``None`` freezes them from the start.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Raises:
        TypeError: If `layers` are no names, or `after_task` is no whole number.
        ValueError: If `layers` is empty, or `after_task` negative.

    Example::

        >>> Freeze(["model.conv1", "model.layer?"], after_task=0).layers
        ['model.conv1', 'model.layer?']
    """

    def __init__(
        self, layers: str | list[str] | None = None, after_task: int | None = 0, head: str | None = None
    ) -> None:
        if layers is not None:
            allowed = "the name of a layer, a pattern, or a list of them"
            patterns = [layers] if isinstance(layers, str) else layers
            check_list("layers", patterns, str, allowed)
            if not patterns or not all(patterns):
                raise ValueError(f"`layers` must be {allowed}, got {layers!r}.")
        if after_task is not None:
            if not isinstance(after_task, int) or isinstance(after_task, bool):
                raise TypeError(f"`after_task` must be a whole number or None, got {after_task!r}.")
            if after_task < 0:
                raise ValueError(f"`after_task` must be 0 or more, or None for the start, got {after_task}.")
        self.layers = layers
        self.after_task = after_task
        self.head = head
        self._clock: TaskClock | None = None  # none in a fit that freezes nothing
        self._layer: str | None = None
        self._still: StillLayers | None = None  # those of the current task, from its first batch on
        self._without_gradients = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._forget()
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"Freeze holds whole layers still, and `Trainer(strategy=...)` is {type(trainer.strategy).__name__},"
                " which cuts them into shards. Use `ddp`."
            )
        clock = TaskClock.of(trainer)
        if clock is None:
            return
        if self.after_task is not None and self.after_task >= len(clock.stream.tasks) - 1:
            rank_zero_warn(
                f"Freeze freezes nothing in this fit: no task comes after task {self.after_task}, since its tasks are"
                f" {len(clock.stream.tasks)} in number, counted from 0. `after_task=None` freezes from the start."
            )
            return
        self._clock = clock

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._clock is None:
            return
        stream = self._clock.stream
        try:
            if self.layers is None:
                classes = stream.num_classes if isinstance(stream, ReplayStream) else None
                self._layer = find_head(pl_module, classes, self.head)
            self._find(pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"Freeze: {error}") from None

    def _find(self, pl_module: LightningModule) -> StillLayers:
        if self.layers is None:
            return StillLayers.all_but(pl_module, self._layer or "")
        return StillLayers.matching(pl_module, [self.layers] if isinstance(self.layers, str) else self.layers)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._still = None  # the module is about to put new layers in, or has other ones again after a refusal

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        if self._freezes:
            if self._still is None:
                self._still = self._find(pl_module)
                self._without_gradients = self._may_leave_out(trainer, pl_module, self._still)
            self._still.hold(self._without_gradients)
        return step(batch)

    @property
    def _freezes(self) -> bool:
        if self._clock is None:
            return False
        return self.after_task is None or self._clock.task.index > self.after_task

    def _may_leave_out(self, trainer: Trainer, pl_module: LightningModule, still: StillLayers) -> bool:
        """Return whether autograd may leave the parameters out.

        DDP waits for the gradients of all that had them when it was set up, a loss of what stands still alone has no
        backward pass, and other callbacks may differentiate by what layers put out.
        """
        needed = any(isinstance(c, Regulariser) and c.needs_gradients for c in compat.callbacks_of(trainer))
        trains = all(still.leave_something_of(pl_module, optimizer) for optimizer in trainer.optimizers)
        return isinstance(trainer.strategy, SingleDeviceStrategy) and trains and not needed

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._freezes and self._still is not None:
            drop_gradients(optimizer, self._still.__contains__)

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        if self._still is not None:
            self._still.release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def _forget(self) -> None:
        if self._still is not None:
            self._still.release()
        self._clock = self._still = self._layer = None
