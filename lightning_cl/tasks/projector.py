"""The network that projected distillation trains beside the module."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cl.hashing import mix
from lightning_cl.heads.feature_adapter import FeatureAdapter
from lightning_cl.tasks.random_state import forked_generators, seed_torch_generator
from lightning_cl.tasks.rank_rows import reduce_gradients

_SALT = 0x9C0DE
_TENSORS = 4  # of a `FeatureAdapter`


class Projector:
    """A `FeatureAdapter` that a run's optimizer trains, without being part of the module.

    So neither the module's checkpoints nor its `state_dict` have it, and nothing is left on the module. It joins the
    first optimizer's first group, where schedulers reach it, and its gradients are averaged over the ranks as DDP does.

    Args:
        width: Width of the features.
        expansion: How many times wider its hidden layer is.
        device: Where it is.
    """

    def __init__(self, width: int, expansion: int, device: torch.device) -> None:
        with forked_generators():
            self._network = FeatureAdapter(width, expansion)
        self._device = device
        self._optimizer: Optimizer | None = None
        self._network.to(device)

    def __call__(self, features: Tensor) -> Tensor:
        """Return features as the teacher might have them, ``(batch, width)``."""
        return self._network(features).float()  # type: ignore[no-any-return]

    def draw(self, seed: int, task: int) -> None:
        """Draw all weights anew, the same ones on every rank and in every run of a seed."""
        with forked_generators():
            seed_torch_generator(mix(seed, _SALT, task))
            self._network.cpu().reset_parameters()
            self._network.to(self._device)

    def begin_task(self, trainer: Trainer, seed: int, task: int) -> None:
        """Begin with new weights, of which the optimizer remembers nothing."""
        self.draw(seed, task)
        self.join(trainer)
        for parameter in self.parameters():  # an optimizer may go on from task to task
            parameter.grad = None
            trainer.optimizers[0].state.pop(parameter, None)

    def join(self, trainer: Trainer) -> None:
        """Be trained by the first optimizer, which may be another one than before, if there is any."""
        optimizer = trainer.optimizers[0]
        # Lightning's stand-in for no optimizer has no groups
        if optimizer.param_groups and optimizer is not self._optimizer:
            trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            optimizer.param_groups[0]["params"] += [p for p in self.parameters() if id(p) not in trained]
            self._optimizer = optimizer

    def average_gradients(self, trainer: Trainer) -> None:
        """Give every rank the mean of the gradients; of what was averaged before, the mean is the same."""
        reduce_gradients(trainer, self.parameters(), "mean")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield its weights."""
        return self._network.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of its weights by name, on the CPU."""
        return {name: tensor.cpu().clone() for name, tensor in self._network.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over weights by name."""
        self._network.load_state_dict(state)


def match_optimizer_state(state: dict[str, Any], had: bool, wanted: bool) -> None:
    """Add or take off the place of a projector in the saved state of an optimizer.

    Args:
        state: The state, which is changed.
        had: Whether a projector was trained by the optimizer that was saved.
        wanted: Whether one is trained by the optimizer that takes the state over.
    """
    if not state.get("param_groups"):  # Lightning's stand-in for no optimizer
        return
    group = state["param_groups"][0]
    if had and not wanted:
        for place in group["params"][-_TENSORS:]:
            state["state"].pop(place, None)
        group["params"] = group["params"][:-_TENSORS]
    elif wanted and not had:
        free = 1 + max((place for each in state["param_groups"] for place in each["params"]), default=-1)
        group["params"] = [*group["params"], *range(free, free + _TENSORS)]
