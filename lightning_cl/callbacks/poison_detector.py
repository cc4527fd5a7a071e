"""Notice a poisoned task by how far it moved the network, and undo it."""

import copy
import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count, check_list, check_number
from lightning_cl.hashing import mix
from lightning_cl.metrics.poisoning import (
    AGGREGATES,
    STATISTICS,
    Aggregate,
    Statistic,
    clean_limit,
    shift_angle,
    shift_slope,
)
from lightning_cl.reporting.poisoning import describe_value, print_verdict, write_poison_report, write_shift_picture
from lightning_cl.tasks import Task
from lightning_cl.tasks.layer_shift import LayerStates, shifts_between
from lightning_cl.tasks.random_state import seed_generators
from lightning_cl.tasks.run_directory import run_directory
from lightning_cl.tasks.stream_callback import StreamCallback


class PoisonDetector(StreamCallback):
    """Undo a task that moved the network further than a clean one does (arXiv 2507.04106).

    At the end of each task the mean outputs of the layers over the task's training data (and over the positions of a
    convolution) are compared with those of the network as the task found it. The distances, added up from the first
    layer to the last, rise with an angle; a task is taken for poisoned if its angle is strictly above a threshold. The
    threshold comes from one early task that is known to be clean: it is trained several times, in other orders, and
    undone each time; then the run goes on as if it had been trained once. Undone is everything that a checkpoint holds:
    weights, buffers, optimizers, exemplars, heads, teachers.

    It logs ``poison/...`` at the end of each task, says on the console what it saw and did, and writes
    ``poison_report.json`` into the log directory, with ``poison_shift.png`` when it finds poison and when the fit ends.

    Args:
        layers: Shell patterns of the layers to compare, in the order of the module. ``None`` takes the norms where
            there are two at least, else all layers with weights. The first one only counts with ``relative``.
        statistic: What is compared with the threshold: the "angle" in degrees, or its tangent, the "slope". They differ
            where a threshold is interpolated between runs.
        space: Whether the layers' outputs move ("activation") or their weights ("parameter").
        threshold: What a clean task stays at or under; found by calibration if ``None``.
        calibrate_task: Index of the clean task of the calibration. Let it be like those that follow: of as many
            classes, and not the first.
        calibration_runs: Trainings of that task that the threshold comes from. Each is undone, the first one in the
            order that is kept, and the task is then trained once more: k runs cost k + 1 trainings. With 1 run, there
            is one training only.
        aggregate: How several runs become a threshold: their 90th or 75th percentile, their maximum, or that and the
            interquartile range.
        action: What happens to a poisoned task: it is undone and skipped ("rollback"), undone and the fit stopped
            ("stop"), or kept with a warning ("warn").
        calibration: "repeats" trains the task several times; "history" needs no training, and judges each task by all
            tasks from `calibrate_task` on that were found clean.
        margin: What the threshold found by calibration is multiplied by (its tangent, for angles).
        relative: Whether shifts are divided by that of the first layer, so that a task is judged by where the network
            moved rather than by how much.
        detect_from: Index of the first task that is judged; by default the one after `calibrate_task`, or task 1
            where a threshold is given.
        samples: Training samples that the outputs are averaged over, drawn once for each task; all if ``None``.

    Example::

        >>> PoisonDetector(layers=["backbone.*"], calibration_runs=3).aggregate
        'p90'
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        statistic: Statistic = "angle",
        space: Literal["activation", "parameter"] = "activation",
        threshold: float | None = None,
        calibrate_task: int = 1,
        calibration_runs: int = 5,
        aggregate: Aggregate = "p90",
        action: Literal["rollback", "warn", "stop"] = "rollback",
        calibration: Literal["repeats", "history"] = "repeats",
        margin: float = 1.0,
        relative: bool = False,
        detect_from: int | None = None,
        samples: int | None = 500,
    ) -> None:
        if layers is not None:
            check_list("layers", layers, str, "a list of layer names or patterns")
        check_choice("statistic", statistic, STATISTICS)
        check_choice("space", space, ("activation", "parameter"))
        check_choice("aggregate", aggregate, AGGREGATES)
        check_choice("action", action, ("rollback", "warn", "stop"))
        check_choice("calibration", calibration, ("repeats", "history"))
        if calibration_runs is None:
            raise TypeError("`calibration_runs` must be a whole number, got None.")
        check_count("calibration_runs", calibration_runs)
        check_count("samples", samples)
        if threshold is not None:
            check_number("threshold", threshold, 0, 90 if statistic == "angle" else math.inf)
        check_number("margin", margin, 0, above=True)
        _check_index("calibrate_task", calibrate_task)
        if detect_from is not None:
            _check_index("detect_from", detect_from)
            if threshold is None and detect_from <= calibrate_task:
                raise ValueError(
                    f"`calibrate_task={calibrate_task}` must come before the first task that is judged, got"
                    f" `detect_from={detect_from}`. Calibrate earlier, or give a `threshold`."
                )
        self.layers = None if layers is None else list(layers)
        self.statistic: Statistic = statistic
        self.space = space
        self.threshold = threshold
        self.calibrate_task = calibrate_task
        self.calibration_runs = calibration_runs
        self.aggregate: Aggregate = aggregate
        self.action = action
        self.calibration = calibration
        self.margin = margin
        self.relative = relative
        self.samples = samples
        usual = calibrate_task + 1 if threshold is None else 1
        self.detect_from = usual if detect_from is None else detect_from
        self.record: list[dict[str, Any]] = []
        self._runs: list[float] = []
        self._before: dict[str, Tensor] = {}
        self._outlives_undoing: dict[str, Any] | None = None
        self._log_dir: Path | None = None
        self._layers = LayerStates(layers, space, samples)

    @override
    def forget(self) -> None:
        super().forget()
        self._layers.forget()

    @property
    @override
    def wants_rollback(self) -> bool:
        return self.action != "warn" or self._trains_again

    @property
    def _trains_again(self) -> bool:
        return self.threshold is None and self.calibration == "repeats" and self.calibration_runs > 1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        tasks = self.need_stream(trainer, "compares tasks", several=True).tasks
        last = len(tasks) - 1
        named = [(f"`detect_from={self.detect_from}`", self.detect_from)]
        if self.threshold is None:
            own = f"`calibrate_task={self.calibrate_task}`"
            named = [(own, self.calibrate_task), (f"The task after {own}", self.calibrate_task + 1), *named]
        for name, index in named:
            if index > last:
                raise MisconfigurationException(
                    f"{name} of PoisonDetector is outside the stream, whose tasks are 0 to {last}. Calibrate earlier,"
                    " or give a `threshold`."
                )
        if self.space == "activation":
            self.check_indexed(tasks, "Compare weights with `space='parameter'`.")
        self.record, self._runs, self._before, self._outlives_undoing = [], [], {}, None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers.find(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_dir = run_directory(trainer)
        self._layers.check(trainer, pl_module, self.stream)
        task, progress = self.stream.current_task, self.clock.progress
        under_way = progress.started and not progress.committed and self._watches(task)
        if under_way and not (self._before and (self.clock.can_go_back or not self.wants_rollback)):
            raise MisconfigurationException(
                f"The checkpoint is from the middle of task {task.index} ({task.name}), which was begun without this"
                " PoisonDetector: there is nothing to compare it with, or to go back to. Resume from a checkpoint of a"
                f" task's end, or judge later tasks only (`detect_from`, `calibrate_task` from {task.index + 1} on)."
            )
        past = task.index > self.calibrate_task and self.calibrate_task not in progress.rejected
        if past and not progress.committed and self.calibration == "repeats" and self.current_threshold is None:
            raise MisconfigurationException(
                f"The checkpoint is from after task {self.calibrate_task}, on which PoisonDetector was to calibrate,"
                f" and holds no threshold. Give a `threshold`, or a later `calibrate_task` (from {task.index} on)."
            )

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.clock.progress.attempt > 0:  # other dropout masks and augmentations too, until they are put back
            seed = mix(self.stream.seed, task.index, self.clock.progress.attempt, trainer.global_rank)
            torch.manual_seed(seed)
            seed_generators(seed)
        self._before = self._layers.take(trainer, pl_module, self.stream, task) if self._watches(task) else {}

    @override
    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        if not self._watches(task):
            return True
        shifts = shifts_between(self._before, self._layers.take(trainer, pl_module, self.stream, task))
        self._before = {}
        value, degrees = self._statistic_of(shifts)
        entry = {"task": task.index, "name": task.name, "shifts": shifts, "angle": degrees, self.statistic: value}
        begins = self.calibration == "history" and self.current_threshold is None  # it joined late
        if self.threshold is None and (begins or task.index == self.calibrate_task):
            accepted = self._calibrate(trainer, task, entry)
        elif task.index < self.detect_from:
            accepted = True
            self.record.append({**entry, "verdict": "not judged"})
        else:
            accepted = self._judge(trainer, task, entry)
        self._log(pl_module, entry)
        if not accepted:
            self._outlives_undoing = self.state_dict()
        return accepted

    @override
    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self._outlives_undoing is None:
            return
        # what was learnt about the task is the one thing that is not undone with it
        self.record, self._runs = self._outlives_undoing["record"], self._outlives_undoing["runs"]
        self._outlives_undoing = None
        if self.action == "stop" and self.record[-1]["verdict"] == "poisoned":
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, draw=True)
        judged = [entry for entry in self.record if entry["verdict"] in ("clean", "poisoned")]
        if judged and all(entry["verdict"] == "clean" for entry in judged):
            limit = describe_value(self.current_threshold or 0.0, self.statistic)
            print_verdict(trainer, f"none of {len(judged)} tasks looks poisoned; the threshold is {limit}.")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "record": copy.deepcopy(self.record),
            "runs": list(self._runs),
            "before": {name: tensor.clone() for name, tensor in self._before.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.in_stream:
            for name, own in self._settings().items():
                saved = state_dict["settings"][name]
                if saved != own and not (name == "threshold" and saved is not None and own is not None):
                    raise MisconfigurationException(
                        f"The checkpoint is from a PoisonDetector with `{name}={saved!r}`, this one has"
                        f" `{name}={own!r}`: tasks would be judged by what cannot be compared. Resume with the same."
                    )
        elif self.record:  # a test judges nothing, and must not replace the record of a fit
            return
        self.record, self._runs = copy.deepcopy(state_dict["record"]), list(state_dict["runs"])
        self._before = {name: tensor.clone() for name, tensor in state_dict["before"].items()}

    @property
    def current_threshold(self) -> float | None:
        """The threshold in force; ``None`` before the calibration."""
        if self.threshold is not None:
            return self.threshold
        known = [entry[self.statistic] for entry in self.record if entry["verdict"] in ("calibration", "clean")]
        values = self._runs if self.calibration == "repeats" else known
        return clean_limit(values, self.statistic, self.aggregate, self.margin) if known else None

    def _settings(self) -> dict[str, Any]:
        names = ("layers", "statistic", "space", "calibrate_task", "calibration_runs", "aggregate", "calibration")
        return {name: getattr(self, name) for name in (*names, "margin", "relative", "samples", "threshold")}

    def _watches(self, task: Task) -> bool:
        return task.index >= (self.detect_from if self.threshold is not None else self.calibrate_task)

    def _statistic_of(self, shifts: dict[str, float]) -> tuple[float, float]:
        values = torch.tensor(list(shifts.values()), dtype=torch.float64)
        if not values.isfinite().all():  # an infinite slope would have an angle that looks like any other
            return math.nan, math.nan
        if self.relative:
            if values[0] == 0:
                raise MisconfigurationException(
                    f"`relative=True` of PoisonDetector divides by the shift of the first layer,"
                    f" {next(iter(shifts))!r}, which has not moved at all. Name layers that are trained, or"
                    " say `relative=False`."
                )
            values = values / values[0]
        degrees = float(shift_angle(values))
        return (degrees if self.statistic == "angle" else float(shift_slope(values))), degrees

    def _calibrate(self, trainer: Trainer, task: Task, entry: dict[str, Any]) -> bool:
        if task.index > self.calibrate_task:
            rank_zero_warn(f"PoisonDetector has no history yet, and takes task {task.index} ({task.name}) for clean.")
        wanted = self.calibration_runs if self._trains_again else 1
        if len(self._runs) < wanted:
            self._runs.append(entry[self.statistic])
            if wanted > 1:
                self.clock.repeat_task(len(self._runs) % wanted)  # the last time as if it were the first
                return False
        if not any(map(math.isfinite, self._runs)):
            raise MisconfigurationException(
                f"PoisonDetector cannot calibrate on task {task.index} ({task.name}): the network's outputs are not"
                " finite after it. Lower the learning rate, or give a `threshold`."
            )
        diverged = sum(not math.isfinite(value) for value in self._runs)
        if diverged:
            rank_zero_warn(
                f"{diverged} of {wanted} calibration runs of PoisonDetector ended with outputs that are not finite, and"
                " are left out."
            )
        self.record.append({**entry, "verdict": "calibration", "runs": list(self._runs)})
        threshold = describe_value(self.current_threshold or 0.0, self.statistic)
        runs = "1 run" if wanted == 1 else f"{wanted} runs"
        print_verdict(trainer, f"task {task.index} ({task.name}) calibrated in {runs}; the threshold is {threshold}.")
        return True

    def _judge(self, trainer: Trainer, task: Task, entry: dict[str, Any]) -> bool:
        value, threshold = entry[self.statistic], self.current_threshold
        if threshold is None:
            rank_zero_warn(
                f"PoisonDetector has no threshold for task {task.index} ({task.name}), since task"
                f" {self.calibrate_task}, on which it calibrates, was undone. The task is not judged."
            )
            self.record.append({**entry, "verdict": "not judged"})
            return True
        poisoned = not value <= threshold  # what is no number is no clean task
        done = {"rollback": "Undone and skipped.", "stop": "Undone, and the fit ends here.", "warn": "Kept."}
        kept = not poisoned or self.action == "warn"
        verdict = "poisoned" if poisoned else "clean"
        self.record.append({**entry, "threshold": threshold, "verdict": verdict, "kept": kept})
        if poisoned:
            found = (
                f"task {task.index} ({task.name}) looks poisoned: {describe_value(value, self.statistic)} against a"
                f" threshold of {describe_value(threshold, self.statistic)}. {done[self.action]}"
            )
            if self.action == "warn":
                rank_zero_warn(f"PoisonDetector: {found}")
            else:
                print_verdict(trainer, found)
        self._write(trainer, draw=poisoned)
        return kept

    def _log(self, pl_module: LightningModule, entry: dict[str, Any]) -> None:
        values = {"poison/angle": entry["angle"], "poison/slope": entry.get("slope")}
        values["poison/threshold"] = self.current_threshold
        values.update({f"poison/shift/{layer}": shift for layer, shift in entry["shifts"].items()})
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        pl_module.log_dict(known, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def _write(self, trainer: Trainer, draw: bool) -> None:
        if trainer.is_global_zero and self._log_dir is not None and self.record:
            settings = {**self._settings(), "detect_from": self.detect_from, "action": self.action}
            settings["threshold"] = self.current_threshold
            write_poison_report(self._log_dir, self.record, settings)
            if draw:  # which takes longer than to judge a small task
                write_shift_picture(self._log_dir, self.record, self.relative)


def _check_index(argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"`{argument}` must be the index of a task, counted from 0, got {value!r}.")
