"""The one place that knows where inputs and targets stand in a batch of the user's making."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TARGET_NAMES = ("label", "labels", "target", "targets", "y")
INPUT_NAMES = ("image", "images", "pixel_values", "input", "inputs", "x", "input_ids", "features", "data")


@dataclass(frozen=True)
class BatchStructure:
    """Find inputs and targets in a batch: a tuple, a list or a dict.

    Args:
        inputs: Key, dotted key or position of the inputs; found out if ``None``.
        target_key: Key, dotted key or position of the targets; found out if ``None``.
    """

    inputs: str | int | None = None
    target_key: str | int | None = None

    def find_targets(self, batch: Any) -> Any:
        """Return the targets of a batch, or of one sample.

        Raises:
            ValueError: If there is no way to tell, naming `target_key` and showing the batch's structure.
        """
        if self.target_key is not None:
            return _look_up(batch, self.target_key, "target_key")
        if isinstance(batch, Mapping):
            found = [name for name in TARGET_NAMES if name in batch]
            if len(found) == 1:
                return batch[found[0]]
        elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
            return batch[1]
        raise ValueError(
            f"Cannot tell which part of a batch holds the targets: the batch is {describe(batch)}."
            f" Name it with `target_key=...` (a key, a dotted key or a position); without it, position 1 of a tuple or"
            f" one of the keys {', '.join(TARGET_NAMES)} is taken."
        )

    def find_inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch, or of one sample.

        Raises:
            ValueError: If there is no way to tell, naming `inputs` and showing the batch's structure.
        """
        if self.inputs is not None:
            return _look_up(batch, self.inputs, "inputs")
        if isinstance(batch, Mapping):
            named = [name for name in INPUT_NAMES if name in batch]
            others = [key for key in batch if key not in TARGET_NAMES and key != self.target_key]
            for keys in (named, others):
                if len(keys) == 1:
                    return batch[keys[0]]
        elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 0:
            return batch[0]
        elif isinstance(batch, Tensor):
            return batch
        raise ValueError(
            f"Cannot tell which part of a batch holds the inputs: the batch is {describe(batch)}."
            " Name it with `inputs=...` (a key, a dotted key or a position)."
        )

    def without_targets(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a dict batch without its targets."""
        targets = self.find_targets(batch)
        return {key: value for key, value in batch.items() if value is not targets}


def replace_part(batch: Any, old: Any, new: Any) -> Any:
    """Return a batch or sample with the object ``old`` exchanged for ``new``, wherever it stands."""
    if batch is old:
        return new
    if isinstance(batch, Mapping):
        return {key: replace_part(value, old, new) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(replace_part(value, old, new) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(replace_part(value, old, new) for value in batch)
    return batch


def join_rows(batches: Sequence[Any], counts: Sequence[int]) -> Any:
    """Return one batch with the rows of several batches of the same structure, one after another.

    Args:
        batches: The batches.
        counts: How many rows each has.

    Raises:
        ValueError: If the batches do not go together, showing the structure of the first two.
    """
    first = batches[0]
    try:
        types = {type(batch) for batch in batches}
        if len(types) > 1 and not types <= {list, tuple}:
            raise TypeError("batches of different types")
        if isinstance(first, Tensor):
            return torch.cat([batch.to(first.device) for batch in batches])
        if isinstance(first, Mapping):
            return {key: join_rows([batch[key] for batch in batches], counts) for key in first}
        if isinstance(first, tuple) and hasattr(first, "_fields"):
            return type(first)(*(join_rows(part, counts) for part in zip(*batches, strict=True)))
        if isinstance(first, (list, tuple)):
            if all(_lists_rows(batch, count) for batch, count in zip(batches, counts, strict=True)):
                return type(first)(row for batch in batches for row in batch)
            return type(first)(join_rows(part, counts) for part in zip(*batches, strict=True))
    except (RuntimeError, ValueError, KeyError, TypeError):
        shown = " and ".join(describe(batch) for batch in batches[:2])
        raise ValueError(f"Samples of different tasks make no common batch: {shown}.") from None
    return first


def count_rows(batch: Any) -> int | None:
    """Return the rows of a batch, as its first tensor has them; ``None`` if it has none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim > 0 else None
    if isinstance(batch, (Mapping, list, tuple)):
        parts = batch.values() if isinstance(batch, Mapping) else batch
        return next((rows for rows in map(count_rows, parts) if rows is not None), None)
    return None


def take_rows(batch: Any, rows: slice | list[int], count: int) -> Any:
    """Return some rows of a batch that has ``count`` of them; what has another length stays as it is."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim > 0 and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows, count) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(take_rows(part, rows, count) for part in batch))
    if isinstance(batch, (list, tuple)):
        if _lists_rows(batch, count):
            return batch[rows] if isinstance(rows, slice) else type(batch)(batch[row] for row in rows)
        return type(batch)(take_rows(part, rows, count) for part in batch)
    return batch


def kind_of(sample: Any) -> Any:
    """Return something that is equal for samples of one kind: the types of a sample and of its parts."""
    if isinstance(sample, Mapping):
        return type(sample), tuple((key, kind_of(value)) for key, value in sorted(sample.items(), key=str))
    if isinstance(sample, tuple):
        return type(sample), tuple(kind_of(part) for part in sample)
    return type(sample)


def _lists_rows(batch: Sequence[Any], count: int) -> bool:
    # strings, detections and ragged tensors stand in a list with an entry per row, other parts have their rows inside
    return len(batch) == count and not any(_has_rows(part, count) for part in batch)


def _has_rows(part: Any, count: int) -> bool:
    if isinstance(part, Mapping):
        return any(_has_rows(value, count) for value in part.values())
    return isinstance(part, (Tensor, list, tuple)) and len(part) == count


def describe(batch: Any, depth: int = 3) -> str:
    """Describe the structure of a batch in one line, for error messages.

    Example::

        >>> describe({"image": torch.zeros(2, 3), "y": [1, 2]})
        "{'image': Tensor(2, 3) float32, 'y': [int, int]}"
    """
    if isinstance(batch, Tensor):
        return f"Tensor{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if depth == 0:
        return type(batch).__name__
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value, depth - 1)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        inner = ", ".join(describe(value, depth - 1) for value in batch[:4]) + (", ..." if len(batch) > 4 else "")
        return f"({inner})" if isinstance(batch, tuple) else f"[{inner}]"
    return type(batch).__name__


def _look_up(batch: Any, key: str | int, argument: str) -> Any:
    value = batch
    for part in key.split(".") if isinstance(key, str) else [key]:
        try:
            if isinstance(value, Tensor):
                raise TypeError("a tensor has rows, no parts")
            position = int(part) if isinstance(value, Sequence) else part
            value = value[position]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"`{argument}={key!r}` names no part of a batch, which is {describe(batch)}.") from None
    return value


def as_labels(targets: Any) -> Tensor:
    """Return class labels as a 1-D integer tensor.

    Raises:
        ValueError: If the targets are no class labels.
    """
    labels = targets if isinstance(targets, Tensor) else torch.as_tensor(targets)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.ndim != 1:
        raise ValueError(
            f"Targets are no class labels: expected one integer a sample, got {describe(labels)}."
            " Name the labels with `target_key=...`, or measure with `ContinualMetrics(monitor=...)`."
        )
    return labels.long()
