"""Rank the samples of a task by how suspiciously they moved, for a person to look at."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_count, check_list
from lightning_cl.metrics.sample_shift import precision_at_k, sample_scores
from lightning_cl.reporting.sample_screen import ScreenedSample, write_ranking, write_suspects
from lightning_cl.tasks import Task
from lightning_cl.tasks.evaluation import evaluating, sample_batches
from lightning_cl.tasks.probes import choose
from lightning_cl.tasks.run_directory import run_directory
from lightning_cl.tasks.sample_outputs import SampleOutputs
from lightning_cl.tasks.stream_callback import StreamCallback

_USUAL = 8  # images of the least suspicious, to compare with: one row


class Ranking(NamedTuple):
    """The samples of a task, the most suspicious first.

    Args:
        indices: Positions in the training data of the task, ``(samples,)``.
        scores: How far each moved, compared with others of its class, ``(samples,)``.
    """

    indices: Tensor
    scores: Tensor


class SampleScreen(StreamCallback):
    """Rank the samples of a task by how suspiciously they moved while it was learnt, for a person to look at.

    A `PoisonDetector` judges whole tasks (arXiv 2507.04106). Where only some samples are poisoned, this observer says
    which to look at first: it compares what the layers put out for each training sample before and after the task, and
    scores a sample by how far that is from the usual of its class. It changes no bit of the run, and screens a task
    that is about to be undone, too.

    The log directory gets ``suspicious_task_<i>.csv``, a table of all samples by rank, and, of images,
    ``suspicious_task_<i>.png``: the most suspicious, and some of the least to compare them with. Where the poison is
    known, as in a `PoisonedTask`, ``screen/precision_at_k`` is logged: the share of poisoned samples among the first k,
    k being their number.

    From the start of a task to its end the outputs at its start are kept, in checkpoints, too: 2 bytes a sample and
    channel of the layers. `layers` and `samples` bound it.

    Args:
        layers: Shell patterns of the layers to compare; all layers with weights but
            the classification layer if ``None``.
        tasks: Indices of the tasks to screen; all but the first if ``None``, before which no network is trained.
        samples: Training samples of each task to screen, drawn once; all if ``None``.
        top: How many samples the picture shows.

    Example::

        >>> SampleScreen(samples=2000, top=48).observer
        True
    """

    observer = True

    def __init__(
        self,
        layers: list[str] | None = None,
        tasks: list[int] | None = None,
        samples: int | None = None,
        top: int = 24,
    ) -> None:
        if layers is not None:
            check_list("layers", layers, str, "a list of layer names or patterns")
        if tasks is not None:
            check_list("tasks", tasks, int, "a list of task indices")
            if not tasks or min(tasks) < 0:
                raise ValueError(f"`tasks` must name at least one task, counted from 0, got {tasks!r}.")
        check_count("samples", samples)
        if top is None:
            raise TypeError("`top` must be a whole number, got None.")
        check_count("top", top)
        self.layers = layers
        self.tasks = tasks
        self.samples = samples
        self.top = top
        self.rankings: dict[int, Ranking] = {}
        self._before: dict[str, Tensor] = {}
        self._newest: tuple[int, Ranking] | None = None
        self._log_dir: Path | None = None
        self._outputs = SampleOutputs(layers)

    @override
    def forget(self) -> None:
        super().forget()
        self._outputs.forget()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        tasks = self.need_stream(trainer, "compares samples before and after a task", several=True).tasks
        if self.tasks is not None and max(self.tasks) >= len(tasks):
            raise MisconfigurationException(
                f"`tasks={self.tasks}` of SampleScreen has one outside the stream, whose tasks are 0 to"
                f" {len(tasks) - 1}."
            )
        self.check_indexed(filter(self._screens, tasks))
        self.rankings, self._before, self._newest = {}, {}, None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outputs.find(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_dir = run_directory(trainer)
        self._outputs.check(trainer, pl_module, self.stream)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._before = {}
        if self._screens(task):
            drawn = self._drawn(task)
            _, outputs = self._outputs.take(trainer, pl_module, self.stream, task.index, drawn)
            kept = self._outputs.drop_head(pl_module, self.stream, outputs)
            self._before = {name: _halved(rows) for name, rows in kept.items()}

    @override
    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        before, self._before = self._before, {}
        if not self._screens(task) or self.clock.repeats:  # a task that is trained again is screened then
            return True
        if not before:  # resumed from the middle of the task, and the checkpoint is of a run without a screen
            rank_zero_warn(
                f"SampleScreen did not see the start of task {task.index} ({task.name}), so it is not screened."
            )
            return True
        drawn = self._drawn(task)
        labels, after = self._outputs.take(trainer, pl_module, self.stream, task.index, drawn)
        scores = sample_scores(before, {name: _halved(rows) for name, rows in after.items()}, labels)
        order = scores.argsort(descending=True, stable=True)
        ranking = Ranking(drawn[order], scores[order])
        self.rankings[task.index] = ranking
        self._newest = task.index, ranking
        poisoned = _known_poison(trainer, task.index, ranking.indices)
        if poisoned is not None and bool(poisoned.any()):
            precision = float(precision_at_k(ranking.scores, poisoned))
            pl_module.log(
                "screen/precision_at_k", precision, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
            )
        self._write(trainer, pl_module, task, labels[order], poisoned)
        return True

    @override
    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self._newest is not None and self._newest[0] == task.index:
            # what was seen of the task is not undone with it
            self.rankings[task.index] = self._newest[1]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "before": {name: rows.clone() for name, rows in self._before.items()},
            "rankings": {
                task: {"indices": ranking.indices.clone(), "scores": ranking.scores.clone()}
                for task, ranking in self.rankings.items()
            },
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.in_stream:  # a test screens nothing, and must not replace the rankings of a fit
            return
        for name, own in self._settings().items():
            if state_dict["settings"][name] != own:
                raise MisconfigurationException(
                    f"The checkpoint is from a SampleScreen with `{name}={state_dict['settings'][name]!r}`, this one"
                    f" has `{name}={own!r}`: samples would be compared with others. Resume with the same."
                )
        self._before = {name: rows.clone() for name, rows in state_dict["before"].items()}
        self.rankings = {
            task: Ranking(saved["indices"].clone(), saved["scores"].clone())
            for task, saved in state_dict["rankings"].items()
        }

    def ranking(self, task: int | None = None) -> Ranking:
        """Return the samples of a task, the most suspicious first.

        Args:
            task: Its index; by default that of the task that was screened last.

        Raises:
            ValueError: If it was not screened, naming the tasks that were.
        """
        if not self.rankings:
            raise ValueError("SampleScreen has screened no task yet.")
        task = list(self.rankings)[-1] if task is None else task
        if task not in self.rankings:
            raise ValueError(f"`task={task}` was not screened; these were: {', '.join(map(str, self.rankings))}.")
        return self.rankings[task]

    def _settings(self) -> dict[str, Any]:
        return copy.deepcopy({"layers": self.layers, "tasks": self.tasks, "samples": self.samples})

    def _screens(self, task: Task) -> bool:
        return task.index > 0 if self.tasks is None else task.index in self.tasks

    def _drawn(self, task: Task) -> Tensor:
        count = self.stream.samples_of(task.index) or 0
        return choose(min(self.samples or count, count), count, self.stream.seed, task.index)

    def _write(
        self, trainer: Trainer, pl_module: LightningModule, task: Task, labels: Tensor, poisoned: Tensor | None
    ) -> None:
        if self._log_dir is None:
            return
        indices, scores = self.rankings[task.index]
        known = [None] * len(indices) if poisoned is None else poisoned.tolist()
        rows = zip(indices.tolist(), labels.tolist(), scores.tolist(), known, strict=True)
        samples = [ScreenedSample(*row) for row in rows]
        suspects, rest = samples[: self.top], samples[self.top :]
        usual = rest[-_USUAL:][::-1]
        shown = torch.tensor([sample.position for sample in (*suspects, *usual)])
        images = self._images(trainer, pl_module, task, shown)
        if not trainer.is_global_zero:
            return
        name = f"suspicious_task_{task.index}"
        write_ranking(self._log_dir / f"{name}.csv", samples)
        if images is not None:
            title = f"task {task.index} ({task.name}): most suspicious of {len(samples)} samples"
            write_suspects(self._log_dir / f"{name}.png", suspects, usual, images, title)

    def _images(self, trainer: Trainer, pl_module: LightningModule, task: Task, indices: Tensor) -> Tensor | None:
        """Return samples as an evaluation sees them, channels first, on the CPU; ``None`` if they are no images."""
        places: list[int] = []
        rows: list[Tensor] = []
        with evaluating(trainer, pl_module):
            for ids, batch in sample_batches(trainer, pl_module, self.stream, task.index, indices, every_rank=True):
                try:
                    inputs = self.stream.structure.find_inputs(batch)
                except ValueError:
                    return None
                images = _channels_first(inputs)
                if images is None or len(images) != len(ids) or (rows and rows[0].shape[1:] != images.shape[1:]):
                    return None
                places.extend(ids)
                rows.append(images.detach().cpu())
        return torch.cat(rows)[torch.tensor(places).argsort()]


def _known_poison(trainer: Trainer, task: int, indices: Tensor) -> Tensor | None:
    """Return which samples are poisoned, ``(samples,)``; ``None`` if the DataModule does not know."""
    ask = getattr(getattr(trainer, "datamodule", None), "poisoned_indices", None)
    return torch.isin(indices, ask("train", task=task)) if callable(ask) else None


def _halved(rows: Tensor) -> Tensor:
    half = rows.half()
    return half if bool(half.isfinite().all()) else rows


def _channels_first(inputs: Any) -> Tensor | None:
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return None
    if inputs.shape[1] in (1, 3):
        return inputs
    return inputs.movedim(3, 1) if inputs.shape[3] in (1, 3) else None
