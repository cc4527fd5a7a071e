"""The figures of the stability gap as metrics that are fed one evaluation after another."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.metrics.checks import check_accuracies, check_window
from lightning_cl.metrics.continual import _ScalarMetric
from lightning_cl.metrics.stability import (
    _gap_matrices,
    _mean_gap,
    _mean_normalized_gap,
    _mean_normalized_recovery,
    _mean_recovery,
    _old_minima,
    _task_minimum,
    _worst_case,
)


class _CurveMetric(_ScalarMetric):
    """A scalar of a curve of accuracies, which it takes row by row and does not keep."""

    is_differentiable: bool | None = False
    # What an evaluation adds depends on those before it: `forward` must not merge it in as an independent part.
    full_state_update: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    current: Tensor

    def __init__(self, num_tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` must be 1 or more, got {num_tasks}.")
        self.num_tasks = num_tasks
        self._add_equal_state("current", torch.tensor(0))

    def update(self, accuracies: Tensor, trained: int) -> None:
        """Take the accuracies of an evaluation, which must be the same on every process.

        Args:
            accuracies: The accuracy on each task, of shape ``(tasks,)``; NaN where a task was not measured.
            trained: The task in training.

        Raises:
            TypeError: If ``accuracies`` is no tensor of a floating point type.
            ValueError: If the shape does not fit, or ``trained`` is no task of the stream or comes before the last one.
        """
        check_accuracies(accuracies, self.num_tasks)
        if not 0 <= trained < self.num_tasks:
            raise ValueError(f"`trained` is task {trained}; the stream has tasks 0 to {self.num_tasks - 1}.")
        if trained < self.current:
            raise ValueError(f"`trained` must not decrease, got task {trained} after task {int(self.current)}.")
        self.current = torch.full_like(self.current, trained)
        self._take(accuracies.detach().to(self.current.device), trained)

    def _take(self, accuracies: Tensor, trained: int) -> None:
        raise NotImplementedError

    def _add_equal_state(self, name: str, default: Tensor) -> None:
        # The processes hold equal values, which a maximum returns as they are, NaN included; a sum would count them
        # once per process, and a mean may round them.
        self.add_state(name, default, dist_reduce_fx="max")


class _TaskExtremes(_CurveMetric):
    """The lowest and the last accuracy on each task (column) during the training of each (row)."""

    minimum: Tensor
    final: Tensor

    def __init__(self, num_tasks: int, **kwargs: Any) -> None:
        super().__init__(num_tasks, **kwargs)
        for name in ("minimum", "final"):
            self._add_equal_state(name, torch.full((num_tasks, num_tasks), torch.nan))

    @override
    def _take(self, accuracies: Tensor, trained: int) -> None:
        accuracies = accuracies.to(self.minimum.dtype)
        final = torch.where(accuracies.isnan(), self.final[trained], accuracies)
        self.minimum = _with_row(self.minimum, trained, torch.fmin(self.minimum[trained], accuracies))
        self.final = _with_row(self.final, trained, final)


class MinAccuracy(_TaskExtremes):
    """Compute how low the old tasks fell since they were learned, min-ACC of De Lange et al. (arXiv 2205.13452).

    ``update`` takes the accuracies of one evaluation, of shape ``(tasks,)``, and the task in training; ``compute``
    returns a scalar, NaN as long as there is one task only. See `stability.min_accuracy`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = MinAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([0.8, torch.nan]), trained=0)
        >>> metric.update(torch.tensor([0.3, 0.5]), trained=1)
        >>> metric.update(torch.tensor([0.6, 0.7]), trained=1)
        >>> metric.compute()
        tensor(0.3000)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Compute the minimum accuracy, a scalar."""
        return _old_minima(self.minimum).nanmean()


class WorstCaseAccuracy(_TaskExtremes):
    """Compute the accuracy at the worst moment, WC-ACC of De Lange et al. (arXiv 2205.13452).

    Takes the same input as `MinAccuracy`; ``compute`` returns a scalar. See `stability.worst_case_accuracy`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = WorstCaseAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([0.8, torch.nan]), trained=0)
        >>> metric.update(torch.tensor([0.3, 0.5]), trained=1)
        >>> metric.update(torch.tensor([0.6, 0.7]), trained=1)
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Compute the worst-case accuracy, a scalar."""
        return _worst_case(self.minimum, self.final, int(self.current))


class TaskMinimumAccuracy(_TaskExtremes):
    """Compute how low the old tasks fell during the last task, "min-ACC" of the NMC paper (arXiv 2411.04723).

    Takes the same input as `MinAccuracy`, in the paper at the ends of epochs; ``compute`` returns a scalar, NaN as long
    as there is one task only. See `stability.task_minimum_accuracy` for what sets it apart from `MinAccuracy`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = TaskMinimumAccuracy(num_tasks=3)
        >>> metric.update(torch.tensor([0.9, torch.nan, torch.nan]), trained=0)
        >>> metric.update(torch.tensor([0.2, 0.8, torch.nan]), trained=1)
        >>> metric.update(torch.tensor([0.5, 0.3, 0.9]), trained=2)
        >>> metric.compute()
        tensor(0.4000)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Compute the minimum accuracy during the last task, a scalar."""
        return _task_minimum(self.minimum, int(self.current))


class StabilityGap(_TaskExtremes):
    """Compute how far the old tasks fall while a new one is trained on, SG of the NMC paper (arXiv 2411.04723).

    Takes the same input as `MinAccuracy`; ``compute`` returns a scalar, NaN as long as there is one task only.
    See `stability.stability_gap`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = StabilityGap(num_tasks=2)
        >>> metric.update(torch.tensor([0.8, torch.nan]), trained=0)
        >>> metric.update(torch.tensor([0.3, 0.5]), trained=1)
        >>> metric.update(torch.tensor([0.6, 0.7]), trained=1)
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = -1.0

    def compute(self) -> Tensor:
        """Compute the stability gap, a scalar."""
        return _mean_gap(_gap_matrices(self.minimum, self.final))


class NormalizedStabilityGap(_TaskExtremes):
    """Compute the share of the accuracy that the old tasks lose, SG_norm of the NMC paper (arXiv 2411.04723).

    Takes the same input as `MinAccuracy`; ``compute`` returns a scalar, NaN as long as there is one task only.
    See `stability.normalized_stability_gap`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = NormalizedStabilityGap(num_tasks=2)
        >>> metric.update(torch.tensor([0.8, torch.nan]), trained=0)
        >>> metric.update(torch.tensor([0.3, 0.5]), trained=1)
        >>> metric.update(torch.tensor([0.6, 0.7]), trained=1)
        >>> metric.compute()
        tensor(0.6250)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = None

    def compute(self) -> Tensor:
        """Compute the normalised stability gap, a scalar."""
        return _mean_normalized_gap(_gap_matrices(self.minimum, self.final))


class Recovery(_TaskExtremes):
    """Compute how far the old tasks come back by the end of a new one, REC of the NMC paper (arXiv 2411.04723).

    Takes the same input as `MinAccuracy`; ``compute`` returns a scalar, NaN as long as there is one task only.
    See `stability.recovery`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = Recovery(num_tasks=2)
        >>> metric.update(torch.tensor([0.8, torch.nan]), trained=0)
        >>> metric.update(torch.tensor([0.3, 0.5]), trained=1)
        >>> metric.update(torch.tensor([0.6, 0.7]), trained=1)
        >>> metric.compute()
        tensor(0.3000)
    """

    # Neither way: a model that never falls has nothing to recover.
    higher_is_better: bool | None = None

    def compute(self) -> Tensor:
        """Compute the recovery, a scalar."""
        return _mean_recovery(_gap_matrices(self.minimum, self.final))


class NormalizedRecovery(_TaskExtremes):
    """Compute the recovery as a share of the accuracy before the gap, REC_norm of the NMC paper (arXiv 2411.04723).

    Takes the same input as `MinAccuracy`; ``compute`` returns a scalar, NaN as long as there is one task only.
    See `stability.normalized_recovery`.

    Args:
        num_tasks: The number of tasks of the stream.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = NormalizedRecovery(num_tasks=2)
        >>> metric.update(torch.tensor([0.8, torch.nan]), trained=0)
        >>> metric.update(torch.tensor([0.3, 0.5]), trained=1)
        >>> metric.update(torch.tensor([0.6, 0.7]), trained=1)
        >>> metric.compute()
        tensor(0.3750)
    """

    higher_is_better: bool | None = None
    plot_upper_bound: float | None = None

    def compute(self) -> Tensor:
        """Compute the normalised recovery, a scalar."""
        return _mean_normalized_recovery(_gap_matrices(self.minimum, self.final))


class _LargestChanges(_CurveMetric):
    """The largest fall and rise of each task within a window, and the evaluations that the next one is compared to."""

    recent: Tensor
    largest_fall: Tensor
    largest_rise: Tensor

    def __init__(self, num_tasks: int, window: int = 10, **kwargs: Any) -> None:
        super().__init__(num_tasks, **kwargs)
        self.window = check_window(window)
        self._add_equal_state("recent", torch.full((window - 1, num_tasks), torch.nan))
        for name in ("largest_fall", "largest_rise"):
            self._add_equal_state(name, torch.full((num_tasks,), torch.nan))

    @override
    def _take(self, accuracies: Tensor, trained: int) -> None:
        accuracies = accuracies.to(self.recent.dtype)
        measured = ~accuracies.isnan()
        self.largest_fall = _raised(self.largest_fall, self.recent - accuracies, measured)
        self.largest_rise = _raised(self.largest_rise, accuracies - self.recent, measured)
        self.recent = torch.cat([self.recent[1:], accuracies.unsqueeze(0)])


class WindowedForgetting(_LargestChanges):
    """Compute the largest fall within a few evaluations, WF^w of De Lange et al. (arXiv 2205.13452).

    Takes the same input as `MinAccuracy`; ``compute`` returns a scalar. See `stability.windowed_forgetting`.

    Args:
        num_tasks: The number of tasks of the stream.
        window: The number of evaluations in a window, 2 or more.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = WindowedForgetting(num_tasks=1, window=3)
        >>> for accuracy in (0.9, 0.5, 0.6, 0.1):
        ...     metric.update(torch.tensor([accuracy]), trained=0)
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool | None = False

    def compute(self) -> Tensor:
        """Compute the windowed forgetting, a scalar."""
        return self.largest_fall.nanmean()


class WindowedPlasticity(_LargestChanges):
    """Compute the largest rise within a few evaluations, WP^w of De Lange et al. (arXiv 2205.13452).

    Takes the same input as `MinAccuracy`; ``compute`` returns a scalar. See `stability.windowed_plasticity`.

    Args:
        num_tasks: The number of tasks of the stream.
        window: The number of evaluations in a window, 2 or more.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = WindowedPlasticity(num_tasks=1, window=3)
        >>> for accuracy in (0.9, 0.1, 0.5):
        ...     metric.update(torch.tensor([accuracy]), trained=0)
        >>> metric.compute()
        tensor(0.4000)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Compute the windowed plasticity, a scalar."""
        return self.largest_rise.nanmean()


def _with_row(matrix: Tensor, row: int, values: Tensor) -> Tensor:
    # A copy: a state that was loaded is the checkpoint's own tensor.
    matrix = matrix.clone()
    matrix[row] = values
    return matrix


def _raised(largest: Tensor, changes: Tensor, measured: Tensor) -> Tensor:
    """Raise the largest change of each measured task to those of ``(window - 1, tasks)``."""
    # The first measurement of a task has nothing to differ from, so that the largest change starts at 0.
    changes = changes.masked_fill(changes.isnan(), 0).amax(dim=0)
    return torch.where(measured, torch.fmax(largest, changes), largest)
