"""A run's results as files that outlive it."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lightning_cl.metrics import functional

JSON_NAME = "results.json"
CSV_NAME = "accuracy_matrix.csv"


def stream_averages(
    matrix: Tensor, task_aware: Tensor | None = None, mode: Literal["max", "min"] = "max"
) -> dict[str, float]:
    """Compute the figures that sum up a stream.

    Args:
        matrix: The accuracy matrix, or one of any other figure, of shape ``(tasks, tasks)``.
        task_aware: The matrix of task-aware accuracies, if there is one.
        mode: Whether a good figure is high (``"max"``) or low (``"min"``).

    Returns:
        The figures by name, in the order in which they are read; NaN for what one task alone cannot show.

    Example::

        >>> import torch
        >>> averages = stream_averages(torch.tensor([[0.9, torch.nan], [0.5, 0.8]]))
        >>> {name: round(value, 2) for name, value in averages.items()}
        {'average_accuracy': 0.65, 'average_incremental_accuracy': 0.78, 'forgetting': 0.4, 'backward_transfer': -0.4}
    """
    averages = {
        "average_accuracy": functional.average_accuracy(matrix),
        "average_incremental_accuracy": functional.average_incremental_accuracy(matrix),
        "forgetting": functional.forgetting(matrix, mode),
        "backward_transfer": functional.backward_transfer(matrix, mode),
    }
    if task_aware is not None:
        averages["task_aware_average_accuracy"] = functional.average_accuracy(task_aware)
    return {name: plain_number(value) for name, value in averages.items()}


def write_results(directory: str | os.PathLike[str], results: Mapping[str, Any]) -> list[Path]:
    """Write ``results.json``, and ``accuracy_matrix.csv`` if the results hold an accuracy matrix.

    Each file appears whole or not at all: a run that is killed here leaves the file of before.

    Args:
        directory: Where to write; made if it is not there.
        results: What to write, in this order: numbers, strings, tensors, arrays, and lists and dicts of them. NaN and
            infinities become ``null``. The matrix is taken from ``"accuracy_matrix"``, the names of its tasks from
            ``"task_names"`` (else ``task_1``, …).

    Returns:
        The paths of the files written.

    Raises:
        TypeError: If a value has no form in JSON.
        ValueError: If the names do not fit to the matrix.
    """
    directory = Path(directory)
    plain = _to_json(results, "results")
    texts = {JSON_NAME: _json_text(plain)}
    matrix = plain.get("accuracy_matrix")
    if matrix is not None:
        texts[CSV_NAME] = _csv_text(matrix, plain.get("task_names"))
    return [write_atomically(directory / name, text.encode()) for name, text in texts.items()]


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file that is, at any moment, either as it was before or complete.

    Args:
        path: The file; its directory is made if it is not there.
        content: What it shall hold.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def json_of(results: Mapping[str, Any]) -> str:
    """Return results as JSON; see `write_results`."""
    return _json_text(_to_json(results, "results"))


def _json_text(plain: Any) -> str:
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    # A list of numbers on one line: a matrix then looks like one. Strings hold no raw line breaks, so none is touched.
    return re.sub(r"\[\n\s+([^\[\]{}\"]*?)\n\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def _csv_text(matrix: list[list[float | None]], task_names: Sequence[str] | None) -> str:
    names = task_names if task_names is not None else [f"task_{task}" for task in range(1, len(matrix) + 1)]
    if len(names) != len(matrix) or any(len(row) != len(matrix) for row in matrix):
        raise ValueError(
            f"`results` has {len(names)} task names and an accuracy matrix with rows of {[len(row) for row in matrix]} "
            "figures; it takes one name, one row and one column per task."
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after_task", *names])
    for name, row in zip(names, matrix, strict=True):
        writer.writerow([name, *("" if value is None else value for value in row)])
    return text.getvalue()


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        return _to_json(_array_to_list(value), where)
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(
        f"`{where}` is a {type(value).__name__}; "
        "results hold numbers, strings, tensors, arrays, and lists and dicts of them."
    )


def _array_to_list(array: np.ndarray[Any, Any] | np.generic) -> Any:
    # Through the shortest decimal that stands for the same float32: 0.93 and not 0.9300000071525574.
    return array.astype(str).astype(np.float64).tolist() if array.dtype == np.float32 else array.tolist()


def plain_number(value: Tensor) -> float:
    """Return a scalar as the shortest number that stands for it: 0.93 and not 0.9300000071525574."""
    return float(_array_to_list(value.detach().cpu().numpy()))
