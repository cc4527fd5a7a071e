"""What each exit says of samples, with nobody leaving, and what follows from it."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.exits import ExitHooks
from lightning_cl.heads.exit_rules import Confidence, confidences_by_exit
from lightning_cl.heads.task_logit_correction import TaskLogitCorrection, fit_task_logit_correction
from lightning_cl.metrics.early_exit import ExitScores, ExitSummary, cheapest_threshold, exit_summary, mean_curve
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.evaluation import device_batches, evaluate_samples, evaluating, gather_rows
from lightning_cl.tasks.stream import ReplayStream, Split

_DRY_SAMPLES = 32


def score_exits(
    trainer: Trainer,
    pl_module: LightningModule,
    stream: ReplayStream,
    hooks: ExitHooks,
    call: Callable[[Any], Tensor],
    confidence: Confidence,
    task: int,
    split: Split = "val",
) -> ExitScores | None:
    """Return how sure and how right each exit is of a task's samples; to be called on all ranks.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        stream: The tasks.
        hooks: The exits on the module.
        call: Calls the module on a batch.
        confidence: What sure means.
        task: Whose samples.
        split: Which of its sets.

    Returns:
        The scores of all ranks' samples, ``None`` if the task has no such set.
    """
    loader = stream.evaluation_loader(task, split)
    if loader is None:
        return None
    confidences, correct = [], []
    with evaluating(trainer, pl_module), hooks.collecting():
        for batch in device_batches(trainer, pl_module, loader, _dry_batches(trainer)):
            labels = as_labels(stream.structure.find_targets(batch))
            call(batch)
            logits = torch.stack(hooks.logits, dim=1)
            confidences.append(confidences_by_exit(logits, confidence).float())
            correct.append(logits.argmax(-1) == labels[:, None])
    rows = torch.cat([torch.cat(confidences), torch.cat(correct).float()], dim=1)
    _, rows = gather_rows(trainer, torch.arange(len(rows)), rows)
    heads = rows.shape[1] // 2
    return ExitScores(rows[:, :heads], rows[:, heads:].bool())


def fit_correction(
    trainer: Trainer,
    pl_module: LightningModule,
    stream: ReplayStream,
    hooks: ExitHooks,
    call: Callable[[Any], Tensor],
    rejected: Sequence[int],
) -> TaskLogitCorrection:
    """Fit the correction for the tasks seen to training samples of the current one; to be called on all ranks."""
    task = stream.current_task.index

    def logits_of(batch: Any) -> Tensor:
        call(batch)
        return torch.stack(hooks.logits, dim=1)

    samples = torch.arange(stream.samples_of(task) or 0)
    if _dry_batches(trainer) is not None:
        samples = samples[:_DRY_SAMPLES]
    with hooks.uncorrected(), hooks.collecting():
        rows = evaluate_samples(trainer, pl_module, stream, task, samples, logits_of)
    heads = hooks.count
    return fit_task_logit_correction(rows.view(len(rows), heads, -1), classes_seen(stream, task, rejected))


def _dry_batches(trainer: Trainer) -> int | None:
    """Return how many batches ``fast_dev_run`` leaves; ``None`` in a real run."""
    return int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]


def classes_seen(stream: ReplayStream, task: int, rejected: Sequence[int] = ()) -> list[list[int]]:
    """Return the classes of each task up to one, but for those that were skipped."""
    return [list(seen.classes or ()) for seen in stream.tasks[: task + 1] if seen.index not in rejected]


def points_to_lose(threshold: float | str | None) -> float | None:
    """Return the percentage points that a threshold may cost that is to be chosen; ``None`` for one that is given.

    Raises:
        TypeError: If it is no number at all.
        ValueError: If it is neither.

    Example::

        >>> points_to_lose("auto:0.5pp")
        0.5
    """
    if isinstance(threshold, str):
        found = re.fullmatch(r"auto:(\d+(?:\.\d*)?)pp", threshold)
        if found is None:
            raise ValueError(f"`threshold` must be from 0 to 1, None, or as in 'auto:0.5pp', got {threshold!r}.")
        return float(found[1])
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"`threshold` must be a number from 0 to 1, None, or as in 'auto:0.5pp', got {threshold!r}.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must be from 0 to 1, got {threshold}.")
    return None


class ExitRecord:
    """What was measured of the exits at task ends, and the threshold and correction that were found by it.

    Attributes:
        accuracies: Accuracy of each exit on each task after each task, ``(tasks, tasks, exits)``; NaN if not measured.
        summaries: What was measured of each task at the last task end; its size does not grow with the samples.
        chosen: The threshold; ``None`` before the first choice.
        correction: Of the logits, with the classes of the tasks that it is for; ``None`` before the first fit.
    """

    def __init__(self) -> None:
        self.accuracies = torch.empty(0, 0, 0)
        self.summaries: dict[int, ExitSummary] = {}
        self.chosen: float | None = None
        self.correction: tuple[TaskLogitCorrection, list[list[int]]] | None = None

    @property
    def corrects(self) -> Callable[[Tensor], Tensor] | None:
        """What the correction makes of logits."""
        if self.correction is None:
            return None
        correction, classes = self.correction
        return partial(correction.apply, classes=classes)

    def make_room(self, tasks: int, exits: int) -> None:
        """Have room for all tasks of a stream; one that is continued has more than were saved."""
        before = self.accuracies
        self.accuracies = torch.full((tasks, tasks, exits), torch.nan)
        if before.numel():
            self.accuracies[: len(before), : len(before)] = before

    def take(self, trained: int, scores: Mapping[int, ExitScores], threshold: float | str | None) -> None:
        """Take down what was measured after a task, with the threshold in use, unless that is one to be chosen."""
        given = None if isinstance(threshold, str) else threshold
        self.summaries = {task: exit_summary(part, given) for task, part in scores.items()}
        for task, summary in self.summaries.items():
            self.accuracies[trained, task] = summary.exit_accuracies

    def choose(self, costs: Tensor, points: float) -> None:
        """Choose the cheapest threshold that loses at most so many points on the mean of the tasks."""
        curves = [summary.curve(costs) for summary in self.summaries.values()]
        self.chosen = cheapest_threshold(mean_curve(curves), points)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all."""
        return {
            "accuracies": self.accuracies.clone(),
            "summaries": {task: [part.clone() for part in summary] for task, summary in self.summaries.items()},
            "chosen": self.chosen,
            "correction": None if self.correction is None else [list(self.correction[0]), self.correction[1]],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was saved."""
        self.accuracies = state["accuracies"].clone()
        self.summaries = {task: ExitSummary(*parts) for task, parts in state["summaries"].items()}
        self.chosen = state["chosen"]
        saved = state["correction"]
        self.correction = None if saved is None else (TaskLogitCorrection(*saved[0]), saved[1])
