"""Which parts of a network with exits are trained in which epoch of a task (arXiv 2407.14320)."""

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.arguments import check_list

Regime = Literal["disjoint", "joint", "mixed"]
Phase = Literal["network", "all", "heads"]

_PHASES: dict[Regime, tuple[Phase, ...]] = {
    "disjoint": ("network", "heads"),
    "joint": ("all",),
    "mixed": ("network", "all"),
}


class PhasePlan:
    """The phases of each task, and how far the current task has come in them.

    Args:
        regime: "joint" trains the network and all heads; "mixed" the network alone before; "disjoint" the network
            alone and then the heads alone.
        epochs: Epochs of each phase; halves of the task's, the larger one first, if ``None``. Where the first phase is
            stopped early, the second one has all epochs that are left.

    Attributes:
        stopped_after: Epochs of the current task after which its first phase was stopped early; ``None`` if it was not.

    Example::

        >>> plan = PhasePlan("mixed", None)
        >>> [plan.phase(epoch, planned=3) for epoch in range(3)]
        ['network', 'network', 'all']
    """

    def __init__(self, regime: Regime, epochs: Sequence[int] | None) -> None:
        self.regime = regime
        self.phases = _PHASES[regime]
        self.epochs = epochs
        self.stopped_after: int | None = None
        if epochs is not None:
            check_list("phase_epochs", epochs, int, "a list of whole numbers, one for each phase, or None")
        if epochs is not None and (len(epochs) != len(self.phases) or any(count < 1 for count in epochs)):
            raise ValueError(
                f"`phase_epochs` must have {len(self.phases)} numbers from 1 for `regime={regime!r}`, one for each of"
                f" {', '.join(map(repr, self.phases))}, got {list(epochs)}."
            )

    def check(self, task: int, planned: int) -> None:
        """Refuse a task whose epochs do not fit the phases.

        Args:
            task: The task.
            planned: Its epochs; -1 if they are unknown.

        Raises:
            MisconfigurationException: If they do not, saying what does.
        """
        if len(self.phases) == 1 and self.epochs is None:
            return
        if self.epochs is not None:
            if planned not in (-1, sum(self.epochs)):
                raise MisconfigurationException(
                    f"`phase_epochs={list(self.epochs)}` adds up to {sum(self.epochs)} epochs, and task {task} has"
                    f" {planned}."
                )
        elif planned == -1:
            raise MisconfigurationException(
                f"`regime={self.regime!r}` trains in phases, and the epochs of task {task} are unknown. Say how long"
                " the phases are, as in `phase_epochs=[5, 5]`, or `regime='joint'`."
            )
        elif planned < len(self.phases):
            raise MisconfigurationException(
                f"`regime={self.regime!r}` needs {len(self.phases)} epochs, one for each phase, and task {task} has"
                f" {planned}. Say `regime='joint'`, or more epochs."
            )

    def phase(self, epoch: int, planned: int) -> Phase:
        """Return the phase of an epoch of a task; the last one where ``fast_dev_run`` leaves a single epoch."""
        if 0 <= planned < len(self.phases):
            return self.phases[-1]
        if len(self.phases) == 1:
            return self.phases[0]
        first = (planned + 1) // 2 if self.epochs is None else self.epochs[0]
        if self.stopped_after is not None:
            first = min(first, self.stopped_after)
        return self.phases[epoch >= first]

    def begin_task(self) -> None:
        """Begin with the first phase."""
        self.stopped_after = None

    def begins_phase(self, epochs: int, planned: int, stopped: bool) -> bool:
        """Return whether another phase begins after so many epochs of a task.

        Args:
            epochs: Epochs of the task that are over.
            planned: Its epochs; -1 if they are unknown.
            stopped: Whether early stopping ends the current phase.
        """
        phase = self.phase(epochs - 1, planned)
        if stopped and phase != self.phases[-1]:
            self.stopped_after = epochs
        return self.phase(epochs, planned) != phase


def depth_weights(exits: int, epoch: int, planned: int) -> list[float]:
    """Return the loss weights of Shallow-Deep Networks (arXiv 1810.07052), which grow with the epochs.

    Args:
        exits: How many there are before the network's own head.
        epoch: Epochs of the task that are over.
        planned: Epochs of the task.

    Returns:
        One for each exit, and 1 for the network's own head.

    Example::

        >>> depth_weights(exits=6, epoch=0, planned=200)
        [0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 1.0]
        >>> [round(weight, 2) for weight in depth_weights(exits=6, epoch=199, planned=200)]
        [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0]
    """
    progress = 1.0 if planned < 2 else min(1.0, epoch / (planned - 1))
    ends = [0.9 * (position + 1) / exits for position in range(exits)]
    return [*(0.01 + progress * (end - 0.01) for end in ends), 1.0]
