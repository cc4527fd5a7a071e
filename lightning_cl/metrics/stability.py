"""Figures of the stability gap as functions of a curve of accuracies.

A *curve* of shape ``(evaluations, tasks)`` holds the accuracy on each task at each evaluation, in order, and NaN where
a task was not measured. ``trained`` of shape ``(evaluations,)`` holds the task in training at each evaluation. Every
evaluation comes after an optimizer step of that task, so the evaluations with ``trained > i`` are those after the
training of task ``i``. A skipped task is a number that ``trained`` leaves out. What a figure needs and does not find is
left out of its mean, and a figure with nothing left is NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cl.metrics.checks import check_curve, check_samples, check_trained, check_window


def min_accuracy(curve: Tensor, trained: Tensor) -> Tensor:
    """Compute how low the old tasks fell since they were learned, min-ACC of De Lange et al. (arXiv 2205.13452).

    The mean, over the tasks before the one in training, of the lowest accuracy at any evaluation after the training of
    that task. `task_minimum_accuracy` looks at the evaluations of the last task only.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.8, torch.nan], [0.3, 0.5], [0.6, 0.7]])
        >>> min_accuracy(curve, trained=torch.tensor([0, 1, 1]))
        tensor(0.3000)
    """
    minimum, _ = _extremes(curve, trained)
    return _old_minima(minimum).nanmean()


def worst_case_accuracy(curve: Tensor, trained: Tensor) -> Tensor:
    """Compute the accuracy at the worst moment, WC-ACC of De Lange et al. (arXiv 2205.13452).

    ``accuracy / k + (1 - 1 / k) * min_accuracy``, with the accuracy on the task in training where it was last measured,
    and ``k`` that task and the old ones that `min_accuracy` averages; a skipped task does not count.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        A scalar; the accuracy itself as long as there is one task only, NaN if the task in training was not measured.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.8, torch.nan], [0.3, 0.5], [0.6, 0.7]])
        >>> worst_case_accuracy(curve, trained=torch.tensor([0, 1, 1]))
        tensor(0.5000)
    """
    minimum, final = _extremes(curve, trained)
    return _worst_case(minimum, final, _last_task(trained))


def task_minimum_accuracy(curve: Tensor, trained: Tensor) -> Tensor:
    """Compute how low the old tasks fell during the last task, "min-ACC" of the NMC paper (arXiv 2411.04723).

    The mean, over the tasks before the last one in training, of the lowest accuracy at any evaluation of that last
    task. `min_accuracy` of De Lange et al. has the same short name and remembers the falls during earlier tasks too, so
    it is never higher if every old task is measured during the last one. The paper measures at the ends of epochs:
    give it the evaluations there to get its figure.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.9, torch.nan, torch.nan], [0.2, 0.8, torch.nan], [0.5, 0.3, 0.9]])
        >>> task_minimum_accuracy(curve, trained=torch.tensor([0, 1, 2]))
        tensor(0.4000)
        >>> min_accuracy(curve, trained=torch.tensor([0, 1, 2]))
        tensor(0.2500)
    """
    minimum, _ = _extremes(curve, trained)
    return _task_minimum(minimum, _last_task(trained))


def windowed_forgetting(curve: Tensor, window: int = 10) -> Tensor:
    """Compute the largest fall within a few evaluations, WF^w of De Lange et al. (arXiv 2205.13452).

    For each task the largest ``curve[m] - curve[n]`` of two evaluations ``m < n`` of the whole run that lie in a window
    of ``window`` consecutive ones, and 0 if it never fell; then the mean over the tasks measured so far. A task that
    was measured once counts as 0, so the mean may drop when a task is new; for the same tasks it never does.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        window: The number of evaluations in a window, 2 or more.

    Returns:
        A scalar; NaN if nothing was measured.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.9], [0.5], [0.6], [0.7], [0.3], [0.6]])
        >>> windowed_forgetting(curve, window=2)
        tensor(0.4000)
        >>> windowed_forgetting(curve, window=6)
        tensor(0.6000)
    """
    return _largest_falls(check_curve(curve), check_window(window)).nanmean()


def windowed_plasticity(curve: Tensor, window: int = 10) -> Tensor:
    """Compute the largest rise within a few evaluations, WP^w of De Lange et al. (arXiv 2205.13452).

    `windowed_forgetting` with ``curve[n] - curve[m]``. It follows the definition: the authors' code passes over
    evaluations at which a task did not fall far enough, and so misses rises.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        window: The number of evaluations in a window, 2 or more.

    Returns:
        A scalar; NaN if nothing was measured.

    Example::

        >>> import torch
        >>> windowed_plasticity(torch.tensor([[0.9], [0.1], [0.5]]), window=3)
        tensor(0.4000)
    """
    return _largest_falls(-check_curve(curve), check_window(window)).nanmean()


class GapMatrices(NamedTuple):
    """The accuracies that bound each stability gap, each of shape ``(tasks, tasks)``.

    Cell ``[t, i]`` is about the old task ``i`` during the training of task ``t``. It is NaN in all three matrices
    unless task ``i`` comes before ``t`` and was measured both before and during the training of ``t``.

    Attributes:
        last: The accuracy where it was last measured before the training of task ``t``.
        minimum: The lowest accuracy during the training of task ``t``.
        final: The accuracy where it was last measured during the training of task ``t``.

    Example::

        >>> import torch
        >>> gaps = stability_gaps(torch.tensor([[0.8, torch.nan], [0.3, 0.5]]), trained=torch.tensor([0, 1]))
        >>> gaps.last - gaps.minimum
        tensor([[   nan,    nan],
                [0.5000,    nan]])
    """

    last: Tensor
    minimum: Tensor
    final: Tensor


def stability_gaps(curve: Tensor, trained: Tensor) -> GapMatrices:
    """Compute the accuracies before, at the bottom and at the end of each gap, as in the NMC paper (arXiv 2411.04723).

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        Three matrices of shape ``(tasks, tasks)``.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.8, torch.nan], [0.3, 0.5], [0.6, 0.7]])
        >>> gaps = stability_gaps(curve, trained=torch.tensor([0, 1, 1]))
        >>> gaps.last[1, 0], gaps.minimum[1, 0], gaps.final[1, 0]
        (tensor(0.8000), tensor(0.3000), tensor(0.6000))
    """
    return _gap_matrices(*_extremes(curve, trained))


def stability_gap(curve: Tensor, trained: Tensor) -> Tensor:
    """Compute how far the old tasks fall while a new one is trained on, SG of the NMC paper (arXiv 2411.04723).

    For each task and each old one, the accuracy before the task less the minimum during it; the mean over the old tasks
    of each task, then over the tasks. The paper takes the minimum over the ends of epochs, this function over the
    evaluations that it is given. Negative means that the old tasks only got better.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.8, torch.nan], [0.3, 0.5], [0.6, 0.7]])
        >>> stability_gap(curve, trained=torch.tensor([0, 1, 1]))
        tensor(0.5000)
    """
    return _mean_gap(stability_gaps(curve, trained))


def normalized_stability_gap(curve: Tensor, trained: Tensor) -> Tensor:
    """Compute the share of the accuracy that the old tasks lose, SG_norm of the NMC paper (arXiv 2411.04723).

    `stability_gap` with each gap divided by the accuracy before it. An old task whose accuracy was 0 has no share to
    lose and is left out.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.8, torch.nan], [0.3, 0.5], [0.6, 0.7]])
        >>> normalized_stability_gap(curve, trained=torch.tensor([0, 1, 1]))
        tensor(0.6250)
    """
    return _mean_normalized_gap(stability_gaps(curve, trained))


def recovery(curve: Tensor, trained: Tensor) -> Tensor:
    """Compute how far the old tasks come back by the end of a new one, REC of the NMC paper (arXiv 2411.04723).

    As `stability_gap`, with the accuracy at the end of the task less the minimum during it. Little recovery may mean
    that nothing came back, or that nothing was lost.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.8, torch.nan], [0.3, 0.5], [0.6, 0.7]])
        >>> recovery(curve, trained=torch.tensor([0, 1, 1]))
        tensor(0.3000)
    """
    return _mean_recovery(stability_gaps(curve, trained))


def normalized_recovery(curve: Tensor, trained: Tensor) -> Tensor:
    """Compute the recovery as a share of the accuracy before the gap, REC_norm of the NMC paper (arXiv 2411.04723).

    `recovery` with each one divided by the accuracy before the gap; an old task whose accuracy was 0 is left out.

    Args:
        curve: The accuracy on each task at each evaluation, of shape ``(evaluations, tasks)``.
        trained: The task in training at each evaluation, of shape ``(evaluations,)``.

    Returns:
        A scalar; NaN as long as there is one task only.

    Example::

        >>> import torch
        >>> curve = torch.tensor([[0.8, torch.nan], [0.3, 0.5], [0.6, 0.7]])
        >>> normalized_recovery(curve, trained=torch.tensor([0, 1, 1]))
        tensor(0.3750)
    """
    return _mean_normalized_recovery(stability_gaps(curve, trained))


def task_recency_bias(predicted_task: Tensor, evaluated_task: Tensor, current: int) -> Tensor:
    """Compute the share of old samples that are taken for the newest task, as in the NMC paper (arXiv 2411.04723).

    The mean over the old tasks of the share of their samples whose predicted task is ``current``; each task weighs the
    same. The predicted task of a sample is that of its predicted class.

    Args:
        predicted_task: The task of each prediction, of shape ``(samples,)``.
        evaluated_task: The task that each sample belongs to, of shape ``(samples,)``; those of ``current`` and later
            tasks do not count.
        current: The newest task.

    Returns:
        A scalar; NaN without samples of old tasks.

    Example::

        >>> import torch
        >>> task_recency_bias(torch.tensor([0, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 0, 1]), current=2)
        tensor(0.7500)
    """
    check_samples(predicted_task, evaluated_task)
    if current < 0:
        raise ValueError(f"`current` must be the index of a task, 0 or more, got {current}.")
    old = evaluated_task < current
    newest, total = _recency_counts(predicted_task[old], evaluated_task[old], current, num_tasks=current)
    return (newest / total).nanmean()


def _extremes(curve: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Find the minimum and the last accuracy on task ``i`` while task ``t`` is trained on, at ``[t, i]``."""
    num_tasks = check_curve(curve).shape[1]
    trained = check_trained(trained, curve).to(curve.device)
    minimum = curve.new_full((num_tasks, num_tasks), torch.nan)
    final = minimum.clone()
    for task in set(trained.tolist()):
        rows = curve[trained == task]
        minimum[task], final[task] = _minimum(rows), _latest(rows)
    return minimum, final


def _minimum(rows: Tensor) -> Tensor:
    """Find the lowest accuracy in each column of ``(evaluations, tasks)``; NaN where nothing was measured."""
    unmeasured = rows.isnan()
    return rows.masked_fill(unmeasured, torch.inf).amin(dim=0).masked_fill(unmeasured.all(dim=0), torch.nan)


def _latest(rows: Tensor) -> Tensor:
    """Find the last measured accuracy in each column of ``(evaluations, tasks)``; NaN where nothing was measured."""
    positions = torch.arange(len(rows), device=rows.device).unsqueeze(1).expand_as(rows)
    last = positions.masked_fill(rows.isnan(), 0).amax(dim=0, keepdim=True)
    return rows.gather(0, last).squeeze(0)


def _last_task(trained: Tensor) -> int:
    # Without evaluations there is nothing measured for task 0 either, and every figure is NaN.
    return int(trained[-1]) if len(trained) else 0


def _old_minima(minimum: Tensor) -> Tensor:
    """Find the lowest accuracy on each task after its training, of shape ``(tasks,)``."""
    after = torch.ones_like(minimum, dtype=torch.bool).tril(diagonal=-1)
    return _minimum(minimum.masked_fill(~after, torch.nan))


def _worst_case(minimum: Tensor, final: Tensor, current: int) -> Tensor:
    minima = _old_minima(minimum)
    # The weights 1 / k and (k - 1) / k of the formula make it the plain mean of k accuracies.
    return (final[current, current] + minima.nansum()) / (1 + (~minima.isnan()).sum())


def _task_minimum(minimum: Tensor, current: int) -> Tensor:
    return minimum[current, :current].nanmean()


def _largest_falls(curve: Tensor, window: int) -> Tensor:
    """Find the largest fall of each task, of shape ``(tasks,)``; 0 if it never fell, NaN if it was not measured."""
    largest = curve.new_zeros(curve.shape[1]).masked_fill(curve.isnan().all(dim=0), torch.nan)
    for offset in range(1, min(window, len(curve))):
        falls = curve[:-offset] - curve[offset:]
        largest = torch.maximum(largest, falls.masked_fill(falls.isnan(), 0).amax(dim=0))
    return largest


def _gap_matrices(minimum: Tensor, final: Tensor) -> GapMatrices:
    last = torch.full_like(final, torch.nan)
    for task in range(1, len(final)):
        last[task] = _latest(final[:task])
    old = torch.ones_like(final, dtype=torch.bool).tril(diagonal=-1)
    undefined = ~old | last.isnan() | minimum.isnan()
    return GapMatrices(*(matrix.masked_fill(undefined, torch.nan) for matrix in (last, minimum, final)))


def _mean_gap(gaps: GapMatrices) -> Tensor:
    return _mean_over_tasks(gaps.last - gaps.minimum)


def _mean_normalized_gap(gaps: GapMatrices) -> Tensor:
    return _mean_over_tasks((gaps.last - gaps.minimum) / gaps.last.masked_fill(gaps.last == 0, torch.nan))


def _mean_recovery(gaps: GapMatrices) -> Tensor:
    return _mean_over_tasks(gaps.final - gaps.minimum)


def _mean_normalized_recovery(gaps: GapMatrices) -> Tensor:
    return _mean_over_tasks((gaps.final - gaps.minimum) / gaps.last.masked_fill(gaps.last == 0, torch.nan))


def _mean_over_tasks(matrix: Tensor) -> Tensor:
    return matrix.nanmean(dim=1).nanmean()


def _recency_counts(predicted: Tensor, evaluated: Tensor, current: int, num_tasks: int) -> tuple[Tensor, Tensor]:
    """Count the samples of each task that are taken for ``current``, and all, each of shape ``(num_tasks,)``."""
    newest = evaluated[predicted == current].bincount(minlength=num_tasks)
    return newest, evaluated.bincount(minlength=num_tasks)
