"""The DataModule that hands out one task's data after another."""

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import Self, override

from lightning_cl.arguments import check_choice
from lightning_cl.datamodules.base_data import BaseData
from lightning_cl.datamodules.same_stream import check_same_stream, describe_stream
from lightning_cl.datamodules.task_loaders import EvalLoaders, EvalTasks, TaskLoaders
from lightning_cl.tasks import BatchStructure, Cursor, Task, TaskClock, TaskSampler
from lightning_cl.tasks.clock import gather_state
from lightning_cl.tasks.sampler import batches_per_epoch


class TaskSequence(TaskLoaders):
    """Base class of the sequences: any DataModules, handed out task by task in one fit.

    The whole stream is one ``trainer.fit``; the `TaskClock`, put among the callbacks by `setup`, moves on at an epoch
    boundary. ``Trainer(max_epochs=...)`` and ``max_steps`` count per task.

    A base stays itself: its hooks are called, its loaders' settings (batch size, workers, collate function, whether
    they shuffle or drop a short last batch) are kept, and attributes that the sequence does not have are looked up on
    it. Batches are formed anew, so that every number of processes sees the same samples, each once an epoch. With
    several processes the last batch of an epoch is shared out as evenly as it goes; a rest smaller than the number of
    processes joins the batch before it.

    A subclass makes the tasks in `define_tasks` and their data in `task_data`.

    Args:
        bases: The DataModules behind the tasks.
        epochs_per_task: Epochs of each task, or one number for all; ``Trainer(max_epochs=...)`` by default.
        reset_optimizer: Whether each task gets new optimizers and schedulers, which see the task's horizon. Else they
            go on over the stream.
        eval_tasks: Which tasks the validation and test loaders serve: those seen so far, the current one, or all.
        eval_loaders: "joined" serves them one after another in one loader, as most modules expect; "per_task" gives a
            loader each, and the module's steps get a ``dataloader_idx``.
        shuffle: Whether each epoch has an order of its own; as the base's train loader does it by default.
        val_fraction: Share of the training data (of each class, where labels are known) that is held out for
            validation where a base has no validation data.
        eval_transform: Transform under which training samples are evaluated; found out by default.
        inputs: Where a batch has its inputs: key, dotted key or position; found out by default.
        target_key: Where a batch has its targets: key, dotted key or position; found out by default.
        seed: Seed of sample order and of the held-out split; that of ``seed_everything`` by default, else 0.

    Attributes:
        tasks: The tasks.
        current_task: The task that is trained now, or was last.
    """

    def __init__(
        self,
        bases: Sequence[LightningDataModule],
        epochs_per_task: int | list[int] | None = None,
        reset_optimizer: bool = True,
        eval_tasks: EvalTasks = "seen",
        eval_loaders: EvalLoaders = "joined",
        shuffle: bool | None = None,
        val_fraction: float | None = None,
        eval_transform: Callable[..., Any] | None = None,
        inputs: str | int | None = None,
        target_key: str | int | None = None,
        seed: int | None = None,
    ) -> None:
        check_choice("eval_tasks", eval_tasks, ("seen", "current", "all"))
        check_choice("eval_loaders", eval_loaders, ("joined", "per_task"))
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"`val_fraction` must be between 0 and 1, got {val_fraction}.")
        numbers = epochs_per_task if isinstance(epochs_per_task, list) else [epochs_per_task]
        if any(number is not None and not isinstance(number, int) for number in numbers):
            raise TypeError(f"`epochs_per_task` must count in whole numbers, got {epochs_per_task!r}.")
        if any(number is not None and number < 1 for number in numbers):
            raise ValueError(f"`epochs_per_task` must be at least 1, got {epochs_per_task}.")
        super().__init__(bases, val_fraction, eval_transform)
        self._given_seed = seed
        self._use_seed()
        self.epochs_per_task = epochs_per_task
        self.reset_optimizer = reset_optimizer
        self.eval_tasks: EvalTasks = eval_tasks
        self.eval_loaders: EvalLoaders = eval_loaders
        self.shuffle = shuffle
        self.structure = BatchStructure(inputs, target_key)
        self._tasks: Sequence[Task] = ()
        self._current: int | None = None
        self._clock: TaskClock | None = None
        self._ended_run: dict[str, Any] | None = None
        self._wrapped_as: str | None = None
        self._saved_batch: int | None = None  # the global batch of the checkpoint, until the first batch is drawn
        # of training, by task; `None` where data can only be iterated
        self._sample_counts: list[int | None] = []

    @abstractmethod
    def define_tasks(self) -> Sequence[Task]:
        """Return the tasks; called once the bases are set up."""

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks; asked for before any fit, they are made from the base's training data as it stands."""
        if not self._tasks:
            self._read_tasks()
        return self._tasks

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.tasks)

    @property
    def num_classes(self) -> int | None:
        """How many outputs the labels need: the largest one plus 1; ``None`` where tasks have no classes."""
        classes = {label for task in self.tasks for label in task.classes or ()}
        return max(classes) + 1 if classes else None

    @property
    def current_task(self) -> Task:
        """The task that is trained now, or was last; the first before any training."""
        return self.tasks[self._current or 0]

    @property
    def task_epoch(self) -> int:
        """Epoch inside the current task, from 0."""
        return 0 if self._clock is None else self._clock.progress.epochs

    @property
    def task_epochs(self) -> int:
        """Epochs planned for the current task; -1 if only steps limit it."""
        return -1 if self._clock is None else self._clock.planned_epochs

    @property
    def checkpoint_key(self) -> str:
        """Under which name the state stands in a checkpoint: that of the DataModule that the Trainer has."""
        return self._wrapped_as or type(self).__qualname__

    def wrapped_as(self, name: str) -> Self:
        """Return a copy over the same DataModules, with nothing read yet, for a DataModule that hands it out.

        Args:
            name: Name of that DataModule's class.
        """
        own = copy.copy(self)
        own._bases = [copy.copy(base) for base in self._bases]
        for base in own._bases:
            base.forget()
        own._wrapped_as = name
        own._tasks, own._sample_counts, own._current = (), [], None
        own._clock = own._ended_run = own._saved_batch = None
        own.replay = own.training_draw = None
        return own

    def epochs_of(self, task: int) -> int | None:
        """Return the epochs of a task, or ``None`` for those of the Trainer."""
        return self.epochs_per_task[task] if isinstance(self.epochs_per_task, list) else self.epochs_per_task

    def batches_of(self, task: int) -> int | None:
        """Return the training batches of an epoch of a task, or ``None`` if unknown."""
        base = self.base_of(task)
        data = None if base.is_iterable() else self.task_data(task, "train")
        if data is None:
            return None
        ranks, batch_size = self._ranks()["num_replicas"], base.batch_size("train")
        plan = self.replay
        joined = plan.length_before(task, self._sample_counts) if plan is not None and plan.mix == "joint" else 0
        return batches_per_epoch(len(data) + joined, batch_size * ranks, ranks, base.drops_last())

    def enter_task(self, task: int) -> None:
        """Make a task the current one."""
        self._current = task

    @override
    def setup(self, stage: str) -> None:
        self._use_seed()
        self.replay = self.training_draw = None
        super().setup(stage)
        if stage != "predict":  # tasks are what the training data says they are, in every other stage
            self._read_tasks()
        if stage == "fit" and self.trainer is not None:
            self._check_batches()
            self._ended_run = self._saved_batch = None
            self._clock = TaskClock.install(self.trainer, stream=self)

    @override
    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if self._clock is not None:
            # for `trainer.save_checkpoint` after the fit: such a file, too, can be continued with more tasks. The ranks
            # meet when it is written, not here: gloo may crash a process that ends right after a collective.
            self._ended_run = self._clock.state_of_rank()
        self._clock = self.replay = self.training_draw = None

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._clock is not None and self.trainer is not None:
            self._clock.uninstall(self.trainer)
        self._clock = self.replay = self.training_draw = None
        super().on_exception(exception)

    @override
    def train_dataloader(self) -> Any:
        if self._clock is not None:
            self._clock.enter_next_task()
        task = self._current or 0
        base = self.base_of(task)
        if base.is_iterable():
            return base.train_loader()
        return self._training_loader(task, self._cursor if self._clock is not None else None)

    def _check_batches(self) -> None:
        """Refuse, before training, tasks that are too small for the number of processes or for ``drop_last``."""
        for task in self.tasks:
            base = self.base_of(task.index)
            if not base.is_iterable():
                train = self._required_data(task.index)
                TaskSampler([train], base.batch_size("train"), drop_last=base.drops_last(), **self._ranks())
            self.evaluation_loader(task.index, "val")
        limit = 0 if self.trainer is None else self.trainer.limit_val_batches
        if (
            ((isinstance(limit, int) and limit > 0) or 0 < (limit or 0) < 1)
            and self.eval_loaders == "joined"
            and self.eval_tasks != "current"
            and len(self.tasks) > 1
        ):
            rank_zero_warn(
                "`Trainer(limit_val_batches=...)` leaves the last tasks out of the validation, since it goes through"
                " one task after another. Say `eval_loaders='per_task'` to limit each, or `eval_tasks='current'`."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "tasks": describe_stream(self._tasks, self._sample_counts),
            "current": self._current,
            "seed": self.seed,
            "global_batch": self._global_batch(),
            "ended_run": None if self._ended_run is None else gather_state(self._ended_run),
            "bases": [base.module.state_dict() for base in self._bases],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["seed"] != self.seed:
            if self._given_seed is not None:
                raise MisconfigurationException(
                    f"The checkpoint is from a sequence with `seed={state_dict['seed']}`, this one has"
                    f" `seed={self._given_seed}`: the order of samples would differ."
                )
            self._use_seed(state_dict["seed"])
            for base in self._bases:
                base.forget()
            self._read_tasks()
        check_same_stream(self._tasks, self._sample_counts, state_dict["tasks"], resumes=self._clock is not None)
        for base, state in zip(self._bases, state_dict["bases"], strict=False):
            if state:
                base.module.load_state_dict(state)
        self._current = state_dict["current"]
        self._saved_batch = state_dict["global_batch"]

    @override
    def spokesman(self) -> BaseData:
        return self.base_of(self._current or 0)

    def _use_seed(self, seed: int | None = None) -> None:
        chosen = self._given_seed if seed is None else seed
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if chosen is None else chosen
        for base in self._bases:
            base.seed = self.seed

    def _read_tasks(self) -> None:
        self._tasks = tuple(self.define_tasks())
        epochs = self.epochs_per_task
        if isinstance(epochs, list) and len(epochs) != len(self._tasks):
            raise ValueError(f"`epochs_per_task` has {len(epochs)} entries for {len(self._tasks)} tasks.")
        self._sample_counts = [
            None if self.base_of(task.index).is_iterable() else len(self._required_data(task.index))
            for task in self._tasks
        ]
        for task, samples in zip(self._tasks, self._sample_counts, strict=True):
            if samples == 0:
                raise ValueError(f"Task {task.index} ({task.name}) is empty: it has no training sample.")

    def _global_batch(self) -> int | None:
        base = self.base_of(self._current or 0)
        if self._clock is None or base.is_iterable():
            return None
        return base.batch_size("train") * int(self._ranks()["num_replicas"])

    def _cursor(self) -> Cursor:
        if self._clock is None or self.trainer is None:
            return Cursor()
        cursor = self._clock.cursor(self.trainer)
        if cursor.step > 0 and self._saved_batch not in (None, self._global_batch()):
            raise MisconfigurationException(
                f"The checkpoint was written inside an epoch with a global batch of {self._saved_batch}, now it is"
                f" {self._global_batch()}: samples would be seen twice or not at all. Resume with the same `batch_size`"
                " times `devices`, or from a checkpoint of an epoch's end."
            )
        self._saved_batch = None
        return cursor
