"""A head that keeps up with the network, for those who look at every step."""

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_cl.tasks.head import HeadCallback
from lightning_cl.tasks.probes import Probes, choose
from lightning_cl.tasks.stream import ReplayStream


class ProvisionalHead:
    """What a head would be if it were learnt now, from a fixed sample of what it is learnt from.

    The sample is chosen once a task and stays on the device. The head of the callback is left alone.

    Args:
        callback: The callback whose head it is.
        sample_size: Samples of each task.
        refresh: Optimizer steps for which a head is used.

    Attributes:
        head: The head; ``None`` as long as no class is known.
    """

    def __init__(self, callback: HeadCallback, sample_size: int, refresh: int) -> None:
        self.callback = callback
        self.sample_size = sample_size
        self.refresh = refresh
        self.head: nn.Module | None = None
        self._task = -1
        self._indices: dict[int, Tensor] = {}
        self._step: int | None = None
        self._probes = Probes()

    def fetch(self, trainer: Trainer, pl_module: LightningModule, stream: ReplayStream) -> None:
        """Have the samples ready for the current task; to be called on all ranks."""
        current = stream.current_task.index
        if self._task != current:
            sources = self.callback.sources().items()
            self._indices = {t: all_[choose(self.sample_size, len(all_), stream.seed, t)] for t, all_ in sources}
            self._task, self._step, self._probes = current, None, Probes()
        for task, indices in self._indices.items():
            if task not in self._probes:
                self._probes.fetch(trainer, pl_module, stream, task, indices, "train")

    def renew(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the head again if it is due; for use in `evaluating`, on all ranks."""
        if self._step is None or trainer.global_step - self._step >= self.refresh:
            called = self._probes.call(partial(self.callback.features_of, pl_module))
            self.head = self.callback.learn_from(trainer, ((features, labels) for features, labels, _ in called))
            self._step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Return which samples were chosen, and the head."""
        tensors = {} if self.head is None else self.head.state_dict()
        return {
            "task": self._task,
            "indices": {task: indices.clone() for task, indices in self._indices.items()},
            "step": self._step,
            "classifier": {name: tensor.cpu().clone() for name, tensor in tensors.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the samples and the head of a saved run."""
        self._task, self._indices, self._step = state["task"], dict(state["indices"]), state["step"]
        self._probes = Probes()
        self.head = self.callback.build({**self.callback.state_dict(), "classifier": state["classifier"]})
