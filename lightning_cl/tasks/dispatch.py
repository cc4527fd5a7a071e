"""Who hears of tasks, and in which order."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_cl.tasks import compat
from lightning_cl.tasks.callback import ContinualCallback
from lightning_cl.tasks.random_state import forked_generators
from lightning_cl.tasks.task import Task


def continual_callbacks(trainer: Trainer) -> Sequence[ContinualCallback]:
    """Return the callbacks that know about tasks, in an order that does not depend on how the user listed them."""
    callbacks = [callback for callback in compat.callbacks_of(trainer) if isinstance(callback, ContinualCallback)]
    return sorted((c for c in callbacks if c.is_active), key=lambda c: (c.observer, c.commits_late, c.state_key))


def send(trainer: Trainer, pl_module: LightningModule, hook: str, task: Task) -> None:
    """Call a task hook on behaviours, on observers and on the module if it has one.

    The module comes last at a task's start, and before the observers otherwise: these measure what was committed.
    Observers leave the random states as they were.
    """
    callbacks = continual_callbacks(trainer)
    module_hook = getattr(pl_module, hook, None)
    for callback in callbacks:
        if not callback.observer:
            with _profiled(trainer, callback, hook):
                getattr(callback, hook)(trainer, pl_module, task)
    if hook != "on_task_start" and callable(module_hook):
        module_hook(task)
    for callback in callbacks:
        if callback.observer:
            with _profiled(trainer, callback, hook), forked_generators():
                getattr(callback, hook)(trainer, pl_module, task)
    if hook == "on_task_start" and callable(module_hook):
        module_hook(task)


def _profiled(trainer: Trainer, callback: ContinualCallback, hook: str) -> AbstractContextManager[Any]:
    name = f"[Callback]{callback.state_key}.{hook}"
    return trainer.profiler.profile(name)  # type: ignore[attr-defined, no-any-return]


def is_accepted(trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
    """Ask all callbacks and the module on all ranks whether a task may be kept; one veto is enough."""
    # no short cut: some callbacks communicate between ranks while they decide
    votes = []
    for callback in continual_callbacks(trainer):
        with forked_generators() if callback.observer else nullcontext():
            votes.append(callback.accept_task(trainer, pl_module, task))
    module_vote = getattr(pl_module, "accept_task", None)
    if callable(module_vote):
        votes.append(bool(module_vote(task)))
    return bool(trainer.strategy.reduce_boolean_decision(all(votes), all=True))


def begins_phase(trainer: Trainer, pl_module: LightningModule, task: Task, stopped: bool) -> bool:
    """Ask all behaviours whether another phase of a task begins with the next epoch.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        task: The current task.
        stopped: Whether early stopping ends what is trained now.
    """
    behaviours = [callback for callback in continual_callbacks(trainer) if not callback.observer]
    # no short cut: each of them may have phases of its own
    begins = [callback.next_phase(trainer, pl_module, task, stopped) for callback in behaviours]
    return any(begins)
