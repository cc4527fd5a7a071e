"""The bias towards the newest task as a metric that counts samples."""

from typing import Any

import torch
from torch import Tensor

from lightning_cl.metrics.checks import check_samples
from lightning_cl.metrics.continual import _ScalarMetric
from lightning_cl.metrics.stability import _recency_counts


class TaskRecencyBias(_ScalarMetric):
    """Compute the share of old samples that are taken for the newest task, as in the NMC paper (arXiv 2411.04723).

    ``update`` takes the task of each prediction and the task of each sample, both of shape ``(samples,)``, and the
    newest task. It counts samples, so the result is exact whatever the batch sizes and the number of processes.
    ``compute`` returns a scalar for the last newest task that there are samples for; ``reset`` before each evaluation
    if there are several during a task. See `stability.task_recency_bias`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = TaskRecencyBias(num_tasks=3)
        >>> metric.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 0, 0]), current=2)
        >>> metric.update(torch.tensor([2]), torch.tensor([1]), current=2)
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    newest: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` must be 1 or more, got {num_tasks}.")
        self.num_tasks = num_tasks
        for name in ("newest", "total"):
            self.add_state(name, torch.zeros((num_tasks, num_tasks), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted_task: Tensor, evaluated_task: Tensor, current: int) -> None:
        """Count the samples of a batch that are taken for the newest task.

        Args:
            predicted_task: The task of each prediction, of shape ``(samples,)``.
            evaluated_task: The task that each sample belongs to, of shape ``(samples,)``.
            current: The newest task.

        Raises:
            TypeError: If the tasks of the samples are no tensors of an integer type.
            ValueError: If the shapes or the task indices do not fit.
        """
        check_samples(predicted_task, evaluated_task)
        if not 0 <= current < self.num_tasks:
            raise ValueError(f"`current` is task {current}; the stream has tasks 0 to {self.num_tasks - 1}.")
        if len(evaluated_task) and int(evaluated_task.max()) >= self.num_tasks:
            raise ValueError(
                f"`evaluated_task` holds task {int(evaluated_task.max())}; "
                f"the stream has tasks 0 to {self.num_tasks - 1}."
            )
        newest, total = _recency_counts(predicted_task, evaluated_task, current, self.num_tasks)
        # Copies: states that were loaded are the checkpoint's own tensors.
        self.newest, self.total = self.newest.clone(), self.total.clone()
        self.newest[current] += newest
        self.total[current] += total

    def compute(self) -> Tensor:
        """Compute the task-recency bias, a scalar; NaN without samples of old tasks."""
        # 0 / 0 is the NaN of an old task without samples.
        shares = (self.newest / self.total).masked_fill(torch.ones_like(self.total).triu() > 0, torch.nan)
        biases = shares.nanmean(dim=1)
        measured = (~biases.isnan()).nonzero()
        return biases[measured[-1, 0]] if len(measured) else biases[0]
