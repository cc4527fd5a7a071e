"""What each exit says of evaluation data, with nobody leaving."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.exits import ExitHooks
from lightning_cl.heads.exit_rules import Confidence, confidence_of, patience_of
from lightning_cl.metrics.early_exit import ExitScores, cheapest_threshold, exit_curve, mean_curve
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.evaluation import device_batches, evaluating, gather_rows
from lightning_cl.tasks.stream import ReplayStream, Split


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
        for batch in device_batches(trainer, pl_module, loader):
            labels = as_labels(stream.structure.find_targets(batch))
            call(batch)
            logits = torch.stack(hooks.logits, dim=1)
            predictions = logits.argmax(-1)
            sure = patience_of(predictions) if confidence == "patience" else confidence_of(logits, confidence)
            confidences.append(sure.float())
            correct.append(predictions == labels[:, None])
    rows = torch.cat([torch.cat(confidences), torch.cat(correct).float()], dim=1)
    _, rows = gather_rows(trainer, torch.arange(len(rows)), rows)
    heads = rows.shape[1] // 2
    return ExitScores(rows[:, :heads], rows[:, heads:].bool())


class ExitRecord:
    """What was measured of the exits at task ends, and the threshold that was chosen by it.

    Attributes:
        accuracies: Accuracy of each exit on each task after each task, ``(tasks, tasks, exits)``; NaN if not measured.
        scores: What each exit said of the samples of each task at the last task end.
        chosen: The threshold; ``None`` before the first choice.
    """

    def __init__(self) -> None:
        self.accuracies = torch.empty(0, 0, 0)
        self.scores: dict[int, ExitScores] = {}
        self.chosen: float | None = None

    def make_room(self, tasks: int, exits: int) -> None:
        """Have room for all tasks of a stream; one that is continued has more than were saved."""
        before = self.accuracies
        self.accuracies = torch.full((tasks, tasks, exits), torch.nan)
        if before.numel():
            self.accuracies[: len(before), : len(before)] = before

    def take(self, trained: int, scores: dict[int, ExitScores]) -> None:
        """Take down what was measured after a task."""
        self.scores = scores
        for task, part in scores.items():
            self.accuracies[trained, task] = part.correct.float().mean(0)

    def choose(self, costs: Tensor, points: float) -> None:
        """Choose the cheapest threshold that loses at most so many points on the mean of the tasks."""
        curves = [exit_curve(*part, costs) for part in self.scores.values()]
        self.chosen = cheapest_threshold(mean_curve(curves), points)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all."""
        return {
            "accuracies": self.accuracies.clone(),
            "scores": {task: [part.clone() for part in scores] for task, scores in self.scores.items()},
            "chosen": self.chosen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was saved."""
        self.accuracies = state["accuracies"].clone()
        self.scores = {task: ExitScores(*parts) for task, parts in state["scores"].items()}
        self.chosen = state["chosen"]
