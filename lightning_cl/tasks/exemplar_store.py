"""Copies of exemplars beside the checkpoints, for streams whose past data goes away."""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.hashing import mix
from lightning_cl.memory.columns import Column, stack_batches, stack_samples
from lightning_cl.memory.exemplar_file import ExemplarFile, adopt_exemplars, find_exemplars, write_exemplars
from lightning_cl.tasks.loader import TaskDataset, as_it_is
from lightning_cl.tasks.random_state import forked_cpu_generators
from lightning_cl.tasks.stream import ReplayStream

FOLDER = "exemplars"
_CHUNK = 1024


class ExemplarStore:
    """The files with copied exemplars, one for each task, that a run has written or was resumed with.

    They lie in the folder ``exemplars`` beside the checkpoints. A file is never changed: when the memory drops some of
    its samples, they stay in it, and checkpoints of an earlier task stay valid.
    """

    def __init__(self) -> None:
        self._records: dict[int, dict[str, Any]] = {}
        self._saved_folder: Path | None = None
        self._files: dict[str, ExemplarFile] = {}

    def prepare(self, trainer: Trainer, stream: ReplayStream, tasks: Iterable[int]) -> None:
        """Make the folder and check the files of a resumed run; to be called on all ranks before the first step.

        Args:
            trainer: The Trainer.
            stream: The tasks.
            tasks: Those that the memory has samples of.

        Raises:
            MisconfigurationException: If the folder cannot be written to, a file is missing or was altered, or the
                samples are of a kind that cannot be copied.
        """
        folder = _folder(trainer)
        current = stream.current_task.index

        def check() -> None:
            _check_writable(folder)
            try:
                _copy(stream.training_view(current), torch.arange(1), stream.seed)
            except TypeError as error:
                raise MisconfigurationException(f"`storage='copy'`: {error} Say `storage='reference'`.") from None

        _on_first_rank(trainer, check)
        for task in tasks:
            if task in self._records:
                path, record = self._open(trainer, task).path, self._records[task]
                _on_first_rank(trainer, partial(adopt_exemplars, path, record, folder))
                if (folder / path.name).is_file():  # else on another machine, without a common disk
                    self._files[record["name"]] = ExemplarFile(folder / path.name)
        self._saved_folder = folder

    def __contains__(self, task: int) -> bool:
        return task in self._records

    def write(self, trainer: Trainer, stream: ReplayStream, task: int, indices: Tensor) -> None:
        """Copy samples of a task, as an evaluation sees them, into a file."""
        folder = _folder(trainer)

        def write() -> dict[str, Any]:
            columns, collated = _copy(stream.training_view(task), indices, stream.seed)
            return write_exemplars(folder, task, indices, columns, collated)

        self._records[task] = _on_first_rank(trainer, write)

    def data(self, trainer: Trainer, stream: ReplayStream, task: int) -> TaskDataset:
        """Return the copied samples of a task; positions are those of the task's own data."""
        file = self._open(trainer, task)
        original = stream.task_data(task, "train")
        collate_fn = as_it_is if file.collated or original is None else original.collate_fn
        return TaskDataset(file, file.rows_by_index(stream.samples_of(task) or 0), collate_fn)

    def state_dict(self) -> dict[str, Any]:
        """Return which files there are, and what must be in them."""
        folder = None if self._saved_folder is None else str(self._saved_folder)
        return {"folder": folder, "files": {task: dict(record) for task, record in self._records.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refer to the files of a checkpoint."""
        self._saved_folder = None if state_dict["folder"] is None else Path(state_dict["folder"])
        self._records = {task: dict(record) for task, record in state_dict["files"].items()}

    def _open(self, trainer: Trainer, task: int) -> ExemplarFile:
        record = self._records[task]
        if record["name"] not in self._files:
            beside = [] if not trainer.ckpt_path else [Path(str(trainer.ckpt_path)).parent / FOLDER]
            folders = [*beside, *([] if self._saved_folder is None else [self._saved_folder]), _folder(trainer)]
            path, problem = None, "Another process did not find the copied exemplars: all machines need one folder."
            try:
                path = find_exemplars(record, list(dict.fromkeys(folders)))
            except (FileNotFoundError, ValueError) as error:
                problem = str(error)
            if not trainer.strategy.reduce_boolean_decision(path is not None, all=True) or path is None:
                raise MisconfigurationException(problem)
            self._files[record["name"]] = ExemplarFile(path)
        return self._files[record["name"]]


def _folder(trainer: Trainer) -> Path:
    """Return the folder beside the checkpoints; a broadcast, so to be called on all ranks."""
    checkpoint = trainer.checkpoint_callback
    directory = checkpoint.dirpath if isinstance(checkpoint, ModelCheckpoint) else None
    directory = directory or os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
    if "://" in str(directory):
        raise MisconfigurationException(
            f"`storage='copy'` keeps its files beside the checkpoints, which must be a local folder, got {directory!r}."
            " Say `storage='reference'`, or give `ModelCheckpoint(dirpath=...)` a local one."
        )
    return Path(directory).absolute() / FOLDER


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MisconfigurationException(
            f"`storage='copy'` cannot write to {str(folder)!r} ({error.strerror or error}). Give"
            " `ModelCheckpoint(dirpath=...)` a folder that can be written to, or say `storage='reference'`."
        ) from None


def _on_first_rank(trainer: Trainer, work: Any) -> Any:
    """Return what the first rank's work gave, on every rank; its exception is raised on every rank."""
    outcome = None
    if trainer.is_global_zero:
        try:
            outcome = work()
        except Exception as error:
            outcome = error
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _copy(view: TaskDataset, indices: Tensor, seed: int) -> tuple[Column, bool]:
    parts = []
    with forked_cpu_generators():
        for positions in torch.split(view.indices[indices], _CHUNK):
            wanted = positions.tolist()
            parts.append(view.samples(wanted, [mix(seed, index) for index in wanted]))
    if all(isinstance(part, list) for part in parts):
        return stack_samples([sample for part in parts for sample in part]), False
    return stack_batches(parts), True
