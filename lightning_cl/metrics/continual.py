"""The figures of a stream as metrics, each made of the counts of an accuracy matrix."""

from collections.abc import Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import plot_single_or_multi_val
from typing_extensions import override

from lightning_cl.metrics.accuracy_matrix import AccuracyMatrix, _ratio
from lightning_cl.metrics.functional import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
)


class _ScalarMetric(Metric):
    """A metric whose ``compute`` returns a scalar."""

    @override
    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None
    ) -> tuple[Figure | SubFigure | None, Axes]:
        """Draw one value, or the course of several.

        Args:
            val: What ``compute`` returned, or a list of such values in order; ``None`` to compute it now.
            ax: The axes to draw into; ``None`` for a new figure.

        Returns:
            The figure and its axes.
        """
        if ax is None:
            _, ax = pyplot.subplots(layout="constrained")
        plot_single_or_multi_val(
            self.compute() if val is None else val,
            ax=ax,
            higher_is_better=self.higher_is_better,
            lower_bound=self.plot_lower_bound,
            upper_bound=self.plot_upper_bound,
            name=type(self).__name__,
        )
        return ax.get_figure(), ax


class _StreamMetric(_ScalarMetric, AccuracyMatrix):
    """A scalar made of the counts of an accuracy matrix."""


class AverageAccuracy(_StreamMetric):
    """Compute the mean accuracy over the tasks seen, after the last task that was trained on.

    Takes the same input as `AccuracyMatrix`; ``compute`` returns a scalar. See `functional.average_accuracy`.

    Args:
        num_tasks: The number of tasks of the stream.
        task_classes: The classes of each task, for task-aware accuracy.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = AverageAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), trained=0, evaluated=0)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([1, 0]), trained=1, evaluated=0)
        >>> metric.update(torch.tensor([2, 3]), torch.tensor([2, 3]), trained=1, evaluated=1)
        >>> metric.compute()
        tensor(0.5000)
    """

    @override
    def compute(self) -> Tensor:
        """Compute the average accuracy, a scalar."""
        return average_accuracy(super().compute())


class AverageIncrementalAccuracy(_StreamMetric):
    """Compute the mean of the average accuracies after each task, A_inc of iCaRL (arXiv 1611.07725).

    Takes the same input as `AccuracyMatrix`; ``compute`` returns a scalar.
    See `functional.average_incremental_accuracy`.

    Args:
        num_tasks: The number of tasks of the stream.
        task_classes: The classes of each task, for task-aware accuracy.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = AverageIncrementalAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), trained=0, evaluated=0)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([1, 0]), trained=1, evaluated=0)
        >>> metric.update(torch.tensor([2, 3]), torch.tensor([2, 3]), trained=1, evaluated=1)
        >>> metric.compute()
        tensor(0.6250)
    """

    @override
    def compute(self) -> Tensor:
        """Compute the average incremental accuracy, a scalar."""
        return average_incremental_accuracy(super().compute())


class Forgetting(_StreamMetric):
    """Compute how far the earlier tasks fell below their best, as in Chaudhry et al. (arXiv 1801.10112).

    Takes the same input as `AccuracyMatrix`; ``compute`` returns a scalar, NaN as long as there is one task only.
    See `functional.forgetting`.

    Args:
        num_tasks: The number of tasks of the stream.
        task_classes: The classes of each task, for task-aware accuracy.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = Forgetting(num_tasks=2)
        >>> metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), trained=0, evaluated=0)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([1, 0]), trained=1, evaluated=0)
        >>> metric.update(torch.tensor([2, 3]), torch.tensor([2, 3]), trained=1, evaluated=1)
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = -1.0

    @override
    def compute(self) -> Tensor:
        """Compute the forgetting, a scalar."""
        return forgetting(super().compute())


class BackwardTransfer(_StreamMetric):
    """Compute what later tasks did to earlier ones, as in Lopez-Paz and Ranzato (arXiv 1706.08840).

    Takes the same input as `AccuracyMatrix`; ``compute`` returns a scalar, NaN as long as there is one task only.
    See `functional.backward_transfer`.

    Args:
        num_tasks: The number of tasks of the stream.
        task_classes: The classes of each task, for task-aware accuracy.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = BackwardTransfer(num_tasks=2)
        >>> metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), trained=0, evaluated=0)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([1, 0]), trained=1, evaluated=0)
        >>> metric.update(torch.tensor([2, 3]), torch.tensor([2, 3]), trained=1, evaluated=1)
        >>> metric.compute()
        tensor(-0.7500)
    """

    plot_lower_bound: float | None = -1.0

    @override
    def compute(self) -> Tensor:
        """Compute the backward transfer, a scalar."""
        return backward_transfer(super().compute())


class ForwardTransfer(_StreamMetric):
    """Compute what earlier tasks did for later ones, as in Lopez-Paz and Ranzato (arXiv 1706.08840).

    Takes the same input as `AccuracyMatrix`, of which it needs each task right before it is trained on, and of the
    untrained model (``trained=-1``). ``compute`` returns a scalar; a task without both does not count, and without any
    such task the result is NaN: no baseline is made up. See `functional.forward_transfer`.

    Args:
        num_tasks: The number of tasks of the stream.
        task_classes: The classes of each task, for task-aware accuracy.
        **kwargs: What `torchmetrics.Metric` takes.

    Example::

        >>> import torch
        >>> metric = ForwardTransfer(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1, 0, 0]), torch.tensor([2, 3, 2, 0]), trained=-1, evaluated=1)
        >>> metric.update(torch.tensor([2, 1, 2, 0]), torch.tensor([2, 3, 2, 0]), trained=0, evaluated=1)
        >>> metric.compute()
        tensor(0.5000)
    """

    plot_lower_bound: float | None = -1.0

    @override
    def compute(self) -> Tensor:
        """Compute the forward transfer, a scalar."""
        return forward_transfer(super().compute(), _ratio(self.initial_correct, self.initial_total))
