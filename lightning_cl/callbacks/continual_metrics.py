"""The accuracy matrix of a stream, its averages, tables, plots and result files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.metrics import AccuracyMatrix
from lightning_cl.metrics.functional import forward_transfer
from lightning_cl.reporting import print_comparison, print_summary, stream_averages, write_plots, write_results
from lightning_cl.taps import own_outputs
from lightning_cl.tasks import ContinualCallback, Task, TaskClock, compat
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.checkpoints import check_followers
from lightning_cl.tasks.evaluation import device_batches, evaluating
from lightning_cl.tasks.head import compared_head
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.run_directory import run_directory
from lightning_cl.tasks.stream import SingleTask, Split

# a monitored metric is no accuracy
_SHORT_NAMES = {"average_accuracy": "average", "average_incremental_accuracy": "average_incremental"}


class ContinualMetrics(ContinualCallback):
    """Measure every task after each task: accuracy matrix, average accuracy, forgetting and transfer.

    After each committed task it evaluates the tasks' validation sets with whatever head is then active, logs
    ``acc/task_<i>`` and the averages, and at the end prints the accuracy matrix and writes ``results.json``,
    ``accuracy_matrix.csv`` and plots into the logger's directory. Task-agnostic accuracy (all classes compete) and
    task-aware accuracy (the classes of the sample's own task compete) come from the same pass. How to call the module
    is found out on the first batch; the run itself is not changed by a bit.

    Several may measure one run. With ``split="test"`` the names in the log begin with ``test_acc/`` and the files go
    into the folder ``test``, with `monitor` both have the name of the metric: ``val_mae/task_0``, ``val_mae/average``,
    ``val_mae/results.json``.

    The figures exist from the end of a task's last epoch on, so a ``ModelCheckpoint`` that monitors one needs
    ``every_n_epochs`` of that length, and early stopping cannot follow them.

    ``Trainer(limit_val_batches=...)`` (for the test sets ``limit_test_batches``) limits the batches of each task. A
    limit of 0 switches Lightning's validation off, and here measures everything.

    Args:
        split: Which sets are measured.
        tasks: "seen" measures the tasks that were trained on; "all" measures later ones and the untrained model too,
            as forward transfer needs it.
        monitor: Fill the matrix from this metric of the module's own validation instead of the accuracy, for
            regression, segmentation and the rest. With several tasks it needs ``eval_loaders="per_task"`` on the
            sequence; tasks without validation data stay blank.
        mode: Whether a good value of `monitor` is high ("max") or low ("min").
        head: Name of the classification layer, where it cannot be found.
        print_table: Whether the matrix is printed when the fit ends.
        compare_heads: Whether the classification layer is measured beside a head that stands in for it, such as that
            of `NearestMeanClassifier`. Its figures are ``linear_acc/...`` in the log.

    Example::

        >>> ContinualMetrics(tasks="all").observer
        True
    """

    observer = True

    def __init__(
        self,
        split: Split = "val",
        tasks: Literal["seen", "all"] = "seen",
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        head: str | None = None,
        print_table: bool = True,
        compare_heads: bool = False,
    ) -> None:
        check_choice("split", split, ("val", "test"))
        check_choice("tasks", tasks, ("seen", "all"))
        check_choice("mode", mode, ("max", "min"))
        if monitor is not None and split != "val":
            raise ValueError(
                f"`split` must be 'val' with `monitor={monitor!r}`, a metric of validation, got {split!r}."
            )
        if compare_heads and monitor is not None:
            raise ValueError(f"`compare_heads=True` compares accuracies, not `monitor={monitor!r}`. Leave one out.")
        self.split = split
        self.tasks = tasks
        self.monitor = monitor
        self.mode = mode
        self.head = head
        self.print_table = print_table
        self.compare_heads = compare_heads
        self.matrix = torch.empty(0, 0)
        self.task_aware_matrix = torch.empty(0, 0)
        self.linear_matrix = torch.empty(0, 0)
        self.baseline = torch.empty(0)
        self._monitored: dict[str, Any] = {}
        self._names: list[str] = []
        self._log_dir: Path | None = None
        self._call: ModuleCall | None = None

    @property
    @override
    def state_key(self) -> str:
        """Two of them in one run differ in what they measure."""
        return self._generate_state_key(split=self.split, monitor=self.monitor)

    @property
    def averages(self) -> dict[str, float]:
        """What sums the stream up so far: average accuracy, average incremental accuracy, forgetting, transfer."""
        aware = None if self.monitor is not None or self.task_aware_matrix.isnan().all() else self.task_aware_matrix
        figures = stream_averages(self.matrix, aware, self.mode)
        if self.monitor is not None:
            figures = {_SHORT_NAMES.get(name, name): value for name, value in figures.items()}
        if not self.baseline.isnan().all():
            figures["forward_transfer"] = float(forward_transfer(self.matrix, self.baseline, self.mode))
        return figures

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        clock = _clock(trainer)
        count = len(clock.stream.tasks)
        self._names = [task.name for task in clock.stream.tasks]
        self.matrix = torch.full((count, count), torch.nan)
        self.task_aware_matrix = torch.full((count, count), torch.nan)
        self.linear_matrix = torch.full((count, count), torch.nan)
        self.baseline = torch.full((count,), torch.nan)
        self._monitored = {}
        self._call = None
        if self.monitor is not None and count > 1 and not clock.stream.evaluates_tasks_apart:
            raise MisconfigurationException(
                f"`monitor={self.monitor!r}` needs a validation of each task by itself: say `eval_loaders='per_task'`"
                " on the task sequence, and give `validation_step` an argument `dataloader_idx=0`."
            )
        self._check_others(trainer, clock)
        if self.compare_heads:
            compared_head(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a broadcast, so on every rank, and while the processes still talk to each other
        self._log_dir = run_directory(trainer)
        stream = _clock(trainer).stream
        if self.monitor is None:
            for task in stream.tasks:
                self._loader(trainer, task.index)
            self._find_call(trainer, pl_module)
        elif not isinstance(stream, SingleTask) and all(
            stream.evaluation_loader(task.index, "val") is None for task in stream.tasks
        ):
            raise MisconfigurationException(
                f"`monitor={self.monitor!r}` is read from validation, and no task has validation data. Say"
                " `val_fraction=0.1` on the task sequence to hold some training data out."
            )

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.tasks == "all" and task.index == 0 and self.monitor is None:
            self._measure(trainer, pl_module, trained=-1)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clock = TaskClock.of(trainer)
        if self.monitor is None or trainer.sanity_checking or clock is None:
            return
        served = clock.stream.served_tasks("val")
        suffixes = [""] if len(served) == 1 else [f"/dataloader_idx_{index}" for index in range(len(served))]
        keys = [self.monitor + suffix for suffix in suffixes]
        missing = [key for key in keys if key not in trainer.callback_metrics]
        if missing:
            raise MisconfigurationException(
                f"`monitor={self.monitor!r}`: the module logged no {missing[0]!r} in validation. It logged"
                f" {', '.join(map(repr, trainer.callback_metrics)) or 'nothing'}."
            )
        values = {task: float(trainer.callback_metrics[key]) for task, key in zip(served, keys, strict=True)}
        self._monitored = {"begun": clock.progress.begun, "epoch": clock.progress.epochs, "values": values}

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._measure(trainer, pl_module, trained=task.index)
        self._log(pl_module, task.index)

    @override
    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if not _clock(trainer).repeats and self.monitor is None:
            self._measure(trainer, pl_module, trained=task.index)
            self._log(pl_module, task.index)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or self.matrix.isnan().all():
            return
        averages, paths = self.averages, []
        if self._log_dir is not None:
            results = {
                "task_names": self._names,
                "metric": self.monitor or "accuracy",
                "split": self.split,
                "averages": averages,
                "accuracy_matrix": self.matrix,
                "task_aware_accuracy_matrix": self.task_aware_matrix,
            }
            if self.compare_heads:
                results["linear_averages"] = stream_averages(self.linear_matrix)
                results["linear_accuracy_matrix"] = self.linear_matrix
            folder = self._log_dir / self._folder
            label = self.monitor or ("test accuracy" if self.split == "test" else "accuracy")
            paths = [*write_results(folder, results), *write_plots(folder, self.matrix, self._names, label)]
        if self.print_table:
            title = self.monitor or ("Test accuracy" if self.split == "test" else "Accuracy")
            print_summary(self.matrix, averages, self._names, f"{title} after each task", paths)
            if self.compare_heads:
                names = type(compared_head(trainer)).__name__, "classification layer"
                print_comparison(dict(zip(names, (self.matrix, self.linear_matrix), strict=True)), self._names)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "matrix": self.matrix.clone(),
            "task_aware_matrix": self.task_aware_matrix.clone(),
            "baseline": self.baseline.clone(),
            "linear_matrix": self.linear_matrix.clone(),
            "monitored": dict(self._monitored),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("matrix", "task_aware_matrix", "linear_matrix", "baseline"):
            current, saved = getattr(self, name), state_dict[name]
            if current.numel() == 0:
                setattr(self, name, saved.clone())
            else:  # a stream that is continued has more tasks than the one that was saved
                current[tuple(slice(size) for size in saved.shape)] = saved
        self._monitored = state_dict["monitored"]

    @property
    def _prefix(self) -> str:
        return self.monitor or ("test_acc" if self.split == "test" else "acc")

    @property
    def _folder(self) -> str:
        """Where the files go, below the log directory."""
        return (self.monitor or "").strip("/") or ("test" if self.split == "test" else "")

    def _check_others(self, trainer: Trainer, clock: TaskClock) -> None:
        """Refuse a callback that would write what this one writes, or look for a figure before it exists."""
        for callback in compat.callbacks_of(trainer):
            if not isinstance(callback, ContinualMetrics) or callback is self:
                continue
            if callback._prefix == self._prefix or callback._folder == self._folder:
                raise MisconfigurationException(
                    f"Two ContinualMetrics would both log {self._prefix + '/...'!r} and write the same files. Give"
                    " them another `split` or `monitor`, or take one out."
                )
        figures = {*stream_averages(self.matrix, self.matrix), *self.averages, "forward_transfer"}
        names = {f"{self._prefix}/{name}" for name in (*figures, *(f"task_{task}" for task in range(len(self._names))))}
        check_followers(trainer, clock, names)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, trained: int) -> None:
        clock = _clock(trainer)
        measured = range(len(clock.stream.tasks)) if self.tasks == "all" else range(trained + 1)
        if self.monitor is not None:
            self._take_monitored(clock, trained)
            return
        classes = [list(task.classes or ()) for task in clock.stream.tasks]
        metric = AccuracyMatrix(len(classes)).to(pl_module.device)
        aware = AccuracyMatrix(len(classes), classes if all(classes) else None).to(pl_module.device)
        linear = AccuracyMatrix(len(classes)).to(pl_module.device) if self.compare_heads else None
        with evaluating(trainer, pl_module):
            for task in measured:
                for batch in device_batches(trainer, pl_module, self._loader(trainer, task), self._limit(trainer)):
                    call = self._find_call(trainer, pl_module)
                    # a module may work in place, and the other head is to see the same batch
                    logits = call(apply_to_collection(batch, Tensor, Tensor.clone) if self.compare_heads else batch)
                    labels = as_labels(clock.stream.structure.find_targets(batch))
                    metric.update(logits, labels, trained, task)
                    if linear is not None:
                        with own_outputs():
                            linear.update(call(batch), labels, trained, task)
                    aware.update(logits, labels, trained, task)
        if trained == -1:
            self.baseline = metric.baseline().cpu()
        else:
            self.matrix[trained] = self._row(metric, trained)
            if all(classes):
                self.task_aware_matrix[trained] = self._row(aware, trained)
            if linear is not None:
                self.linear_matrix[trained] = self._row(linear, trained)

    def _row(self, metric: AccuracyMatrix, trained: int) -> Tensor:
        # torchmetrics squeezes the matrix of a single task to a scalar
        return metric.compute().view_as(self.matrix)[trained].cpu()

    def _take_monitored(self, clock: TaskClock, trained: int) -> None:
        if not clock.stream.served_tasks("val"):
            return
        now = {"begun": clock.progress.begun, "epoch": clock.progress.epochs - 1}
        if {key: self._monitored.get(key) for key in now} != now:
            raise MisconfigurationException(
                f"`monitor={self.monitor!r}` is read from the validation of a task's last epoch, but none ran in that"
                f" of task {trained}. Let `check_val_every_n_epoch` divide the epochs of each task."
            )
        for task, value in self._monitored["values"].items():
            self.matrix[trained, task] = value

    def _find_call(self, trainer: Trainer, pl_module: LightningModule) -> ModuleCall:
        if self._call is None:
            stream = _clock(trainer).stream
            labels = [label for task in stream.tasks for label in task.classes or ()]
            with evaluating(trainer, pl_module):
                batch = next(device_batches(trainer, pl_module, self._loader(trainer, 0)))
                outputs = max(labels) + 1 if labels else None
                self._call = ModuleCall.find(pl_module, batch, stream.structure, outputs, self.head)
        return self._call

    def _loader(self, trainer: Trainer, task: int) -> Iterable[Any]:
        stream = _clock(trainer).stream
        loader = stream.evaluation_loader(task, self.split)
        if loader is not None:
            return loader
        if isinstance(stream, SingleTask):
            raise MisconfigurationException(_why_no_loader(trainer, self.split))
        advice = "Give the base a `test_dataloader`, or say `split='val'` on ContinualMetrics."
        if self.split == "val":
            advice = (
                "Say `val_fraction=0.1` on the task sequence to hold some training data out, or `split='test'` on"
                " ContinualMetrics."
            )
        raise MisconfigurationException(f"ContinualMetrics has no {self.split} data for task {task}. {advice}")

    def _limit(self, trainer: Trainer) -> int | float | None:
        return (trainer.limit_test_batches if self.split == "test" else trainer.limit_val_batches) or None

    def _log(self, pl_module: LightningModule, trained: int) -> None:
        row = {f"{self._prefix}/task_{task}": value for task, value in enumerate(self.matrix[trained].tolist())}
        row.update({f"{self._prefix}/{name}": value for name, value in self.averages.items()})
        if self.compare_heads:
            linear = {f"task_{task}": value for task, value in enumerate(self.linear_matrix[trained].tolist())}
            linear.update(stream_averages(self.linear_matrix))
            row.update({f"linear_{self._prefix}/{name}": value for name, value in linear.items()})
        values = {name: value for name, value in row.items() if value == value}
        pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)


def _clock(trainer: Trainer) -> TaskClock:
    clock = TaskClock.of(trainer)
    if clock is None:
        raise RuntimeError("There is no task clock outside a fit.")
    return clock


def _why_no_loader(trainer: Trainer, split: Split) -> str:
    if split == "test":
        return "`split='test'` needs a task sequence: an ordinary fit loads no test data. Say `split='val'`."
    if trainer.val_dataloaders:
        return (
            f"ContinualMetrics measures one validation loader, and this fit has {len(trainer.val_dataloaders)}. Give it"
            " one, or name a metric of your module with `monitor=...`."
        )
    return (
        "ContinualMetrics has nothing to measure: this fit has no validation loader. Give it a `val_dataloader`, and no"
        " `limit_val_batches=0`."
    )
