"""Nearest means at each exit of a network."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.exits import ExitNetwork
from lightning_cl.tasks.stream import ReplayStream
from lightning_cl.tasks.stream_means import StreamMeans


class ExitPrototypes:
    """Take the means of each exit's features, of past classes from the memory and of the current ones from all data.

    Args:
        network: The exits, on a module.
        stream: The tasks.
        call: Calls the module on a batch.
    """

    def __init__(self, network: ExitNetwork, stream: ReplayStream, call: Callable[[Any], Tensor]) -> None:
        self._network = network
        self._call = call
        widths = network.spec["widths"]
        shapes = [(network.spec["num_classes"], width) for width in widths]
        self._means = StreamMeans(stream, "memory+current", shapes, True, self._features_of)

    def forget_current(self) -> None:
        """Say that the network has changed, or the task."""
        self._means.forget_current()

    def refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the means anew; to be called on all ranks."""
        self._network.heads.set_means(self._means.summed_up(trainer, pl_module))

    def commit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the means at a task's end, when the memory holds its samples."""
        self.refresh(trainer, pl_module)
        self._means.keep(trainer, pl_module)

    def state_dict(self) -> list[dict[str, Tensor]] | None:
        """Return copies of what was summed up; the means themselves are buffers of the heads."""
        return self._means.state_dict()

    def load_state_dict(self, state: list[dict[str, Tensor]] | None) -> None:
        """Go on from what was saved."""
        self._means.load_state_dict(state)

    def _features_of(self, pl_module: LightningModule, batch: Any) -> list[Tensor]:
        hooks = self._network.hooks
        if hooks is None:
            raise RuntimeError("The exits were asked for features outside a Trainer call.")
        with hooks.collecting("features"):
            self._call(batch)
            return hooks.features
