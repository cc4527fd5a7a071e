"""A head that keeps up with the network, for those who look at every step."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_cl.tasks.head import HeadCallback
from lightning_cl.tasks.probes import Probes, choose
from lightning_cl.tasks.stream import ReplayStream
from lightning_cl.tasks.stream_means import Source

_LEAST_PER_CLASS = 16


class ProvisionalHead:
    """What a head would be if it were learnt now, from a fixed sample of what it is learnt from.

    The sample is chosen once a task, class by class, and stays on the device. Each sample stands for as many as there
    are of its class in its task. The head of the callback is left alone.

    Args:
        callback: The callback whose head it is.
        sample_size: Samples of each task; more where a class would have too few.
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
        self._weights = torch.zeros(0, 0)  # of the samples of a class in a task
        self._step: int | None = None
        self._probes = Probes()

    def fetch(self, trainer: Trainer, pl_module: LightningModule, stream: ReplayStream) -> None:
        """Have the samples ready for the current task; to be called on all ranks."""
        current = stream.current_task.index
        if self._task != current:
            self._task, self._step, self._probes, self._indices = current, None, Probes(), {}
            self._weights = torch.zeros(len(stream.tasks), self.callback.shape[0])
            for task, source in self.callback.sources().items():
                self._choose(task, source, stream.seed)
        for task, indices in self._indices.items():
            if task not in self._probes:
                self._probes.fetch(trainer, pl_module, stream, task, indices, "train")

    def _choose(self, task: int, source: Source, seed: int) -> None:
        indices, labels = source
        chosen = []
        known = labels is not None and bool((labels >= 0).all())
        for label in torch.unique(labels).tolist() if known and labels is not None else [None]:
            members = indices if label is None else indices[labels == label]
            share = round(self.sample_size * len(members) / len(indices))
            few = members[choose(max(share, _LEAST_PER_CLASS), len(members), seed, task)]
            self._weights[task, slice(None) if label is None else label] = len(members) / len(few)
            chosen.append(few)
        if chosen:
            self._indices[task] = torch.cat(chosen).sort().values

    def renew(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the head again if it is due; for use in `evaluating`, on all ranks."""
        if self._step is None or trainer.global_step - self._step >= self.refresh:
            weights = self._weights.to(pl_module.device)
            called = self._probes.call(partial(self.callback.features_of, pl_module))
            rows = ((features, labels, weights[tasks, labels]) for features, labels, tasks in called)
            self.head = self.callback.learn_from(trainer, rows)
            self._step = trainer.global_step

    def forget_samples(self) -> None:
        """Let go of the samples; they are fetched again when they are needed."""
        self._probes = Probes()

    def state_dict(self) -> dict[str, Any]:
        """Return which samples were chosen, and the head."""
        tensors = {} if self.head is None else self.head.state_dict()
        return {
            "task": self._task,
            "indices": {task: indices.clone() for task, indices in self._indices.items()},
            "weights": self._weights.clone(),
            "step": self._step,
            "classifier": {name: tensor.cpu().clone() for name, tensor in tensors.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the samples and the head of a saved run."""
        self._task, self._indices, self._step = state["task"], dict(state["indices"]), state["step"]
        self._weights = state["weights"].clone()
        self._probes = Probes()
        self.head = self.callback.build({**self.callback.state_dict(), "classifier": state["classifier"]})
