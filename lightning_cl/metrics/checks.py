"""What the figures of a curve refuse, and with which words."""

import torch
from torch import Tensor


def check_curve(curve: Tensor) -> Tensor:
    """Refuse anything but floats of shape ``(evaluations, tasks)``."""
    _check_floats("curve", curve)
    if curve.ndim != 2 or not curve.shape[1]:
        raise ValueError(f"`curve` must have the shape (evaluations, tasks), got {tuple(curve.shape)}.")
    return curve


def check_trained(trained: Tensor, curve: Tensor) -> Tensor:
    """Refuse anything but one task of the curve per evaluation, in order; give them as ``torch.long``."""
    _check_integers("trained", trained)
    if trained.shape != curve.shape[:1]:
        raise ValueError(
            f"`trained` has shape {tuple(trained.shape)}; it must hold one task per evaluation of `curve`, "
            f"shape ({len(curve)},)."
        )
    # An unsigned type would wrap around where a difference is negative.
    trained, num_tasks = trained.long(), curve.shape[1]
    if len(trained) and not 0 <= int(trained.min()) <= int(trained.max()) < num_tasks:
        raise ValueError(f"`trained` must hold tasks from 0 to {num_tasks - 1}, got {sorted(set(trained.tolist()))}.")
    falls = (trained.diff() < 0).nonzero()
    if len(falls):
        n = int(falls[0])
        raise ValueError(
            f"`trained` must not decrease, got task {int(trained[n + 1])} after task {int(trained[n])} "
            f"at evaluation {n + 1}."
        )
    return trained


def check_window(window: int) -> int:
    """Refuse a window without room for two evaluations."""
    if window < 2:
        raise ValueError(f"`window` must be 2 evaluations or more, got {window}.")
    return window


def check_samples(predicted_task: Tensor, evaluated_task: Tensor) -> None:
    """Refuse anything but two tensors of tasks of shape ``(samples,)``."""
    _check_integers("predicted_task", predicted_task)
    _check_integers("evaluated_task", evaluated_task)
    if predicted_task.ndim != 1 or predicted_task.shape != evaluated_task.shape:
        raise ValueError(
            f"`predicted_task` has shape {tuple(predicted_task.shape)} and `evaluated_task` "
            f"{tuple(evaluated_task.shape)}; both must be (samples,)."
        )
    if len(evaluated_task) and int(evaluated_task.min()) < 0:
        raise ValueError(f"`evaluated_task` must hold tasks from 0 on, got {int(evaluated_task.min())}.")


def check_accuracies(accuracies: Tensor, num_tasks: int) -> None:
    """Refuse anything but floats of shape ``(tasks,)``."""
    _check_floats("accuracies", accuracies)
    if accuracies.shape != (num_tasks,):
        raise ValueError(
            f"`accuracies` has shape {tuple(accuracies.shape)}; it must hold one accuracy per task, "
            f"shape ({num_tasks},), and NaN for a task that was not measured."
        )


def _check_integers(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_floating_point():
        raise TypeError(f"`{name}` must be a tensor of an integer type, got {_kind(values)}.")


def _check_floats(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"`{name}` must be a tensor of a floating point type, got {_kind(values)}.")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
