"""Exits inside the network: heads that are trained with it, and samples that leave early."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.exits import ExitHooks, ExitNetwork
from lightning_cl.heads.exit_ensemble import Ensemble
from lightning_cl.heads.exit_heads import ExitHeadKind
from lightning_cl.heads.exit_rules import Confidence
from lightning_cl.metrics.early_exit import ExitScores
from lightning_cl.reporting.exits import exit_figures, print_exits, write_exits
from lightning_cl.tasks import Task
from lightning_cl.tasks.evaluation import find_call
from lightning_cl.tasks.exit_callback import AddedLosses, ExitCallback
from lightning_cl.tasks.exit_evaluation import (
    ExitRecord,
    classes_seen,
    fit_correction,
    points_to_lose,
    score_exits,
)
from lightning_cl.tasks.exit_fit import ExitFit
from lightning_cl.tasks.exit_losses import Distill, ExitLosses, LossWeights
from lightning_cl.tasks.exit_phases import PhasePlan, Regime
from lightning_cl.tasks.exit_prototypes import ExitPrototypes
from lightning_cl.tasks.exit_search import check_fit, check_validation_data, exits_wanted, find_exits
from lightning_cl.tasks.exit_training import ExitTraining
from lightning_cl.tasks.run_directory import run_directory
from lightning_cl.tasks.stream_means import refuse_infinite_losses, validates_before_means


class EarlyExits(ExitCallback):
    """Train exit heads inside a network, and let samples leave where a head is sure (arXiv 2407.14320).

    The heads are built from a dry run and are part of the module during a Trainer call: its optimizer, DDP and
    checkpoints have them, under ``early_exits``. In eval mode, with a `threshold`, a sample that a head is sure of
    leaves the batch at its layer, so that the layers after it compute the others alone; what the classification layer
    puts out is the whole batch in its order.

    Args:
        layers: Names of the layers with exits, or patterns as in ``layer?``; "auto:3" finds three that divide the
            network into parts of about the same cost.
        regime: "joint" trains network and heads together; "mixed" the network alone in the first half of each task;
            "disjoint" the network alone, and then the heads alone on a network that stands still. Early stopping ends
            a phase, and the task with the last one.
        head: "pool", "conv" or "linear", or a module of your own that is copied for each exit with the weights that
            it has; its lazy layers find their sizes and draw theirs.
        loss_weights: Of the exits' losses: all alike, growing with depth and epochs ("sdn"), or one number for each
            exit and one for the network's own.
        phase_epochs: Epochs of the regime's phases in each task; halves of the task if ``None``. Of a first phase that
            is stopped early, the epochs that are left go to the second.
        threshold: How sure a head must be, from 0 to 1, for a sample to leave. ``None`` lets all go to the end.
            "auto:0.5pp" takes, at the end of each task, the cheapest whose accuracy on the validation data of the tasks
            seen is at most 0.5 points below that of the whole network.
        confidence: What sure is: the largest probability, a low entropy, or predictions that repeat ("patience").
        ensemble: "cascade" shows each head what the one before said; "geometric" also lets exits answer with a weighted
            mean of all predictions so far (Zero-Time-Waste, NeurIPS 2021).
        distill: Whom each exit imitates beside the labels: the "last" head, the "next", or all "later" ones.
        losses: Which heads the terms of other callbacks are for, such as those of `DarkExperienceReplay`: the network's
            own, or "all_exits".
        exit_classifier: "nearest_mean" answers in eval mode, at each exit and at the end, with the class whose mean
            feature is nearest: of past classes from the replay memory, of the others from the task's data.
        correction: "tlc" adds a constant to the logits of each old task, the same at all exits, in eval mode: fitted to
            training samples of the newest task at its end, so that old tasks are not passed over (arXiv 2403.07404).
        classifier: Name of the classification layer; found by its number of outputs if ``None``.
        print_table: Whether cost, accuracy and use of the exits are printed when the fit ends.

    At the end of each task every exit is measured on the validation data of the tasks seen. ``exits/accuracy`` and
    ``exits/cost`` are logged, and ``exits.json`` and ``exits.png``, accuracy over cost, are written at the end.

    Example::

        >>> EarlyExits(["layer1", "layer2"], regime="joint", threshold=0.9).threshold
        0.9
    """

    def __init__(
        self,
        layers: list[str] | str,
        regime: Regime = "mixed",
        head: ExitHeadKind | nn.Module = "pool",
        loss_weights: LossWeights = "uniform",
        phase_epochs: list[int] | None = None,
        threshold: float | str | None = None,
        confidence: Confidence = "max_softmax",
        ensemble: Ensemble = "none",
        distill: Distill | None = None,
        losses: AddedLosses = "last_head",
        exit_classifier: Literal["head", "nearest_mean"] = "head",
        correction: Literal["none", "tlc"] = "none",
        classifier: str | None = None,
        print_table: bool = True,
    ) -> None:
        super().__init__(head, confidence, losses)
        self._wanted = exits_wanted(layers)
        check_choice("regime", regime, ("disjoint", "joint", "mixed"))
        self._points_to_lose = points_to_lose(threshold)
        check_choice("ensemble", ensemble, ("none", "cascade", "geometric"))
        check_choice("exit_classifier", exit_classifier, ("head", "nearest_mean"))
        check_choice("correction", correction, ("none", "tlc"))
        if ensemble == "geometric" and threshold is None:
            raise ValueError(
                "`ensemble='geometric'` answers where samples may leave, and without a `threshold` they go to the end"
                " and the classification layer answers. Say how sure an exit must be; `threshold=1.0` keeps all to the"
                " end."
            )
        if exit_classifier == "nearest_mean" and ensemble != "none":
            raise ValueError(
                f"`ensemble={ensemble!r}` joins what the heads say, and with `exit_classifier='nearest_mean'` they do"
                " not answer. Leave one out."
            )
        self.layers = layers
        self.loss_weights = loss_weights
        self.plan = PhasePlan(regime, phase_epochs)
        self.threshold = threshold
        self.ensemble: Ensemble = ensemble
        self.exit_classifier = exit_classifier
        self.correction = correction
        self.classifier = classifier
        self.print_table = print_table
        self.record = ExitRecord()
        self._losses = ExitLosses(loss_weights, distill)
        self._answers = False  # once heads have been trained
        self._log_dir: Path | None = None
        self._fit: ExitFit | None = None
        self._past: Any = None  # what prototypes are means of, from a checkpoint

    @override
    def begin_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nearest = self.exit_classifier == "nearest_mean"
        answers = self.threshold is not None or self.correction == "tlc" or nearest
        clock, stream = check_fit(trainer, pl_module, self.plan, answers, self.correction == "tlc")
        if nearest and validates_before_means(trainer, stream):
            refuse_infinite_losses(trainer)
        self._fit = ExitFit(clock, stream)
        self._answers, self.record, self._past = False, ExitRecord(), None

    @override
    def build(self, trainer: Trainer, pl_module: LightningModule) -> ExitNetwork:
        nearest = self.exit_classifier == "nearest_mean"
        network = find_exits(
            trainer, pl_module, self.fit.stream, self._wanted, self.head, self.classifier, self.ensemble, nearest
        )
        if self.confidence == "patience" and len(network.heads.heads) < 2:
            raise MisconfigurationException(
                "`confidence='patience'` waits for predictions that repeat and needs at least 2 exits, got 1."
            )
        self.fit.training = ExitTraining(self.plan, self._losses, network)
        return network

    @override
    def set_hooks(self, hooks: ExitHooks) -> None:
        hooks.threshold, hooks.correction = self.threshold_in_use, self.record.corrects

    @property
    @override
    def lets_samples_leave(self) -> bool:
        return self.threshold is not None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fit.training.join(trainer.optimizers[0])  # before a checkpoint's optimizer state comes

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit = self.fit
        self._log_dir = run_directory(trainer)
        if self._points_to_lose is not None:
            check_validation_data(fit.stream, self.threshold)
        call, _ = find_call(trainer, pl_module, fit.stream, head=self.found.spec["classifier"])
        fit.call = call
        if self.exit_classifier == "nearest_mean":
            fit.prototypes = ExitPrototypes(self.found, fit.stream, call)
            fit.prototypes.load_state_dict(self._past)
        self.record.make_room(len(fit.stream.tasks), len(self.found.costs))
        self._enter_epoch(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fit.training.join(trainer.optimizers[0])  # each task may have a new one
        self._enter_epoch(pl_module)

    def _enter_epoch(self, pl_module: LightningModule) -> None:
        clock, training = self.fit.clock, self.fit.training
        training.enter(pl_module, self.hooks, clock.progress.epochs, clock.planned_epochs)
        if training.phase != "network":
            self._answers = True
            self.set_hooks(self.hooks)

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        return self.fit.training.step(trainer, pl_module, self.hooks, self.fit.stream.structure, batch, step)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.fit.training.drop_gradients(optimizer)

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        if self.fit.prototypes is not None:
            self.fit.prototypes.forget_current()
            if trainer.is_last_batch:
                self.fit.prototypes.refresh(trainer, pl_module)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.fit.prototypes is not None:
            self.fit.prototypes.forget_current()

    @override
    def next_phase(self, trainer: Trainer, pl_module: LightningModule, task: Task, stopped: bool) -> bool:
        return self.plan.begins_phase(self.fit.clock.progress.epochs, self.fit.clock.planned_epochs, stopped)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        stream, call, rejected = self.fit.stream, self.fit.call, self.fit.clock.progress.rejected
        if call is None:
            return
        if self.fit.prototypes is not None:
            self.fit.prototypes.commit(trainer, pl_module)
        if self.correction == "tlc":
            fitted = fit_correction(trainer, pl_module, stream, self.hooks, call, rejected)
            self.record.correction = fitted, classes_seen(stream, task.index, rejected)
            self.set_hooks(self.hooks)
        self.record.take(task.index, self.score_seen(trainer, pl_module), self.threshold)
        if not self.record.summaries:
            return
        if self._points_to_lose is not None:
            self.record.choose(self.found.costs, self._points_to_lose)
            self.set_hooks(self.hooks)
        figures = self.figures
        logged = {f"exits/{name}": figures[name] for name in ("accuracy", "cost")}
        pl_module.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def score_seen(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, ExitScores]:
        """Return how sure and how right each exit is now of the validation data of each task seen, on all ranks."""
        fit, scores = self.fit, {}
        if fit.call is None:
            raise RuntimeError("EarlyExits was asked for scores before training began.")
        for seen in range(fit.clock.task.index + 1):
            if seen not in fit.clock.progress.rejected:
                scored = score_exits(trainer, pl_module, fit.stream, self.hooks, fit.call, self.confidence, seen)
                if scored is not None:
                    scores[seen] = scored
        return scores

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.record.summaries:
            return
        figures = self.figures
        if self._log_dir is not None:
            names = [task.name for task in self.fit.stream.tasks]
            write_exits(self._log_dir, figures, self.record.summaries, names)
        if self.print_table:
            print_exits(figures)

    @property
    def threshold_in_use(self) -> float | None:
        """The threshold that samples are held against now; ``None`` while all go to the end."""
        if not self._answers:
            return None
        return self.record.chosen if self._points_to_lose is not None else self.threshold  # type: ignore[return-value]

    @property
    def figures(self) -> dict[str, Any]:
        """Cost and accuracy of the exits at the end of the last task; empty before the first."""
        record = self.record
        if not record.summaries:
            return {}
        return exit_figures(record.summaries, self.found.costs, self.threshold_in_use, record.accuracies)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fit.training.wake()

    @override
    def take_off(self) -> None:
        super().take_off()
        if self._fit is not None and self.network is not None:
            self._past = self._sums
            self._fit.training.wake()
        self._fit = None

    @property
    def fit(self) -> ExitFit:
        """What belongs to the running fit."""
        if self._fit is None:
            raise RuntimeError("EarlyExits was asked outside a fit.")
        return self._fit

    @property
    def _sums(self) -> Any:
        prototypes = None if self._fit is None else self._fit.prototypes
        return self._past if prototypes is None else prototypes.state_dict()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.network is None:
            return {}
        return {
            **super().state_dict(),
            "threshold": self.threshold_in_use,
            "record": self.record.state_dict(),
            "answers": self._answers,
            "phase_stopped_after": self.plan.stopped_after,
            "past": self._sums,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.network is None:
            return
        self._answers = state_dict["answers"]
        self.plan.stopped_after = state_dict["phase_stopped_after"]
        self._past = state_dict["past"]
        if self._fit is not None and self._fit.prototypes is not None:
            self._fit.prototypes.load_state_dict(self._past)
        self.record.load_state_dict(state_dict["record"])
        if self.network.hooks is not None:
            self.set_hooks(self.network.hooks)
