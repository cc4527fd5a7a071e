"""Experience replay."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.memory import Selection
from lightning_cl.tasks.added_loss import with_loss
from lightning_cl.tasks.batches import count_rows
from lightning_cl.tasks.replay import ReplayCallback, Start, Storage
from lightning_cl.tasks.replay_plan import Mix


class Replay(ReplayCallback):
    """Train on past samples along with those of the current task (experience replay).

    Past samples join the batches at the sampler: they come out of your own data set, with its transforms, workers and
    collate function, in rows behind those of the current task. Your module trains on the batch as on any other, and
    ``trainer.datamodule.replay_rows`` says which rows are replayed, ``(batch,)`` bool.

    Every process holds the same memory, and ``size`` and ``batch_size`` count over all processes. So selection and
    draws are the same for any number of them.

    Args:
        size: Slots of the memory. Without it (and without ``per_class``) nothing is replayed.
        selection: Who stays: "class_balanced" (each class an equal share), "reservoir" (a uniform sample of the
            stream), "random" (each task an equal share, for streams without classes), "herding" (each class an equal
            share, of samples near the class's mean feature; iCaRL, arXiv 1611.07725).
        per_class: At most so many samples of each class; without ``size`` the memory grows with the classes.
        batch_size: Replayed samples of each step, over all processes; as many as the step's own by default. Never
            more than the memory has.
        mix: "append" adds them to each batch; "joint" shuffles the memory among the task's data, which makes epochs
            longer.
        weight: Share of the replayed samples in the loss, from 0 to 1: ``(1 - weight) * own + weight * replayed``,
            each a mean. It needs a ``training_step`` that returns one loss per sample, ``(batch,)``, itself or as
            ``"loss"``. A ``training_step`` that returns one number has taken the mean itself: then `weight` has no
            effect, and a warning says so. By default the loss is the plain mean of all rows.
        storage: "reference" fetches past samples from your data; "copy" keeps them, as an evaluation sees them, in
            files beside the checkpoints, for streams whose past data goes away.
        start: "next_task" fills the memory when a task ends; "online" after each batch, for streams that are seen
            once.
        seed: Seed of selection and draws; the task sequence's by default.
        head: Name of the classification layer whose input are the features that "herding" compares; found by default.

    Raises:
        ValueError: If an argument is out of its range, or two do not go together.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Replay(size=2000)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        size: int | None = None,
        selection: Selection = "class_balanced",
        per_class: int | None = None,
        batch_size: int | None = None,
        mix: Mix = "append",
        weight: float | None = None,
        storage: Storage = "reference",
        start: Start = "next_task",
        seed: int | None = None,
        head: str | None = None,
    ) -> None:
        if weight is not None and not 0 <= weight <= 1:
            raise ValueError(f"`weight` must be from 0 to 1, got {weight}.")
        super().__init__(size, selection, per_class, batch_size, mix, storage, start, seed, head)
        self.weight = weight
        self._has_warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._has_warned = False
        if self.is_active and stage == "fit" and not pl_module.automatic_optimization:
            self._warn("`training_step` optimises by itself")

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        draw = self.stream.training_draw
        if draw is not None:
            self._check_rows(count_rows(batch), draw.rows)
        return with_loss(step(batch), self._reduce)

    def _reduce(self, loss: Tensor) -> Tensor:
        rows = None if loss.numel() == 1 else self.stream.replay_rows
        if rows is None:
            self._warn("`training_step` returned one number, the mean over all rows")
            return loss
        if loss.shape != rows.shape:
            raise ValueError(
                f"`training_step` returned losses of shape {tuple(loss.shape)} for a batch of {len(rows)} rows. Replay"
                " takes one number, or one loss per row."
            )
        own, replayed = loss[~rows], loss[rows]
        if self.weight is None or len(own) == 0 or len(replayed) == 0:
            return loss.mean()
        return (1 - self.weight) * own.mean() + self.weight * replayed.mean()

    def _check_rows(self, found: int | None, drawn: int) -> None:
        self.stream.training_rows = found
        if found == drawn:
            return
        text = (
            f"A batch has {found} rows where {drawn} samples were drawn, so nobody can tell which are replayed: the"
            " collate function or a transfer hook of the DataModule changes their number."
        )
        if self.weight is not None:
            raise ValueError(f"{text} `weight={self.weight}` needs one row per sample.")
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(f"{text} Training goes on, and `replay_rows` is None for such a batch.")

    def _warn(self, reason: str) -> None:
        if self.weight is None or self._has_warned:
            return
        self._has_warned = True
        rank_zero_warn(
            f"`weight={self.weight}` of Replay has no effect: {reason}. Return one loss per sample, such as"
            " `cross_entropy(logits, labels, reduction='none')`, from a module with automatic optimisation."
        )
