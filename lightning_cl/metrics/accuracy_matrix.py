"""The accuracy on every task after training on every task."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from torchmetrics import Metric

from lightning_cl.metrics.heatmap import draw_accuracy_matrix


class AccuracyMatrix(Metric):
    """Compute the accuracy on each task after training on each task.

    ``matrix[i, j]`` is the accuracy on task ``j`` after training on task ``i``; NaN where nothing was measured. It
    counts samples, so the matrix is exact whatever the batch sizes and the number of processes. The metrics of a stream
    (`AverageAccuracy`, `Forgetting`, …) share its states and its ``update``.

    As input to ``forward`` and ``update`` the metric takes:

    - ``preds``: logits of shape ``(batch, classes)`` or predicted labels of shape ``(batch,)``.
    - ``target``: labels of shape ``(batch,)``.
    - ``trained``: the index of the task that was trained on last; -1 before any training (see `ForwardTransfer`).
    - ``evaluated``: the index of the task that the batch belongs to.

    As output of ``compute`` it returns a tensor of shape ``(num_tasks, num_tasks)``; for one task a scalar, since
    torchmetrics squeezes it.

    Args:
        num_tasks: The number of tasks of the stream.
        task_classes: The classes of each task. With them the accuracy is task-aware: only the classes of the evaluated
            task compete for a sample. Without them it is task-agnostic: all classes compete.
        **kwargs: What `torchmetrics.Metric` takes.

    Raises:
        ValueError: If ``num_tasks`` is no positive number or ``task_classes`` does not fit to it.

    Example::

        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 3.0, 0.0], [1.0, 3.0, 2.0, 0.0]])
        >>> target = torch.tensor([0, 1])
        >>> agnostic = AccuracyMatrix(num_tasks=2)
        >>> agnostic.update(logits, target, trained=0, evaluated=0)
        >>> agnostic.compute()
        tensor([[0.5000,    nan],
                [   nan,    nan]])
        >>> aware = AccuracyMatrix(num_tasks=2, task_classes=[[0, 1], [2, 3]])
        >>> aware.update(logits, target, trained=0, evaluated=0)
        >>> aware.compute()
        tensor([[1., nan],
                [nan, nan]])
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    correct: Tensor
    total: Tensor
    initial_correct: Tensor
    initial_total: Tensor

    def __init__(self, num_tasks: int, task_classes: list[list[int]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` must be 1 or more, got {num_tasks}.")
        if task_classes is not None and len(task_classes) != num_tasks:
            raise ValueError(
                f"`task_classes` has classes for {len(task_classes)} tasks; "
                f"it must have one list for each of the {num_tasks} tasks."
            )
        if task_classes is not None and not all(task_classes):
            raise ValueError(f"`task_classes` must name at least one class per task, got {task_classes}.")
        self.num_tasks = num_tasks
        self.task_classes = task_classes
        for name, shape in (("", (num_tasks, num_tasks)), ("initial_", (num_tasks,))):
            self.add_state(f"{name}correct", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
            self.add_state(f"{name}total", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, trained: int, evaluated: int) -> None:
        """Count the correct predictions of a batch of one task.

        Args:
            preds: Logits of shape ``(batch, classes)``, or predicted labels of shape ``(batch,)``.
            target: Labels of shape ``(batch,)``.
            trained: The task that was trained on last; -1 before any training.
            evaluated: The task that the batch belongs to.

        Raises:
            ValueError: If the shapes or the task indices do not fit.
        """
        self._check_tasks(trained, evaluated)
        correct = (self._labels(preds, target, evaluated) == target).sum()
        if trained == -1:
            self.initial_correct[evaluated] += correct
            self.initial_total[evaluated] += len(target)
        else:
            self.correct[trained, evaluated] += correct
            self.total[trained, evaluated] += len(target)

    def compute(self) -> Tensor:
        """Compute the accuracy matrix, of shape ``(num_tasks, num_tasks)``."""
        return _ratio(self.correct, self.total)

    def baseline(self) -> Tensor:
        """Compute the accuracy of the untrained model on each task, of shape ``(num_tasks,)``; NaN if not measured."""
        with self.sync_context(should_sync=self.sync_on_compute):
            return _ratio(self.initial_correct, self.initial_total)

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None
    ) -> tuple[Figure | SubFigure | None, Axes]:
        """Draw the matrix as a heat map with a number in each cell.

        Args:
            val: What ``compute`` returned; ``None`` to compute it now.
            ax: The axes to draw into; ``None`` for a new figure.

        Returns:
            The figure and its axes.

        Raises:
            TypeError: If ``val`` is no single matrix.
        """
        matrix = self.compute() if val is None else val
        if not isinstance(matrix, Tensor):
            raise TypeError(f"`val` must be one matrix that `compute` returned, got {type(val).__name__}.")
        if ax is None:
            _, ax = pyplot.subplots(layout="constrained")
        # `compute` squeezes the matrix of a single task to a scalar, as torchmetrics does with every metric
        draw_accuracy_matrix(matrix.view(1, 1) if matrix.ndim == 0 else matrix, ax)
        return ax.get_figure(), ax

    def _check_tasks(self, trained: int, evaluated: int) -> None:
        if not -1 <= trained < self.num_tasks:
            raise ValueError(
                f"`trained` is task {trained}; the stream has tasks 0 to {self.num_tasks - 1}, "
                "and -1 stands for the untrained model."
            )
        if not 0 <= evaluated < self.num_tasks:
            raise ValueError(f"`evaluated` is task {evaluated}; the stream has tasks 0 to {self.num_tasks - 1}.")

    def _labels(self, preds: Tensor, target: Tensor, evaluated: int) -> Tensor:
        if target.ndim != 1 or preds.ndim not in (1, 2) or len(preds) != len(target):
            raise ValueError(
                f"`preds` has shape {tuple(preds.shape)} and `target` {tuple(target.shape)}; "
                "they must be (batch, classes) or (batch,), and (batch,)."
            )
        if self.task_classes is None:
            return preds if preds.ndim == 1 else preds.argmax(dim=1)
        if preds.ndim == 1:
            raise ValueError(
                "`preds` holds labels (batch,); with `task_classes` it must hold logits (batch, classes), "
                "of which those of the evaluated task are compared."
            )
        classes = self.task_classes[evaluated]
        if not 0 <= min(classes) <= max(classes) < preds.shape[1]:
            raise ValueError(
                f"`task_classes` gives task {evaluated} the classes {classes}; "
                f"`preds` has logits for the classes 0 to {preds.shape[1] - 1}."
            )
        candidates = torch.tensor(classes, device=preds.device)
        return candidates[preds[:, candidates].argmax(dim=1)]


def _ratio(correct: Tensor, total: Tensor) -> Tensor:
    # 0 / 0 is the NaN that marks a cell as not measured.
    return correct / total
