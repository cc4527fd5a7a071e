"""Figures of a stream as functions of its accuracy matrix.

In a matrix of shape ``(tasks, tasks)``, ``matrix[i, j]`` is the accuracy on task ``j`` after training on task ``i``,
and NaN is what was not measured. A skipped task is a row of NaN; a stream that is still running has NaN rows at its
end. What a figure needs and does not find is left out of its mean, and a figure with nothing left is NaN.
"""

from typing import Literal

import torch
from torch import Tensor


def average_accuracy(matrix: Tensor) -> Tensor:
    """Compute the mean accuracy over the tasks seen, at the last measured row.

    Every task weighs the same, however many samples it has. Tasks that were measured before they were trained on do
    not count.

    Args:
        matrix: The accuracy matrix, of shape ``(tasks, tasks)``.

    Returns:
        A scalar.

    Example::

        >>> import torch
        >>> average_accuracy(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
        tensor(0.6500)
    """
    _check_matrix(matrix)
    return _row_averages(matrix)[_last_row(matrix)]


def average_incremental_accuracy(matrix: Tensor) -> Tensor:
    """Compute the mean of the average accuracies after each task, A_inc of iCaRL (arXiv 1611.07725).

    Args:
        matrix: The accuracy matrix, of shape ``(tasks, tasks)``.

    Returns:
        A scalar.

    Example::

        >>> import torch
        >>> average_incremental_accuracy(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
        tensor(0.7750)
    """
    _check_matrix(matrix)
    return _row_averages(matrix).nanmean()


def forgetting(matrix: Tensor, mode: Literal["max", "min"] = "max") -> Tensor:
    """Compute how far the earlier tasks fell below their best, as in Chaudhry et al. (arXiv 1801.10112).

    With ``t`` the last measured row, the mean over the tasks ``u < t`` of
    ``max_{t' < t} matrix[t', u] - matrix[t, u]``. The best is taken over all earlier rows, those before task ``u`` was
    trained on too where they were measured.
    Negative forgetting means that old tasks got better.

    Args:
        matrix: The matrix of accuracies, or of any other figure, of shape ``(tasks, tasks)``.
        mode: Whether a good figure is high (``"max"``, accuracy) or low (``"min"``, an error). Positive is
            worse either way.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> forgetting(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
        tensor(0.4000)
        >>> forgetting(torch.tensor([[1.5, 9.0], [4.0, 2.0]]), mode="min")
        tensor(2.5000)
    """
    gains = _sign(mode) * _check_matrix(matrix)
    last = _last_row(matrix)
    earlier = gains[:last, :last]
    if last == 0:
        return gains.new_tensor(torch.nan)
    best = earlier.masked_fill(earlier.isnan(), -torch.inf).amax(dim=0)
    best = best.masked_fill(earlier.isnan().all(dim=0), torch.nan)
    return (best - gains[last, :last]).nanmean()


def backward_transfer(matrix: Tensor, mode: Literal["max", "min"] = "max") -> Tensor:
    """Compute what later tasks did to earlier ones, as in Lopez-Paz and Ranzato (arXiv 1706.08840).

    With ``t`` the last measured row, the mean over the tasks ``j < t`` of ``matrix[t, j] - matrix[j, j]``.

    Args:
        matrix: The matrix of accuracies, or of any other figure, of shape ``(tasks, tasks)``.
        mode: Whether a good figure is high (``"max"``, accuracy) or low (``"min"``, an error). Positive is
            better either way.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> backward_transfer(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
        tensor(-0.4000)
    """
    gains = _sign(mode) * _check_matrix(matrix)
    last = _last_row(matrix)
    return (gains[last, :last] - gains.diagonal()[:last]).nanmean()


def forward_transfer(matrix: Tensor, baseline: Tensor, mode: Literal["max", "min"] = "max") -> Tensor:
    """Compute what earlier tasks did for later ones, as in Lopez-Paz and Ranzato (arXiv 1706.08840).

    The mean over the tasks ``j >= 1`` of ``matrix[j - 1, j] - baseline[j]``. It takes a matrix that was measured on
    tasks to come.

    Args:
        matrix: The matrix of accuracies, or of any other figure, of shape ``(tasks, tasks)``.
        baseline: What the untrained model reaches on each task, of shape ``(tasks,)``. There is no default:
            zeros would count chance as transfer.
        mode: Whether a good figure is high (``"max"``, accuracy) or low (``"min"``, an error). Positive is
            better either way.

    Returns:
        A scalar; NaN if no task was measured right before it was trained on.

    Example::

        >>> import torch
        >>> forward_transfer(torch.tensor([[0.9, 0.3], [0.5, 0.8]]), baseline=torch.tensor([0.1, 0.1]))
        tensor(0.2000)
    """
    sign = _sign(mode)
    gains = sign * _check_matrix(matrix)
    if baseline.shape != matrix.shape[1:]:
        raise ValueError(
            f"`baseline` has shape {tuple(baseline.shape)}; it must hold one figure per task, "
            f"shape ({matrix.shape[1]},)."
        )
    return (gains.diagonal(1) - sign * baseline[1:]).nanmean()


def _check_matrix(matrix: Tensor) -> Tensor:
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = f"a tensor of {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"`matrix` must be a tensor of a floating point type, got {got}.")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"`matrix` must have the shape (tasks, tasks), got {tuple(matrix.shape)}.")
    return matrix


def _sign(mode: str) -> int:
    if mode not in ("max", "min"):
        raise ValueError(f'`mode` must be "max" or "min", got {mode!r}.')
    return 1 if mode == "max" else -1


def _row_averages(matrix: Tensor) -> Tensor:
    """Average each row over the tasks seen by then; NaN where nothing was measured. Shape ``(tasks,)``."""
    unseen = torch.ones_like(matrix, dtype=torch.bool).triu(diagonal=1)
    return matrix.masked_fill(unseen, torch.nan).nanmean(dim=1)


def _last_row(matrix: Tensor) -> int:
    """Find the last row with a measured task that was seen by then, or 0."""
    measured = (~_row_averages(matrix).isnan()).nonzero()
    return int(measured[-1]) if len(measured) else 0
