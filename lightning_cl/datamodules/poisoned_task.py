"""A sequence one of whose tasks is poisoned."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.datamodules.delegation import DelegatingDataModule
from lightning_cl.datamodules.poison import Attack, Poison
from lightning_cl.datamodules.poisoned_splits import PoisonedSplits
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.reporting.contact_sheet import write_contact_sheet
from lightning_cl.tasks import TaskClock
from lightning_cl.tasks.run_directory import run_directory
from lightning_cl.tasks.stream import DataSplit


class PoisonedTask(DelegatingDataModule):
    """Poison one task of a sequence: corrupt training images, and leave their labels as they are.

    The attack of single-task poisoning (Pawlak et al. 2025, arXiv 2507.04106): images of one task are corrupted before
    augmentation and normalisation, and what suffers are the tasks before and after it. The task's validation data are
    poisoned too, test and prediction data never. All else is that of the sequence: tasks, order of samples, batches.

    What is poisoned is a function of the arguments alone: it is the same in training, in evaluations of training
    samples, when samples are replayed, in loader workers and for every number of processes. A checkpoint can be resumed
    with the same poison only, and a checkpoint of the clean sequence not at all.

    Poison several tasks by wrapping a `PoisonedTask`. The sequence that is wrapped stays clean, and usable by itself.
    Images are uint8 or floats in [0, 1], arrays, tensors or PIL images, of 1 or 3 channels. In a data set with an
    attribute ``transform`` they are corrupted before it, else as the data set hands them out. A `TensorDataset` has its
    images copied.

    Args:
        sequence: The clean sequence.
        task: Index of the task that is poisoned, from 0.
        attack: "base" corrupts all classes of the task, "bait" a seeded half of them (rounded up), which ties a cue to
            these classes; both with one corruption. "multibase" and "multibait" deal the classes to five corruptions
            in turn, or, where there are fewer classes, the samples of each evenly to several.
        corruption: Name of a corruption in `lightning_cl.corruptions`, or a list of names that takes the place of the
            five. By default Gaussian blur; for several also Gaussian noise, contrast, pixelation and JPEG compression.
        severity: From 1 to 5; 0 changes nothing.
        classes: Labels of the classes that are poisoned, instead of all or a drawn half.
        samples: Share of the samples of each of these classes that are poisoned, in (0, 1].
        seed: Seed of the choices and of the corruptions; that of the sequence by default.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the sequence has no such task or the task no such
            class.
        MisconfigurationException: In `setup`, if the task has no class labels or no images.

    Example::

        >>> from lightning_cl.datamodules import ClassIncremental, Digits
        >>> clean = ClassIncremental(Digits(), num_tasks=5)
        >>> data = PoisonedTask(clean, task=3, attack="bait", corruption="contrast", seed=0)
        >>> data.setup("fit")
        >>> len(data.poisoned_indices()), data.samples_of(3)
        (129, 260)
    """

    def __init__(
        self,
        sequence: "TaskSequence | PoisonedTask",
        task: int,
        attack: Attack = "base",
        corruption: str | list[str] | None = None,
        severity: int = 5,
        classes: list[int] | None = None,
        samples: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if not isinstance(sequence, (TaskSequence, PoisonedTask)):
            raise TypeError(
                f"`sequence` must be a task sequence, such as `ClassIncremental(...)`, got {type(sequence).__name__}."
            )
        poison = Poison(task, attack, corruption, severity, classes, samples, seed)
        inner: tuple[Poison, ...] = sequence.poisons if isinstance(sequence, PoisonedTask) else ()
        if any(other.task == task for other in inner):
            raise ValueError(f"`task={task}` is poisoned already: a task can be poisoned once.")
        self.task = task
        self.poisons: tuple[Poison, ...] = (*inner, poison)
        clean = sequence.sequence if isinstance(sequence, PoisonedTask) else sequence
        self._splits = PoisonedSplits(clean.wrapped_as(type(self).__qualname__), self.poisons)
        super().__init__([self.sequence], val_fraction=None, eval_transform=None)
        self._sheets_due = False

    @property
    def sequence(self) -> TaskSequence:
        """The sequence that hands out the data, poisoned."""
        return self._splits.sequence

    def poisoned_indices(self, split: DataSplit = "train", task: int | None = None) -> Tensor:
        """Return which samples of a task are corrupted, as ascending positions in the task's data, int64.

        Args:
            split: Whose samples. Of "test" there are none.
            task: Index of the task, where several are poisoned; by default the one named in the constructor.
        """
        task = self.task if task is None else task
        self._check_task(task)
        found = self._splits.find(task, split)
        return torch.zeros(0, dtype=torch.long) if found is None else (found.kinds >= 0).nonzero().squeeze(1)

    def poisoned_classes(self, task: int | None = None) -> dict[int, tuple[str, ...]]:
        """Return the labels of the classes that are poisoned, each with its corruptions.

        Args:
            task: Index of the task, where several are poisoned; by default the one named in the constructor.
        """
        task = self.task if task is None else task
        self._check_task(task)
        found = self._splits.find(task, "train")
        return {} if found is None else dict(found.assignment)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "predict":
            return
        for poison in self.poisons:
            self._check_task(poison.task)
            if stage != "test":
                self._splits.check(poison.task)
        self._sheets_due = stage == "fit"

    @override
    def train_dataloader(self) -> Any:
        if self._sheets_due and self.trainer is not None:
            # not in `setup`: by now a checkpoint has been loaded, and with it the seed of the sequence
            self._sheets_due = False
            directory = run_directory(self.trainer)
            if directory is not None and self.trainer.is_global_zero:
                self.write_contact_sheets(directory)
        return self.sequence.train_dataloader()

    @override
    def val_dataloader(self) -> Any:
        return self.sequence.val_dataloader()

    @override
    def test_dataloader(self) -> Any:
        return self.sequence.test_dataloader()

    def write_contact_sheets(self, directory: str | Path) -> list[Path]:
        """Write ``poison_task_<index>.png`` for each poisoned task: samples as they were beside what they became.

        Args:
            directory: Where to write; made if it is not there.

        Returns:
            The paths of the files. A task of which nothing is corrupted has none.
        """
        paths = []
        for poison in self.poisons:
            name = self.sequence.tasks[poison.task].name
            rows = self._splits.examples(poison.task)
            if rows:
                title = f"task {poison.task} ({name}), {poison.attack}, severity {poison.severity}"
                paths.append(write_contact_sheet(Path(directory) / f"poison_task_{poison.task}.png", rows, title))
        return paths

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self.sequence.state_dict(), "poisons": self._describe()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        poisons = rest.pop("poisons")
        self.sequence.load_state_dict(rest)
        resumes = self.trainer is not None and TaskClock.of(self.trainer) is not None  # a test may have other data
        if resumes and poisons != self._describe():
            raise MisconfigurationException(
                f"The checkpoint is from a run with another poison: it had {poisons}, this one has {self._describe()}."
                " Resume with the same arguments of `PoisonedTask`."
            )

    def _describe(self) -> list[dict[str, Any]]:
        return [poison.describe(self.sequence.seed) for poison in self.poisons]

    def _check_task(self, task: int) -> None:
        count = self.sequence.num_tasks
        if not 0 <= task < count:
            raise ValueError(f"`task={task}` is none of the sequence's {count} tasks, which are counted from 0.")
        if self.sequence.base_of(task).is_iterable():
            raise MisconfigurationException(
                f"Task {task} cannot be poisoned: its data can only be iterated, so no sample can be chosen."
            )
