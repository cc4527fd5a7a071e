"""Classes that arrive a few at a time."""

import random
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_cl.datamodules.labels import known_labels, read_labels
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.tasks import Task, TaskDataset
from lightning_cl.tasks.stream import DataSplit


class ClassIncremental(TaskSequence):
    """Cut a labelled data set into tasks of different classes.

    Labels are never renumbered: the module's head has one output per class of the whole data set from the start.

    Args:
        base: Any DataModule with class labels.
        num_tasks: Number of tasks of equal class count (after ``first_task_classes``, if given).
        classes_per_task: Classes of each task: one number, or a list that may leave classes for later. A run can be
            continued with a longer list.
        first_task_classes: Classes of the first task, where it is larger than the others.
        class_order: Order in which classes arrive: a list of all labels, or a seed that shuffles them. Ascending by
            default.
        **options: Those of `TaskSequence`: ``epochs_per_task``, ``reset_optimizer``, ``eval_tasks``, ``eval_loaders``,
            ``shuffle``, ``val_fraction``, ``eval_transform``, ``inputs``, ``target_key``, ``seed``.

    Raises:
        ValueError: If the arguments do not say how many classes a task has, or, once the labels are read, if these
            do not fit the classes that there are.

    Example::

        >>> from lightning_cl.datamodules import Digits
        >>> [task.classes for task in ClassIncremental(Digits(), num_tasks=5).tasks]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    """

    def __init__(
        self,
        base: LightningDataModule,
        num_tasks: int | None = None,
        classes_per_task: int | list[int] | None = None,
        first_task_classes: int | None = None,
        class_order: list[int] | int | None = None,
        **options: Any,
    ) -> None:
        if (num_tasks is None) == (classes_per_task is None):
            raise ValueError(
                f"Give one of `num_tasks` and `classes_per_task`, got {num_tasks!r} and {classes_per_task!r}."
            )
        sizes = classes_per_task if isinstance(classes_per_task, list) else [classes_per_task]
        for argument, values in (
            ("num_tasks", [num_tasks]),
            ("classes_per_task", sizes),
            ("first_task_classes", [first_task_classes]),
        ):
            got = values[0] if len(values) == 1 else values
            if any(value is not None and (not isinstance(value, int) or isinstance(value, bool)) for value in values):
                raise TypeError(f"`{argument}` must count in whole numbers, got {got!r}.")
            if not values or any(value is not None and value < 1 for value in values):
                raise ValueError(f"`{argument}` must be at least 1, got {got}.")
        if isinstance(class_order, str) or not isinstance(class_order, (int, Sequence, NoneType)):
            raise TypeError(f"`class_order` must be a list of all labels or a seed, got {class_order!r}.")
        if isinstance(classes_per_task, list) and first_task_classes is not None:
            raise ValueError("`classes_per_task` as a list names the first task too; leave out `first_task_classes`.")
        self._num_tasks = num_tasks
        self.classes_per_task = classes_per_task
        self.first_task_classes = first_task_classes
        self.class_order = class_order
        self._labels: dict[DataSplit, Tensor] = {}
        self._read: list[tuple[Dataset[Any], Tensor]] = []
        super().__init__([base], **options)

    @override
    def setup(self, stage: str) -> None:
        self._labels = {}
        super().setup(stage)

    @property
    @override
    def num_classes(self) -> int | None:
        """How many outputs the labels of the whole data set need, also those that come in no task yet."""
        return int(self._labels_of("train").max()) + 1

    @override
    def define_tasks(self) -> Sequence[Task]:
        self._labels = {}
        order = self._ordered(sorted(set(self._labels_of("train").tolist())))
        tasks, start = [], 0
        for index, size in enumerate(self._sizes(len(order))):
            classes = tuple(order[start : start + size])
            tasks.append(Task(index, _name(classes), classes))
            start += size
        return tasks

    @override
    def task_data(self, task: int, split: DataSplit) -> TaskDataset | None:
        base = self.base_of(task)
        if split != "train" and base.task_dataset(split) is None:
            return None
        wanted = torch.tensor(self.tasks[task].classes)
        return base.task_dataset(split, torch.isin(self._labels_of(split), wanted).nonzero().squeeze(1))

    @override
    def labels_of(self, task: int, read: bool = True) -> Tensor | None:
        labels = self._labels_of("train")
        return labels[torch.isin(labels, torch.tensor(self.tasks[task].classes))]

    def _labels_of(self, split: DataSplit) -> Tensor:
        if split not in self._labels:
            base = self._bases[0]
            data = base.task_dataset(split)
            if data is None:
                raise MisconfigurationException(
                    f"`{type(base.module).__name__}.{split}_dataloader()` returned no loader."
                )
            self._labels[split] = self._labels_in(base.labelled_dataset(split))[data.indices]
        return self._labels[split]

    def _labels_in(self, dataset: Dataset[Any]) -> Tensor:
        labels = known_labels(dataset) if self.structure.target_key is None else None
        if labels is not None:
            return labels
        # samples are read once, although splits share a data set and stages follow one another
        for known, labels in self._read:
            if known is dataset:
                return labels
        labels = read_labels(dataset, self.structure)
        self._read = [*self._read[-2:], (dataset, labels)]
        return labels

    def _ordered(self, classes: list[int]) -> list[int]:
        if self.class_order is None:
            return classes
        if isinstance(self.class_order, int):
            random.Random(self.class_order).shuffle(classes)
            return classes
        if sorted(self.class_order) != classes:
            missing, unknown = set(classes) - set(self.class_order), set(self.class_order) - set(classes)
            detail = f"missing {sorted(missing)}, unknown {sorted(unknown)}" if missing or unknown else "some twice"
            raise ValueError(
                f"`class_order` must be a permutation of the {len(classes)} classes of the data: {detail}."
            )
        return self.class_order

    def _sizes(self, total: int) -> list[int]:
        if isinstance(self.classes_per_task, list):
            if sum(self.classes_per_task) > total:
                raise ValueError(
                    f"`classes_per_task` asks for {sum(self.classes_per_task)} classes, the data has {total}."
                )
            return self.classes_per_task
        first = [] if self.first_task_classes is None else [self.first_task_classes]
        rest = total - sum(first)
        if rest < 0:
            raise ValueError(f"`first_task_classes={first[0]}` is more than the {total} classes of the data.")
        if self._num_tasks is not None:
            argument, asked = "num_tasks", self._num_tasks
            count = self._num_tasks - len(first)
            if self._num_tasks > total:
                raise ValueError(f"`num_tasks={self._num_tasks}` is more than the {total} classes of the data.")
            fits = rest == 0 if count == 0 else rest > 0 and rest % count == 0
            size = rest // count if count else 0
        else:
            argument, asked = "classes_per_task", self.classes_per_task or 1
            size = asked
            fits = rest % size == 0
            count = rest // size
        if not fits:
            raise ValueError(
                f"{rest} of the {total} classes do not divide evenly by `{argument}={asked}`"
                f"{f' after `first_task_classes={first[0]}`' if first else ''}."
                " Give the sizes as a list, such as `classes_per_task=[4, 3, 3]`."
            )
        return first + [size] * count


def _name(classes: tuple[int, ...]) -> str:
    if len(classes) > 3 and list(classes) == list(range(classes[0], classes[-1] + 1)):
        return f"classes {classes[0]}-{classes[-1]}"
    shown = ", ".join(map(str, classes[:3]))
    return f"classes {shown}" + (", ..." if len(classes) > 3 else "")
