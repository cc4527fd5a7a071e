"""Exits inside the network: heads that are trained with it, and samples that leave early."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.exits import ExitHooks, ExitNetwork
from lightning_cl.heads.exit_heads import ExitHeadKind
from lightning_cl.heads.exit_rules import Confidence
from lightning_cl.reporting.exits import exit_figures, print_exits, write_exits
from lightning_cl.taps import EXITS
from lightning_cl.tasks import ContinualCallback, Task, TaskClock
from lightning_cl.tasks.evaluation import find_call
from lightning_cl.tasks.exit_evaluation import (
    ExitRecord,
    classes_seen,
    fit_correction,
    points_to_lose,
    score_exits,
)
from lightning_cl.tasks.exit_phases import PhasePlan, Regime
from lightning_cl.tasks.exit_search import check_fit, find_exits
from lightning_cl.tasks.exit_training import ExitTraining, LossWeights
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.overrides import InstanceOverrides
from lightning_cl.tasks.stream import ReplayStream


class EarlyExits(ContinualCallback):
    """Train exit heads inside a network, and let samples leave where a head is sure (arXiv 2407.14320).

    The heads are built from a dry run and are part of the module during a Trainer call: its optimizer, DDP and
    checkpoints have them, under ``early_exits``. In eval mode, with a `threshold`, a sample that a head is sure of
    leaves the batch at its layer, so that the layers after it compute the others alone; what the classification layer
    puts out is the whole batch in its order.

    Args:
        layers: Names of the layers with exits, or patterns as in ``layer?``; "auto:3" finds three that divide the
            network into parts of about the same cost.
        regime: "joint" trains network and heads together; "mixed" the network alone in the first half of each task;
            "disjoint" the network alone, and then the heads alone on a network that stands still.
        head: "pool", "conv" or "linear", or a module of your own that is copied for each exit.
        loss_weights: Of the exits' losses: all alike, growing with depth and epochs ("sdn"), or one number for each
            exit and one for the network's own.
        phase_epochs: Epochs of the regime's phases in each task; halves of the task if ``None``.
        threshold: How sure a head must be, from 0 to 1, for a sample to leave. ``None`` lets all go to the end.
            "auto:0.5pp" takes, at the end of each task, the cheapest whose accuracy on the validation data of the tasks
            seen is at most 0.5 points below that of the whole network.
        confidence: What sure is: the largest probability, a low entropy, or predictions that repeat ("patience").
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

    acts_innermost = True  # replay may give the module other rows

    def __init__(
        self,
        layers: list[str] | str,
        regime: Regime = "mixed",
        head: ExitHeadKind | nn.Module = "pool",
        loss_weights: LossWeights = "uniform",
        phase_epochs: list[int] | None = None,
        threshold: float | str | None = None,
        confidence: Confidence = "max_softmax",
        correction: Literal["none", "tlc"] = "none",
        classifier: str | None = None,
        print_table: bool = True,
    ) -> None:
        auto = re.fullmatch(r"auto:([1-9]\d*)", layers) if isinstance(layers, str) else None
        if not layers or (isinstance(layers, str) and auto is None):
            raise ValueError(f"`layers` must be a list of layer names, or as in 'auto:3', got {layers!r}.")
        check_choice("regime", regime, ("disjoint", "joint", "mixed"))
        if not isinstance(head, nn.Module):
            check_choice("head", head, ("pool", "conv", "linear"))
        if isinstance(loss_weights, str):
            check_choice("loss_weights", loss_weights, ("uniform", "sdn"))
        elif any(weight < 0 for weight in loss_weights):
            raise ValueError(f"`loss_weights` must be 0 or more, got {loss_weights}.")
        self._points_to_lose = points_to_lose(threshold)
        check_choice("correction", correction, ("none", "tlc"))
        check_choice("confidence", confidence, ("max_softmax", "entropy", "patience"))
        self.layers = layers
        self._wanted: list[str] | int = layers if auto is None else int(auto[1])  # type: ignore[assignment]
        self.head = head
        self.loss_weights = loss_weights
        self.plan = PhasePlan(regime, phase_epochs)
        self.threshold = threshold
        self.confidence: Confidence = confidence
        self.correction = correction
        self.classifier = classifier
        self.print_table = print_table
        self.record = ExitRecord()
        self.network: ExitNetwork | None = None
        self._answers = False  # once heads have been trained
        self._call: ModuleCall | None = None
        self._log_dir: str | None = None
        self._overrides = InstanceOverrides()
        self._training: ExitTraining | None = None
        self._clock: TaskClock | None = None
        self._stream: ReplayStream | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._take_off()
        if stage == "fit":
            answers, corrects = self.threshold is not None, self.correction == "tlc"
            self._clock, self._stream = check_fit(trainer, pl_module, self.plan, answers, corrects)
            self.network, self._answers, self.record = None, False, ExitRecord()

        def build() -> None:
            if stage == "fit":
                self._build(trainer, pl_module)
            elif self.network is not None:
                self._put_on(pl_module)

        def setup(original: Callable[..., None], *args: Any, **named: Any) -> None:
            original(*args, **named)
            if not is_overridden("configure_model", pl_module):
                build()

        def configure_model(original: Callable[[], None]) -> None:
            original()
            if self.network is None or self.network.hooks is None:  # it may be called again
                build()

        # a module may build its layers in either
        self._overrides.wrap(pl_module, "setup", setup)
        self._overrides.wrap(pl_module, "configure_model", configure_model)
        self._overrides.wrap(pl_module, "on_load_checkpoint", partial(self._before_load, pl_module))

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = find_exits(trainer, pl_module, self.stream, self._wanted, self.head, self.classifier)
        if self.confidence == "patience" and len(network.heads) < 2:
            raise MisconfigurationException(
                "`confidence='patience'` waits for predictions that repeat and needs at least 2 exits, got 1."
            )
        self.network = network
        self._training = ExitTraining(self.plan, self.loss_weights, network)
        self._put_on(pl_module)

    def _put_on(self, pl_module: LightningModule) -> None:
        if self.network is None:
            return
        if hasattr(pl_module, EXITS):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has an attribute {EXITS!r} already, which is where EarlyExits puts its"
                " heads. Rename it."
            )
        try:
            self.network.attach(pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"EarlyExits: {error}") from None
        self.hooks.confidence = self.confidence
        self._set_hooks()
        if self.threshold is not None and self.network.mixing_layer is not None:
            rank_zero_warn(
                f"Samples cannot leave the batch at {self.network.mixing_layer!r}: what the network makes of the others"
                " depends on them. They take the answers of their exits, but go all the way, so nothing is saved."
            )

    def _before_load(
        self, pl_module: LightningModule, original: Callable[..., None], checkpoint: dict[str, Any]
    ) -> None:
        """Make the heads of a checkpoint before its weights are loaded."""
        original(checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            if self.network is not None and "callbacks" in checkpoint:
                raise MisconfigurationException(
                    "The checkpoint is of a run without EarlyExits: it holds no exit heads. Take the callback out, or"
                    " start from the module's weights alone."
                )
            return
        if self.network is None:
            self.network = ExitNetwork(state["spec"], self.head)
            self._answers = state["answers"]
            self.record.load_state_dict(state["record"])
            self._put_on(pl_module)
        elif self.network.spec["layers"] != state["spec"]["layers"]:
            raise MisconfigurationException(
                f"The checkpoint has exits at {state['spec']['layers']}, this EarlyExits at"
                f" {self.network.spec['layers']}. Use the same `layers`."
            )
        for name, tensor in state["heads"].items():
            checkpoint["state_dict"].setdefault(f"{EXITS}.{name}", tensor)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training.join(trainer.optimizers[0])  # before a checkpoint's optimizer state comes

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        without_files = not trainer.loggers or trainer.fast_dev_run  # type: ignore[attr-defined]
        self._log_dir = None if without_files else trainer.log_dir
        for task in self.stream.tasks:
            if self._points_to_lose is not None and not self.stream.samples_of(task.index, "val"):
                raise MisconfigurationException(
                    f"`threshold={self.threshold!r}` is chosen on validation data, and task {task.index} ({task.name})"
                    " has none. Say `val_fraction=0.1` on the task sequence to hold some training data out."
                )
        self._call, _ = find_call(trainer, pl_module, self.stream, head=self.found.spec["classifier"])
        self.record.make_room(len(self.stream.tasks), len(self.found.costs))
        self._enter_epoch(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training.join(trainer.optimizers[0])  # each task may have a new one
        self._enter_epoch(pl_module)

    def _enter_epoch(self, pl_module: LightningModule) -> None:
        self.training.enter(pl_module, self.hooks, self.clock.progress.epochs, self.clock.planned_epochs)
        if self.training.phase != "network":
            self._answers = True
            self._set_hooks()

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        return self.training.step(trainer, pl_module, self.hooks, self.stream.structure, batch, step)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.training.drop_gradients(optimizer)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self._call is None:
            return
        rejected = self.clock.progress.rejected
        if self.correction == "tlc":
            fitted = fit_correction(trainer, pl_module, self.stream, self.hooks, self._call, rejected)
            self.record.correction = fitted, classes_seen(self.stream, task.index, rejected)
            self._set_hooks()
        found = {
            seen: score_exits(trainer, pl_module, self.stream, self.hooks, self._call, self.confidence, seen)
            for seen in range(task.index + 1)
            if seen not in rejected
        }
        self.record.take(task.index, {seen: scores for seen, scores in found.items() if scores is not None})
        if not self.record.scores:
            return
        if self._points_to_lose is not None:
            self.record.choose(self.found.costs, self._points_to_lose)
            self._set_hooks()
        figures = self.figures
        logged = {f"exits/{name}": figures[name] for name in ("accuracy", "cost")}
        pl_module.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.record.scores:
            return
        figures = self.figures
        if self._log_dir is not None:
            names = [task.name for task in self.stream.tasks]
            write_exits(Path(self._log_dir), figures, self.record.scores, names)
        if self.print_table:
            print_exits(figures)

    def _set_hooks(self) -> None:
        self.hooks.threshold, self.hooks.correction = self.threshold_in_use, self.record.corrects

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
        if not record.scores:
            return {}
        return exit_figures(record.scores, self.found.costs, self.threshold_in_use, record.accuracies)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training.wake()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._take_off()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_off()

    def _take_off(self) -> None:
        self._overrides.undo()
        if self._training is not None:
            self._training.wake()
        if self.network is not None:
            self.network.detach()
        self._stream = self._clock = self._training = self._call = None

    @property
    def stream(self) -> ReplayStream:
        """The tasks of the running fit."""
        if self._stream is None:
            raise RuntimeError("EarlyExits was asked outside a fit.")
        return self._stream

    @property
    def clock(self) -> TaskClock:
        """The clock of the running fit."""
        if self._clock is None:
            raise RuntimeError("EarlyExits was asked outside a fit.")
        return self._clock

    @property
    def training(self) -> ExitTraining:
        """How the heads are trained in the running fit."""
        if self._training is None:
            raise RuntimeError("EarlyExits was asked outside a fit.")
        return self._training

    @property
    def found(self) -> ExitNetwork:
        """The exits of the module that was fitted."""
        if self.network is None:
            raise RuntimeError("EarlyExits has no heads before a fit.")
        return self.network

    @property
    def heads(self) -> nn.ModuleList:
        """The exit heads, in the order in which a sample meets them."""
        return self.found.heads

    @property
    def hooks(self) -> ExitHooks:
        """What lets the heads answer, during a Trainer call."""
        if self.network is None or self.network.hooks is None:
            raise RuntimeError("EarlyExits was asked outside a Trainer call.")
        return self.network.hooks

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.network is None:
            return {}
        # during a fit the module's own weights hold those of the heads
        heads = {} if self.network.hooks is not None else self.heads.state_dict()
        return {
            "spec": copy.deepcopy(self.network.spec),
            "threshold": self.threshold_in_use,
            "record": self.record.state_dict(),
            "confidence": self.confidence,
            "answers": self._answers,
            "heads": {name: tensor.cpu().clone() for name, tensor in heads.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.network is None:
            return
        self._answers = state_dict["answers"]
        self.record.load_state_dict(state_dict["record"])
        if self.network.hooks is not None:
            self._set_hooks()
