"""The accuracies of a run, evaluation by evaluation."""

from typing import Any

import torch
from torch import Tensor

_COLUMNS = {"steps": torch.int64, "trained": torch.int64, "epoch_ends": torch.bool}


class AccuracyCurve:
    """Accuracies on each task, in the order in which they were measured.

    Args:
        num_tasks: Tasks of the stream.
        num_heads: How many heads are measured each time.

    Attributes:
        length: How many evaluations there are.
    """

    def __init__(self, num_tasks: int, num_heads: int = 1) -> None:
        self.length = 0
        self._rows = {name: torch.zeros(0, dtype=dtype) for name, dtype in _COLUMNS.items()}
        self._rows["accuracies"] = torch.zeros(0, num_heads, num_tasks)
        self._rows["recency"] = torch.zeros(0, num_heads)

    def append(self, step: int, trained: int, epoch_end: bool, accuracies: Tensor, recency: Tensor) -> None:
        """Add an evaluation.

        Args:
            step: Optimizer steps of the run so far.
            trained: The task in training.
            epoch_end: Whether an epoch ends here.
            accuracies: Of shape ``(heads, tasks)``, NaN for tasks that were not measured.
            recency: Share of the old tasks' samples that each head takes for the newest, ``(heads,)``.
        """
        row = {"steps": step, "trained": trained, "epoch_ends": epoch_end, "accuracies": accuracies, "recency": recency}
        for name, values in self._rows.items():
            if len(values) == self.length:  # room for as many again, so that a step costs the same late in a run
                values = torch.cat([values, values.new_zeros(max(64, self.length), *values.shape[1:])])
                self._rows[name] = values
            values[self.length] = torch.as_tensor(row[name])
        self.length += 1

    @property
    def steps(self) -> Tensor:
        """Optimizer steps before each evaluation, ``(evaluations,)``."""
        return self._rows["steps"][: self.length]

    @property
    def trained(self) -> Tensor:
        """The task in training at each evaluation, ``(evaluations,)``."""
        return self._rows["trained"][: self.length]

    @property
    def epoch_ends(self) -> Tensor:
        """Whether an epoch ended at each evaluation, ``(evaluations,)``."""
        return self._rows["epoch_ends"][: self.length]

    @property
    def accuracies(self) -> Tensor:
        """Accuracies of shape ``(evaluations, heads, tasks)``."""
        return self._rows["accuracies"][: self.length]

    @property
    def recency(self) -> Tensor:
        """Share of the old tasks' samples that each head takes for the newest task's, ``(evaluations, heads)``."""
        return self._rows["recency"][: self.length]

    def mark_epoch_end(self) -> None:
        """Say that an epoch ended with the last evaluation."""
        if self.length:
            self._rows["epoch_ends"][self.length - 1] = True

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the rows."""
        return {name: values[: self.length].clone() for name, values in self._rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved rows; the stream may have more tasks by now."""
        tasks = self._rows["accuracies"].shape[2]
        saved = {name: values.clone() for name, values in state.items()}
        accuracies = saved["accuracies"]
        later = accuracies.new_full((*accuracies.shape[:2], tasks - accuracies.shape[2]), torch.nan)
        saved["accuracies"] = torch.cat([accuracies, later], dim=2)
        self._rows, self.length = saved, len(saved["steps"])
