"""A task as a transaction: a copy of the run from the task's start, and the way back to it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cl.tasks import compat
from lightning_cl.tasks.random_state import collect_random_state, restore_random_state


def check_rollback_support(trainer: Trainer) -> None:
    """Refuse strategies whose ranks hold no whole state.

    Raises:
        MisconfigurationException: Under FSDP and DeepSpeed.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"Undoing a task needs the whole state on each rank; `Trainer(strategy=...)` is"
            f" {type(trainer.strategy).__name__}, which cuts it into shards. Use `ddp`, or no callback that may refuse"
            " a task."
        )


class Layers:
    """Remember which layers, parameters and buffers a module consists of, to put them back.

    A module may put new ones in while it learns a task, such as a wider head, and a ``state_dict`` of before then fits
    no more.

    Example::

        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> layers = Layers(net)
        >>> net[0] = torch.nn.Linear(2, 9)
        >>> layers.put_back()
        >>> net[0].out_features
        3
    """

    def __init__(self, module: nn.Module) -> None:
        kinds = ("_modules", "_parameters", "_buffers")
        # a scripted layer can only be replaced as a whole
        layers = [layer for layer in module.modules() if not isinstance(layer, torch.jit.ScriptModule)]
        self._parts = [(layer, kind, dict(vars(layer)[kind])) for layer in layers for kind in kinds]
        tensors = [*module.parameters(), *module.buffers()]
        self._shapes = [(tensor, tensor.shape) for tensor in tensors if not is_lazy(tensor)]

    def put_back(self) -> None:
        """Let the module consist of the same objects again, in their old shapes, whatever their values are."""
        for layer, kind, parts in self._parts:
            own = vars(layer)[kind]
            own.clear()
            own.update(parts)
        for tensor, shape in self._shapes:
            if tensor.shape != shape:
                tensor.data = tensor.data.new_empty(shape)


class Optimizers:
    """Remember which optimizers and schedulers a run has, and which parameters they move, to put them back.

    ``configure_optimizers`` may build others for a later task, with other groups of parameters, which the state of the
    old ones does not fit.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._optimizers = list(trainer.optimizers)
        self._schedulers = list(trainer.lr_scheduler_configs)
        self._groups = [
            [(group, list(group["params"])) for group in optimizer.param_groups] for optimizer in self._optimizers
        ]

    def put_back(self, trainer: Trainer) -> None:
        """Let the run have the same objects again, whatever their state is."""
        for optimizer, groups in zip(self._optimizers, self._groups, strict=True):
            optimizer.param_groups[:] = [group for group, _ in groups]
            for group, parameters in groups:
                group["params"][:] = parameters
        trainer.optimizers = list(self._optimizers)
        trainer.strategy.lr_scheduler_configs = list(self._schedulers)


class Parts(NamedTuple):
    """The objects that a run consists of.

    Args:
        layers: Those of the module.
        optimizers: Those that train it.
    """

    layers: Layers
    optimizers: Optimizers

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule) -> "Parts":
        """Return those of a run as they are now."""
        return cls(Layers(pl_module), Optimizers(trainer))


def take_copy(trainer: Trainer, keep: Callback) -> dict[str, Any]:
    """Copy the run in memory, by the protocol of Lightning's checkpoints: module, callbacks, optimizers, precision.

    Whatever a callback keeps in its ``state_dict`` is undone together with the weights. Not part of it are the loops'
    progress and the callbacks that write checkpoints: steps go on counting, and files stay.

    Args:
        trainer: The Trainer.
        keep: One more callback, whose state is not undone.
    """
    return {"run": _cloned(compat.dump_run(trainer, keep)), "random": gather_random_states(collect_random_state())}


def go_back(
    trainer: Trainer,
    pl_module: LightningModule,
    saved: Mapping[str, Any],
    keep: Callback,
    parts: Parts | None,
    renews_optimizers: bool,
) -> None:
    """Put the run back to a copy; the copy stays usable.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        saved: The copy.
        keep: One more callback, whose state is not undone.
        parts: What the run consisted of; ``None`` if it is not known, after a resume. Optimizers whose groups of
            parameters the copy does not fit then stay as they are.
        renews_optimizers: Whether each task gets new optimizers, so that it does not matter if those stay.
    """
    if parts is not None:
        parts.layers.put_back()
        parts.optimizers.put_back(trainer)
    run = _cloned(saved["run"])
    if parts is None and not _fits(run["optimizer_states"], trainer):
        run["optimizer_states"], run["lr_schedulers"] = [], []
        if not renews_optimizers:
            rank_zero_warn(
                "A task is undone after a resume, but not what its optimizers remember of it (such as momentum): they"
                " have other groups of parameters than at its start, and `reset_optimizer=False` lets them go on. Say"
                " `reset_optimizer=True`, or keep the groups the same for all tasks."
            )
    compat.load_run(trainer, pl_module, run, keep)
    restore_random_states(saved["random"], trainer.global_rank)


def gather_random_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Collect the random states of all ranks, since only one rank's state reaches a checkpoint file.

    Args:
        state: This rank's.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def restore_random_states(states: list[dict[str, Any]], rank: int) -> None:
    """Put back this rank's random state; a rank that was not there before takes the first one's."""
    restore_random_state(states[rank if rank < len(states) else 0])


def _fits(states: Sequence[Mapping[str, Any]], trainer: Trainer) -> bool:
    own = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    return own == [[len(group["params"]) for group in state["param_groups"]] for state in states]


def _cloned(value: Any) -> Any:
    # parameters and their gradients' graphs stay behind, everything else is an ordinary deep copy
    memo = {id(tensor): tensor.detach().clone() for tensor in _tensors_in(value)}
    return copy.deepcopy(value, memo)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
