"""What the callbacks that replay past samples share: a memory, kept up to date, and its samples in the batches."""

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_count
from lightning_cl.memory import ReplayMemory, Selection
from lightning_cl.taps import LayerTap, find_head, layer_named
from lightning_cl.tasks import compat
from lightning_cl.tasks.evaluation import evaluate_samples, find_call
from lightning_cl.tasks.exemplar_store import ExemplarStore
from lightning_cl.tasks.loader import TaskDataset
from lightning_cl.tasks.replay_plan import Mix, ReplayPlan
from lightning_cl.tasks.stream import ReplayStream
from lightning_cl.tasks.stream_callback import StreamCallback
from lightning_cl.tasks.task import Task

Storage = Literal["reference", "copy"]
Start = Literal["next_task", "online"]


class ReplayCallback(StreamCallback):
    """Base class of callbacks that replay past samples.

    The memory is global: every process holds the same slots, draws the same samples at each step and takes its share
    of them. It is updated when a task is committed, or, with ``start="online"``, after each batch.

    Args:
        size: Slots of the memory. Without it, and without ``per_class``, nothing is replayed.
        selection: Who stays in the memory; see `ReplayMemory`.
        per_class: At most so many samples of each class.
        batch_size: Replayed samples of each step, over all processes; as many as the step's own by default.
        mix: "append" adds them to each batch; "joint" shuffles the memory among the task's data.
        storage: "reference" fetches past samples from the user's data; "copy" keeps them in files beside the
            checkpoints.
        start: "next_task" fills the memory when a task ends; "online" while it is trained.
        seed: Seed of selection and draws; the task sequence's by default.
        head: Name of the classification layer, where it is needed and cannot be found.

    Attributes:
        memory: The memory; ``None`` where nothing is replayed.
    """

    def __init__(
        self,
        size: int | None = None,
        selection: Selection = "class_balanced",
        per_class: int | None = None,
        batch_size: int | None = None,
        mix: Mix = "append",
        storage: Storage = "reference",
        start: Start = "next_task",
        seed: int | None = None,
        head: str | None = None,
    ) -> None:
        check_choice("selection", selection, ("class_balanced", "reservoir", "random", "herding"))
        check_choice("mix", mix, ("append", "joint"))
        check_choice("storage", storage, ("reference", "copy"))
        check_choice("start", start, ("next_task", "online"))
        check_count("batch_size", batch_size)
        if mix == "joint" and (start == "online" or batch_size is not None):
            what = "start='online'" if start == "online" else f"batch_size={batch_size}"
            raise ValueError(
                f"`mix='joint'` shuffles the memory among the task's data before its first step, so `{what}` does not"
                " go with it. Use `mix='append'`."
            )
        if selection == "herding" and start == "online":
            raise ValueError(
                "`selection='herding'` compares the features of a whole task, so `start='online'` does not go with it."
                " Use 'reservoir' or 'class_balanced'."
            )
        self.size = size
        self.selection: Selection = selection
        self.per_class = per_class
        self.batch_size = batch_size
        self.mix: Mix = mix
        self.storage: Storage = storage
        self.start: Start = start
        self.seed = seed
        self.head = head
        self.memory = None if size is None and per_class is None else self._new_memory(seed or 0)
        self._store = ExemplarStore()
        self._labels: dict[int, Tensor | None] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.memory is None or stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        stream = self.need_stream(trainer, "replays samples of past tasks")
        self._check(trainer, stream)
        self.memory = self._new_memory(stream.seed if self.seed is None else self.seed)
        self._store = ExemplarStore()
        self._labels = {}
        stream.replay = ReplayPlan(
            memory=self.memory,
            batch_size=self.batch_size,
            mix=self.mix,
            online=self.start == "online",
            copies=partial(self._copies_of, trainer, stream),
            labels=partial(self._labels_of, stream),
        )

    @override
    def forget(self) -> None:
        super().forget()
        self._labels = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.memory is not None and self._copies(trainer):
            self._store.prepare(trainer, self.stream, self.memory.task_counts)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.memory is None:
            return
        task = self.stream.current_task
        if self.selection == "herding":  # refuses a module without a head before training
            self._features(trainer, pl_module, task.index, torch.arange(1))
        if len(self.memory) == 0 and task.index > 0:
            rank_zero_warn(
                f"{self.name} begins at task {task.index} ({task.name}) with an empty memory: the checkpoint"
                " holds none, so nothing of earlier tasks is replayed."
            )

    @override
    def on_batch_trained(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        if self.memory is None or self.start != "online":
            return
        stream = self.stream
        if stream.replay is not None and stream.training_draw is not None and stream.training_draw.offered is not None:
            stream.replay.offer(self.memory, self.stream.current_task.index, stream.training_draw.offered)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.memory is None:
            return
        stream = self.stream
        if self.start == "next_task":
            candidates = torch.arange(stream.samples_of(task.index) or 0)
            herds = self.selection == "herding"
            features = self._features(trainer, pl_module, task.index, candidates) if herds else None
            self.memory.add(task.index, candidates, self._labels_of(stream, task.index), features)
        if self._copies(trainer):
            kept = self.memory.indices[self.memory.tasks == task.index]
            if len(kept) > 0:
                self._store.write(trainer, stream, task.index, kept)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.memory is None:
            return {}
        return {
            "memory": self.memory.state_dict(),
            "mix": self.mix,
            "start": self.start,
            "store": self._store.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # a test needs no memory, and must not replace that of a fit
        if self.memory is None or not self.in_stream or not state_dict:
            return
        if self.seed is not None and state_dict["memory"]["seed"] != self.seed:
            raise MisconfigurationException(
                f"The checkpoint's replay memory has `seed={state_dict['memory']['seed']}`, this one has"
                f" `seed={self.seed}`: other samples would be kept."
            )
        for name in ("mix", "start"):
            if state_dict[name] != getattr(self, name):
                raise MisconfigurationException(
                    f"The checkpoint is from a run with `{name}={state_dict[name]!r}`, this one has"
                    f" `{name}={getattr(self, name)!r}`: other samples would be replayed. Resume with the same."
                )
        try:
            self.memory.load_state_dict(state_dict["memory"])
        except ValueError as error:
            raise MisconfigurationException(f"The checkpoint has another replay memory: {error}") from None
        self._store.load_state_dict(state_dict["store"])

    @property
    @override
    def is_active(self) -> bool:
        return self.memory is not None

    @property
    @override
    def state_key(self) -> str:
        """One that is switched off does not stand in the way of another."""
        return super().state_key if self.is_active else self._generate_state_key(size=None)

    @property
    def needs_labels(self) -> bool:
        """Whether samples must have class labels."""
        return self.selection in ("class_balanced", "herding")

    def select(self, task: int, candidates: Tensor) -> Tensor:
        """Return the positions of those candidates whom the memory would take in now."""
        if self.memory is None:
            return torch.empty(0, dtype=torch.long)
        labels = self._labels_of(self.stream, task)
        return self.memory.select(task, candidates, None if labels is None else labels[candidates])

    def _features(self, trainer: Trainer, pl_module: LightningModule, task: int, indices: Tensor) -> Tensor:
        try:
            name = find_head(pl_module, self.stream.num_classes, self.head)
        except ValueError as error:
            raise MisconfigurationException(f"`selection='herding'` compares features: {error}") from None
        call, _ = find_call(trainer, pl_module, self.stream, head=name)
        layers = {name: layer_named(pl_module, name)}

        def features(batch: Any) -> Tensor:
            with LayerTap(layers) as tap:
                call(batch)
            return tap.inputs[name]

        found = evaluate_samples(trainer, pl_module, self.stream, task, indices, features)
        if not bool(found.isfinite().all()):
            raise ValueError(
                f"`selection='herding'` compares features, and those of task {task} are not finite numbers: has the"
                " training diverged?"
            )
        return found

    def _new_memory(self, seed: int) -> ReplayMemory:
        return ReplayMemory(self.size, self.selection, self.per_class, seed)

    def _copies(self, trainer: Trainer) -> bool:
        return self.storage == "copy" and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _copies_of(self, trainer: Trainer, stream: ReplayStream, task: int) -> TaskDataset | None:
        return self._store.data(trainer, stream, task) if task in self._store else None

    def _labels_of(self, stream: ReplayStream, task: int) -> Tensor | None:
        if task not in self._labels:
            self._labels[task] = stream.labels_of(task, read=self.selection in ("class_balanced", "herding"))
        return self._labels[task]

    def _check(self, trainer: Trainer, stream: ReplayStream) -> None:
        others = [c for c in compat.callbacks_of(trainer) if isinstance(c, ReplayCallback) and c.memory is not None]
        if len(others) > 1:
            raise MisconfigurationException(
                f"One run has one replay memory, got {' and '.join(type(c).__name__ for c in others)}. Take one out."
            )
        self.check_indexed(stream.tasks)
        classes = {label for task in stream.tasks for label in task.classes or ()}
        if self.size is not None and self.size < len(classes):
            raise MisconfigurationException(
                f"`size={self.size}` of {self.name} is less than one slot for each of the {len(classes)} classes of the"
                f" stream. Give it at least {len(classes)}."
            )
        if self.selection == "random" and self.size is not None and self.size < len(stream.tasks):
            raise MisconfigurationException(
                f"`size={self.size}` of {self.name} is less than one slot for each of the {len(stream.tasks)} tasks of"
                f" the stream. Give it at least {len(stream.tasks)}."
            )
        if self.needs_labels:
            advice = "For data without classes there is `Replay` with `selection='reservoir'` or 'random'."
            self.check_labels(f"with `selection={self.selection!r}`", advice)
