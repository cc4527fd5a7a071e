"""Find the exits of a module before it is set up for training."""

import re
from collections.abc import Sequence
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_cl.arguments import check_list
from lightning_cl.exits import ExitNetwork
from lightning_cl.heads.exit_ensemble import Ensemble
from lightning_cl.heads.exit_heads import ExitHeadKind
from lightning_cl.taps import find_head
from lightning_cl.tasks import compat
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.clock import TaskClock
from lightning_cl.tasks.evaluation import held_still, sample_batches
from lightning_cl.tasks.exit_phases import PhasePlan
from lightning_cl.tasks.head import heads_of
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.stream import ReplayStream
from lightning_cl.tasks.task import classes_apart

_SAMPLES = 8


def exits_wanted(layers: Sequence[str] | str) -> Sequence[str] | int:
    """Return the names or patterns of layers, or how many exits there shall be at equal shares of the cost.

    Raises:
        TypeError: If they are no names.
        ValueError: If there are none, or a word is not as in "auto:3".

    Example::

        >>> exits_wanted("auto:3")
        3
    """
    allowed = "a list of layer names, or as in 'auto:3'"
    auto = re.fullmatch(r"auto:([1-9]\d*)", layers) if isinstance(layers, str) else None
    if not layers or (isinstance(layers, str) and auto is None):
        raise ValueError(f"`layers` must be {allowed}, got {layers!r}.")
    if auto is not None:
        return int(auto[1])
    check_list("layers", layers, str, allowed)
    return layers


def check_fit(
    trainer: Trainer, pl_module: LightningModule, plan: PhasePlan, answers: bool, corrects: bool
) -> tuple[TaskClock, ReplayStream]:
    """Return clock and tasks of a fit that can train exits.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        plan: The phases of each task.
        answers: Whether predictions are the exits'.
        corrects: Whether they are corrected for each task, which then must have classes of its own.

    Raises:
        MisconfigurationException: If it cannot, saying why.
    """
    clock = TaskClock.of(trainer)
    if clock is None or not isinstance(clock.stream, ReplayStream):
        raise MisconfigurationException(
            "EarlyExits tries the module on training data before it is set up, and this fit has no tasks. Wrap your"
            " DataModule in a task sequence: `Joint(your_datamodule)` is one of a single task."
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"EarlyExits adds the losses of its heads to that of `training_step`, and {type(pl_module).__name__}"
            " optimises manually. Use automatic optimisation."
        )
    if any(isinstance(callback, WeightAveraging) for callback in compat.callbacks_of(trainer)):
        raise MisconfigurationException(
            "WeightAveraging copies the module before EarlyExits has put its heads there, so it would average weights"
            " that do not go together. Take one out."
        )
    others = [type(callback).__name__ for callback in heads_of(trainer)]
    if others and (answers or corrects):
        raise MisconfigurationException(
            f"EarlyExits and {others[0]} would both answer in place of the classification layer. Take one out, or leave"
            " out `threshold`, `correction` and `exit_classifier` of EarlyExits."
        )
    tasks = clock.stream.tasks
    if corrects and not classes_apart(tasks):
        raise MisconfigurationException(
            "`correction='tlc'` adds a constant to the classes of each task, and these tasks share classes or have"
            " none. Say `correction='none'`."
        )
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        for task in tasks:
            plan.check(task.index, clock.limits.epochs(task.index))
        if len(plan.phases) > 1 and trainer.max_steps != -1:
            raise MisconfigurationException(
                f"`regime={plan.regime!r}` trains in phases of epochs, and `max_steps` may end a task before its heads"
                " are trained. Say `regime='joint'`, or take it out."
            )
    return clock, clock.stream


def check_validation_data(stream: ReplayStream, threshold: float | str | None) -> None:
    """Refuse tasks without the data that a threshold is to be chosen on."""
    for task in stream.tasks:
        if not stream.samples_of(task.index, "val"):
            raise MisconfigurationException(
                f"`threshold={threshold!r}` is chosen on validation data, and task {task.index} ({task.name}) has none."
                " Say `val_fraction=0.1` on the task sequence to hold some training data out."
            )


def find_exits(
    trainer: Trainer,
    pl_module: LightningModule,
    stream: ReplayStream,
    layers: Sequence[str] | int,
    head: ExitHeadKind | nn.Module,
    classifier: str | None,
    ensemble: Ensemble = "none",
    nearest_means: bool = False,
) -> ExitNetwork:
    """Try a module on a few samples, and return its exits with heads for them.

    Args:
        trainer: The Trainer.
        pl_module: The module, where its layers were made.
        stream: The tasks.
        layers: Patterns of layer names, or how many exits there shall be at equal shares of the cost.
        head: The kind of head, or a module to copy.
        classifier: Name of the classification layer; found by its number of outputs if ``None``.
        ensemble: What exits make of what those before them said.
        nearest_means: Whether nearest means shall answer.

    Raises:
        MisconfigurationException: If the module cannot have them, saying why.
    """
    task = stream.current_task.index
    few = torch.arange(min(_SAMPLES, stream.samples_of(task) or 0))
    try:
        stream.check_labels(task)
        found = find_head(pl_module, stream.num_classes, classifier, "classifier")
        with held_still(trainer, pl_module):
            _, batch = next(sample_batches(trainer, pl_module, stream, task, few, every_rank=True))
            batch = apply_to_collection(batch, Tensor, partial(_as_parameters, pl_module))
            call = ModuleCall.find(pl_module, batch, stream.structure, stream.num_classes, head=found)
            rows = len(as_labels(stream.structure.find_targets(batch)))
            return ExitNetwork.find(pl_module, layers, found, partial(call, batch), rows, head, ensemble, nearest_means)
    except ValueError as error:
        raise MisconfigurationException(f"EarlyExits: {error}") from None


def _as_parameters(pl_module: LightningModule, tensor: Tensor) -> Tensor:
    """Bring a tensor to the parameters, which are not on the device of the fit yet, nor in its precision."""
    if tensor.is_floating_point():
        return tensor.to(device=pl_module.device, dtype=pl_module.dtype)  # type: ignore[arg-type]
    return tensor.to(pl_module.device)
