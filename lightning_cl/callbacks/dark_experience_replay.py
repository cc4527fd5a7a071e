"""Dark Experience Replay: past samples are replayed with the logits that the network gave them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.memory import Selection
from lightning_cl.tasks import Draw, Task
from lightning_cl.tasks.batches import as_labels, count_rows, take_rows
from lightning_cl.tasks.evaluation import evaluate_samples, evaluating, find_call, gather_rows
from lightning_cl.tasks.exit_callback import logits_by_head
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.replay import ReplayCallback, Start, Storage

LOGITS = "logits"


class DarkExperienceReplay(ReplayCallback):
    """Replay past samples with the logits they had: DER, and with labels DER++ (Buzzega et al., arXiv 2004.07211).

    The module's ``training_step`` gets the rows of the current task alone. To its loss come
    ``alpha * MSE(logits, kept logits) + beta * cross-entropy(logits, labels)`` of the replayed rows, logged as
    ``loss/dark_experience_replay``. The paper draws samples for the two terms apart; here both use one draw, which
    has the same expectation and costs one pass through the network instead of two.

    Logits are kept for each slot of the memory, in eval mode: of the finished network when a task ends, or, with
    ``start="online"``, of the network as it was when a sample was seen last in its own task, as in the paper.

    Beside ``EarlyExits(losses="all_exits")`` those of every exit are kept too, and both terms are means over the heads;
    while the network is trained alone they are those of its own head.

    Args:
        size: Slots of the memory. Without it (and without ``per_class``) nothing is replayed.
        alpha: Weight of the distance to the kept logits.
        beta: Weight of the labels; 0 is DER.
        selection: Who stays; see `Replay`. The paper's is "reservoir".
        per_class: See `Replay`.
        batch_size: See `Replay`.
        storage: See `Replay`.
        start: See `Replay`.
        seed: See `Replay`.
        head: Name of the classification layer, where logits cannot be found otherwise.

    Raises:
        ValueError: If an argument is out of its range, or two do not go together.

    Example::

        >>> DarkExperienceReplay(size=500, alpha=0.1, beta=0.5).selection
        'reservoir'
    """

    def __init__(
        self,
        size: int | None = None,
        alpha: float = 0.1,
        beta: float = 0.5,
        selection: Selection = "reservoir",
        per_class: int | None = None,
        batch_size: int | None = None,
        storage: Storage = "reference",
        start: Start = "next_task",
        seed: int | None = None,
        head: str | None = None,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        super().__init__(size, selection, per_class, batch_size, "append", storage, start, seed, head)
        self.alpha = alpha
        self.beta = beta
        self._call: ModuleCall | None = None
        self._replayed: Any = None  # the replayed rows of the batch in training
        self._looked: tuple[Tensor, Tensor] | None = None  # samples of the step, and their logits

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.memory is not None:
            self._call, batch = find_call(trainer, pl_module, self.stream, head=self.head, differentiable=True)
            if LOGITS in self.memory.extras:
                with evaluating(trainer, pl_module):
                    self._check_kept(self.memory.extras[LOGITS], self._logits(trainer, batch))

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        draw = self.stream.training_draw if self.memory is not None else None
        self._replayed = None
        if draw is None:
            return step(batch)
        own, rows = len(draw.ids), draw.rows
        if count_rows(batch) != rows:
            raise ValueError(
                f"A batch has {count_rows(batch)} rows where {rows} samples were drawn, so DarkExperienceReplay cannot"
                " tell which are replayed. Let the collate function and the DataModule's transfer hooks keep one row"
                " per sample, or use `Replay`."
            )
        if rows > own:
            self._replayed = take_rows(batch, slice(own, rows), rows)
            batch = take_rows(batch, slice(own), rows)
        elif trainer.world_size > 1 and self.memory is not None and len(self.memory) > 0:
            # other ranks have a share of this step's replay; all must call the network equally often
            self._replayed = batch
        self._look(trainer, pl_module, batch, draw)
        return step(batch)

    @override
    def training_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        draw = self.stream.training_draw if self.memory is not None else None
        if self._replayed is None or self.memory is None or draw is None:
            return None
        logits = self._logits(trainer, self._replayed)
        _, heads, classes = logits.shape
        if draw.replayed is None:
            return 0.0 * logits.sum()
        kept = self.memory.extras[LOGITS][draw.replayed.slots].to(logits.device)
        kept = torch.unflatten(kept, 1, (-1, classes))[:, -heads:]  # while the network is trained alone it has no exits
        loss = self.alpha * F.mse_loss(logits, kept)
        if self.beta > 0:
            labels = as_labels(self.stream.structure.find_targets(self._replayed))
            loss = loss + self.beta * F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(heads))
        return loss

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        super().on_batch_trained(trainer, pl_module, batch_idx)
        self._replayed = None
        if self.memory is not None and self._looked is not None:
            ids, logits = self._looked
            slots = self.memory.find(self.stream.current_task.index, ids)
            held = slots >= 0  # newcomers may have taken the slots of some
            self.memory.put(LOGITS, slots[held], logits[held])
            self._looked = None

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        if self.memory is None or self.start == "online":
            return
        slots = (self.memory.tasks == task.index).nonzero().squeeze(1)
        if len(slots) > 0:
            samples = self.memory.indices[slots]
            logits_of = partial(self._logits, trainer)
            logits = evaluate_samples(trainer, pl_module, self.stream, task.index, samples, logits_of)
            self.memory.put(LOGITS, slots, logits)

    @property
    @override
    def needs_labels(self) -> bool:
        return True

    @override
    def forget(self) -> None:
        super().forget()
        self._call = self._replayed = self._looked = None

    def _logits(self, trainer: Trainer, batch: Any) -> Tensor:
        """Return the logits of each head, ``(batch, heads, classes)``."""
        if self._call is None:
            raise RuntimeError("DarkExperienceReplay was asked for logits before training began.")
        return logits_by_head(trainer, self._call, batch)

    def _check_kept(self, kept: Tensor, logits: Tensor) -> None:
        columns = logits[0].numel()
        if kept.shape[1] != columns:
            raise MisconfigurationException(
                f"The checkpoint's replay memory keeps {kept.shape[1]} logits of each sample, and the heads of this run"
                f" have {columns}. Resume with the same classification layer, and the same `losses` of EarlyExits."
            )

    def _look(self, trainer: Trainer, pl_module: LightningModule, batch: Any, draw: Draw) -> None:
        """Take the logits of the step's own samples that are in the memory, or will be after this step."""
        self._looked = None
        if self.memory is None or draw.offered is None:
            return
        task = self.stream.current_task.index
        offered = torch.tensor(draw.offered)
        wanted = self.memory.find(task, offered) >= 0
        wanted[self.select(task, offered)] = True
        kept = set(offered[wanted].tolist())
        if not kept:
            return
        rows = [row for row, index in enumerate(draw.ids) if index in kept]
        ids = torch.tensor([draw.ids[row] for row in rows], dtype=torch.long)
        with evaluating(trainer, pl_module):
            # a rank without such a sample looks at one all the same, to learn how many logits there are
            logits = self._logits(trainer, take_rows(batch, rows or [0], len(draw.ids)))[: len(rows)].float()
        self._looked = gather_rows(trainer, ids, logits.flatten(1))
