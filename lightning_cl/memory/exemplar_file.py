"""Copies of a task's exemplars in one memory-mapped file."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_cl.memory.columns import Column, take_batch, take_samples

_CHUNK = 1 << 20


class ExemplarFile(Dataset[Any]):
    """The copied samples of one task, read from the disk where they are asked for.

    Args:
        path: A file that `write_exemplars` wrote.
    """

    deterministic = True  # there is nothing random in it: task sequences spare it the seeding

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        self.indices: Tensor = content["indices"]
        self.collated: bool = content["collated"]
        self._columns: Column = content["columns"]

    def __len__(self) -> int:
        return len(self.indices)

    @override
    def __getitem__(self, row: int) -> Any:
        if not self.collated:
            return take_samples(self._columns, [row])[0]
        return take_batch(self._columns, torch.tensor([row]))

    def __getitems__(self, rows: Sequence[int] | Tensor) -> Any:
        """Return samples, or the collated batch that the data set they were copied from would make of them."""
        if self.collated:
            return take_batch(self._columns, torch.as_tensor(rows, dtype=torch.long))
        return take_samples(self._columns, rows.tolist() if isinstance(rows, Tensor) else list(rows))

    def rows_by_index(self, samples: int) -> Tensor:
        """Return, for each of a task's samples, its row in the file; -1 where it was not copied."""
        rows = torch.full((samples,), -1, dtype=torch.long)
        rows[self.indices] = torch.arange(len(self.indices))
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # loader workers that are spawned map the file anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def write_exemplars(folder: Path, task: int, indices: Tensor, columns: Column, collated: bool) -> dict[str, Any]:
    """Write one task's exemplars, whole or not at all, and return what a checkpoint has to know of the file.

    The name has the hash of the content in it, so a file is never overwritten with anything else, and the checkpoints
    of a run that was resumed stay valid.

    Args:
        folder: Where to write.
        task: Index of the task.
        indices: Index of each sample in the task's data.
        columns: The samples.
        collated: Whether they are rows of batches, not samples.
    """
    content = {"indices": indices.clone(), "collated": collated, "columns": columns}
    temporary = folder / f".task_{task}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        digest, size = _digest(temporary), temporary.stat().st_size
        name = f"task_{task}-{digest[:12]}.pt"
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": name, "sha256": digest, "bytes": size}


def find_exemplars(record: dict[str, Any], folders: Sequence[Path]) -> Path:
    """Return the file that a checkpoint refers to, after comparing its content.

    Raises:
        FileNotFoundError: If it is in none of the folders.
        ValueError: If its content is not what was written.
    """
    candidates: list[Path] = [folder / record["name"] for folder in folders if (folder / record["name"]).is_file()]
    if not candidates:
        raise FileNotFoundError(
            f"The copied exemplars {record['name']!r} are missing. They were looked for in"
            f" {', '.join(str(folder) for folder in folders)}. Keep the folder `exemplars` beside the checkpoint."
        )
    intact = [path for path in candidates if _is_intact(path, record)]
    if intact:
        return intact[0]
    raise ValueError(
        f"The copied exemplars {str(candidates[0])!r} are not those that the checkpoint was written with: the file is"
        " damaged or was altered. Put the original back, or resume from a checkpoint that does not need it."
    )


def adopt_exemplars(path: Path, record: dict[str, Any], folder: Path) -> None:
    """Bring a file into another run's folder, so that it stays complete by itself; by a link where that is possible."""
    adopted = folder / path.name
    if adopted.exists() and _is_intact(adopted, record):
        return
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(adopted)
    finally:
        temporary.unlink(missing_ok=True)


def _is_intact(path: Path, record: dict[str, Any]) -> bool:
    return bool(path.stat().st_size == record["bytes"] and _digest(path) == record["sha256"])


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
