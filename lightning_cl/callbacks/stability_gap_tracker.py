"""The accuracy on every task at every step, and the gaps in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count
from lightning_cl.metrics.curve import AccuracyCurve
from lightning_cl.reporting.stability import PREFIXES, stability_figures, write_stability
from lightning_cl.taps import own_outputs
from lightning_cl.tasks import Task, compat
from lightning_cl.tasks.checkpoints import check_followers
from lightning_cl.tasks.evaluation import evaluating, find_call
from lightning_cl.tasks.exit_callback import ExitCallback, exits_of
from lightning_cl.tasks.head import compared_head, heads_of
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.probes import Probes, choose
from lightning_cl.tasks.provisional_head import ProvisionalHead
from lightning_cl.tasks.run_directory import run_directory
from lightning_cl.tasks.stream_callback import StreamCallback
from lightning_cl.tasks.task import classes_apart


class StabilityGapTracker(StreamCallback):
    """Measure the accuracy on every task while the run learns the next (De Lange et al., ICLR 2023; arXiv 2411.04723).

    Between two tasks accuracy often falls deep and comes back, which figures at task ends do not show. This observer
    measures task-agnostic accuracy on a fixed set of validation samples of each task, drawn once and kept on the
    device, and changes no bit of the run. At the end of each task it logs ``stability/...``: De Lange's min-ACC,
    WC-ACC, WF^w and WP^w, and gap and recovery of the nearest-mean paper (SG, SG_norm, REC, REC_norm), its min-ACC
    within the task, and the task-recency bias. The accuracies themselves go to the loggers step by step as
    ``probe_acc/task_<i>``; the log directory gets ``stability_gap.csv``, ``stability_gap.json`` and
    ``stability_gap.png``.

    Where a `NearestMeanClassifier` is active its predictions are measured, with prototypes of a fixed sample of its
    own, so that they keep up with the network; those of the callback itself are left alone.

    Args:
        every_n_steps: Measure after so many optimizer steps, and at the end of each epoch.
        probe_size: Validation samples of each task.
        tasks: "seen" measures the tasks that were trained on, with the current one; "all" later ones too.
        window: Evaluations that WF^w and WP^w look back.
        dense_steps: Measure after every step for so long at the beginning of each task.
        nmc_refresh: Optimizer steps for which the prototypes of a nearest-mean head are used at the probes.
        compare_heads: Whether the classification layer is measured beside the head that stands in for it.
        exits: Whether each exit of `EarlyExits` is measured beside what the network answers.
        head: Name of the classification layer, where it cannot be found.

    Example::

        >>> StabilityGapTracker(every_n_steps=20, dense_steps=50).observer
        True
    """

    observer = True

    def __init__(
        self,
        every_n_steps: int = 1,
        probe_size: int = 256,
        tasks: Literal["seen", "all"] = "seen",
        window: int = 10,
        dense_steps: int | None = None,
        nmc_refresh: int = 1,
        compare_heads: bool = False,
        exits: bool = False,
        head: str | None = None,
    ) -> None:
        for name, count in (
            ("every_n_steps", every_n_steps),
            ("probe_size", probe_size),
            ("window", window),
            ("dense_steps", dense_steps),
            ("nmc_refresh", nmc_refresh),
        ):
            if count is None and name != "dense_steps":
                raise TypeError(f"`{name}` must be a whole number, got None.")
            check_count(name, count)
        check_choice("tasks", tasks, ("seen", "all"))
        if window < 2:
            raise ValueError(f"`window` must be at least 2 evaluations, for a change to be seen, got {window}.")
        self.every_n_steps = every_n_steps
        self.probe_size = probe_size
        self.tasks = tasks
        self.window = window
        self.dense_steps = dense_steps
        self.nmc_refresh = nmc_refresh
        self.compare_heads = compare_heads
        self.exits = exits
        self.head = head
        self.curve = AccuracyCurve(0)
        self._names: list[str] = []
        self._heads: list[str] = []
        self._prefixes: list[str] = []
        self._followed: set[str] = set()
        self._log_dir: Path | None = None
        self._provisional: ProvisionalHead | None = None
        self.forget()

    @override
    def forget(self) -> None:
        super().forget()
        self._call: ModuleCall | None = None
        self._exits: ExitCallback | None = None
        self._probes = Probes()
        self._classes: list[Tensor] = []  # of each task; none where tasks share classes
        if self._provisional is not None:
            self._provisional.forget_samples()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        tasks = self.need_stream(trainer, "follows the tasks of a stream").tasks
        heads = heads_of(trainer)
        if self.compare_heads:
            compared_head(trainer)
        self._exits = self._exits_to_measure(trainer)
        self._provisional = ProvisionalHead(heads[0], self.probe_size, self.nmc_refresh) if heads else None
        self.curve = AccuracyCurve(len(tasks), 1 + self.compare_heads)
        self._names = [task.name for task in tasks]
        self._heads = [type(head).__name__ for head in heads]
        if self.compare_heads or not heads:
            self._heads.append("network" if self.exits else "classification layer")
        self._prefixes = list(PREFIXES[: len(self._heads)])
        self._classes = [torch.tensor(own) for own in classes_apart(tasks)]
        monitors = (str(getattr(callback, "monitor", None)) for callback in compat.callbacks_of(trainer))
        self._followed = {monitor for monitor in monitors if monitor.startswith("stability/")}
        check_followers(trainer, self.clock, self._followed)

    def _exits_to_measure(self, trainer: Trainer) -> ExitCallback | None:
        if not self.exits:
            return None
        if self.compare_heads:
            raise MisconfigurationException(
                "`exits=True` of StabilityGapTracker measures the classification layer too, so `compare_heads=True`"
                " does not go with it. Leave one out."
            )
        found = exits_of(trainer)
        if found is None:
            raise MisconfigurationException(
                "`exits=True` of StabilityGapTracker measures the exits of a network, and there are none. Add"
                " `EarlyExits(...)` to the callbacks, or leave `exits` out."
            )
        return found

    def _make_room_for_exits(self) -> None:
        """Have a row for each exit, which are known when the module has its layers."""
        if self._exits is None or len(self._prefixes) > 1:
            return
        numbers = range(1, self._exits.hooks.count)
        self._prefixes += [*(f"exit_{number}_" for number in numbers), "end_"]
        self._heads += [*(f"exit {number}" for number in numbers), "end"]
        self.curve = AccuracyCurve(len(self.stream.tasks), len(self._prefixes))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._make_room_for_exits()
        self._log_dir = run_directory(trainer)
        for task in self.stream.tasks:
            self._check_probes(trainer, task)
        self._call, _ = find_call(trainer, pl_module, self.stream, head=self.head)

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        step, epoch_end = trainer.global_step, trainer.is_last_batch
        since = step - self.clock.progress.first_step
        if since <= 0:
            return
        if self.curve.length and int(self.curve.steps[-1]) == step:
            if epoch_end:
                self.curve.mark_epoch_end()
            return
        dense = self.dense_steps is not None and since <= self.dense_steps
        if epoch_end or dense or step % self.every_n_steps == 0:
            self._measure(trainer, pl_module, epoch_end)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if trainer.global_step > self.clock.progress.first_step:
            if self.curve.length and int(self.curve.steps[-1]) == trainer.global_step:
                self.curve.mark_epoch_end()
            else:  # the last epoch was cut short
                self._measure(trainer, pl_module, epoch_end=True)
        figures = {f"stability/{name}": value for name, value in self.figures.items()}
        # after the first task there is no gap yet, but who follows it must find it
        known = {name: value for name, value in figures.items() if value == value or name in self._followed}
        pl_module.log_dict(known, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._log_dir is not None and self.curve.length:
            write_stability(self._log_dir, self.curve, self._names, self._heads, self.window, self._prefixes)

    @override
    def state_dict(self) -> dict[str, Any]:
        provisional = None if self._provisional is None else self._provisional.state_dict()
        return {"curve": self.curve.state_dict(), "provisional": provisional}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.in_stream:  # a test has nothing to follow, and must not replace the curve of a fit
            return
        self._make_room_for_exits()
        saved, own = state_dict["curve"]["accuracies"].shape[1], len(self._prefixes)
        if saved != own:
            raise MisconfigurationException(
                f"The checkpoint is from a run with {_option(saved)}, this StabilityGapTracker has {_option(own)}."
                " Resume with the same."
            )
        self.curve.load_state_dict(state_dict["curve"])
        self._probes = Probes()  # a task that was undone may be skipped
        if self._provisional is not None and state_dict["provisional"] is not None:
            self._provisional.load_state_dict(state_dict["provisional"])

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the run so far, by name.

        With `compare_heads` those of the classification layer begin with ``linear_``; with `exits` those of the exits
        with ``exit_1_`` and so on, and of the end with ``end_``.
        """
        return stability_figures(self.curve, self.window, self._prefixes)

    def _check_probes(self, trainer: Trainer, task: Task) -> None:
        samples = self.stream.samples_of(task.index, "val")
        if samples is None:
            raise MisconfigurationException(
                f"StabilityGapTracker draws its probes by index, and the validation data of task {task.index}"
                f" ({task.name}) can only be iterated."
            )
        if samples == 0:
            raise MisconfigurationException(
                f"StabilityGapTracker draws its probes from validation data, and task {task.index} ({task.name}) has"
                " none. Say `val_fraction=0.1` on the task sequence to hold some training data out."
            )
        if samples < self.probe_size and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"`probe_size={self.probe_size}` of StabilityGapTracker is more than the {samples} validation samples"
                f" of task {task.index} ({task.name}). Give it at most {samples}."
            )

    def _measure(self, trainer: Trainer, pl_module: LightningModule, epoch_end: bool) -> None:
        stream, current = self.stream, self.clock.task.index
        for task in range(len(stream.tasks) if self.tasks == "all" else current + 1):
            if task not in self._probes and task not in self.clock.progress.rejected:
                chosen = choose(self.probe_size, stream.samples_of(task, "val") or 0, stream.seed, task)
                self._probes.fetch(trainer, pl_module, stream, task, chosen, "val")
        if self._provisional is not None:
            self._provisional.fetch(trainer, pl_module, stream)
        with evaluating(trainer, pl_module):
            with self._keeping_up(trainer, pl_module):
                accuracies, recency = self._measured(trainer, pl_module, current)
            if self.compare_heads:
                with own_outputs():
                    own = self._measured(trainer, pl_module, current)
                accuracies, recency = torch.cat([accuracies, own[0]]), torch.cat([recency, own[1]])
        self.curve.append(trainer.global_step, current, epoch_end, accuracies, recency)
        self._log(trainer, accuracies)

    @contextmanager
    def _keeping_up(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Let the provisional head answer, where one is replaced."""
        if self._provisional is None:
            yield
            return
        self._provisional.renew(trainer, pl_module)
        with self._provisional.callback.answering_with(self._provisional.head):
            yield

    def _measured(self, trainer: Trainer, pl_module: LightningModule, current: int) -> tuple[Tensor, Tensor]:
        """Return the accuracy of each head on each task, and its task-recency bias."""
        shape = len(self._prefixes) - self.compare_heads, len(self.stream.tasks), 2, 2
        # by head, task, right, taken for the newest
        counts = torch.zeros(shape, dtype=torch.int64, device=pl_module.device)
        newest = (
            self._classes[current].to(pl_module.device) if self._classes else torch.zeros(0, device=pl_module.device)
        )
        heads = torch.arange(shape[0], device=pl_module.device)
        for predicted, labels, tasks in self._probes.call(self._predictions):
            right, taken = predicted == labels[:, None], torch.isin(predicted, newest)
            cells = heads * counts[0].numel() + tasks[:, None] * 4 + right * 2 + taken
            counts += cells.flatten().bincount(minlength=counts.numel()).view(shape)
        counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu().float()
        samples = counts.sum((2, 3))
        shares = counts[..., 1].sum(2) / samples
        recency = shares[:, :current].nanmean(1) if len(newest) else torch.full(shape[:1], torch.nan)
        return counts[:, :, 1].sum(2) / samples, recency

    def _predictions(self, batch: Any) -> Tensor:
        """Return the classes that the network and, where they are measured, its exits predict, ``(batch, heads)``."""
        if self._call is None:
            raise RuntimeError("StabilityGapTracker was asked for accuracies before training began.")
        if self._exits is None:
            return self._call(batch).argmax(dim=1, keepdim=True)
        hooks = self._exits.hooks
        with hooks.collecting():
            answers = [self._call(batch), *hooks.logits]
        return torch.stack([answer.argmax(dim=1) for answer in answers], dim=1)

    def _log(self, trainer: Trainer, accuracies: Tensor) -> None:
        figures = {}
        for prefix, row in zip(self._prefixes, accuracies.tolist(), strict=True):
            measured = {f"{prefix}probe_acc/task_{task}": value for task, value in enumerate(row) if value == value}
            figures.update(measured)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=compat.logged_step(trainer))


def _option(heads: int) -> str:
    """Say which option measures so many heads."""
    if heads > 2:
        return f"`exits=True` and {heads - 2} exits"
    return f"`compare_heads={heads == 2}`"
