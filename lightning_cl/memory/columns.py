"""Samples of any structure as columns: one tensor for each part of a sample, fit for one file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Column = dict[str, Any]

_COPIED = "Only tensors, numpy arrays, numbers and strings, in tuples, lists and dicts, can be copied;"
_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}


def stack_samples(samples: Sequence[Any]) -> Column:
    """Return samples of one structure as columns of plain Python and tensors.

    Args:
        samples: Tensors, numpy arrays, numbers, strings, and tuples, lists and dicts of them.

    Raises:
        TypeError: If a sample holds anything else.

    Example::

        >>> columns = stack_samples([(torch.zeros(2), 3), (torch.ones(2), 5)])
        >>> take_samples(columns, [1])
        [(tensor([1., 1.]), 5)]
    """
    first, kind = samples[0], type(samples[0])
    alike = all(type(sample) is kind for sample in samples)
    if alike and kind in _NUMBERS:
        return {"kind": kind.__name__, "values": torch.tensor(samples, dtype=_NUMBERS[kind])}
    if alike and isinstance(first, np.ndarray):
        return {"kind": "array", "values": stack_samples([_as_tensor(sample) for sample in samples])}
    if alike and isinstance(first, np.generic):
        return {"kind": "scalar", "values": stack_samples([_as_tensor(sample) for sample in samples])}
    if alike and kind is Tensor and all(s.shape == first.shape and s.dtype == first.dtype for s in samples):
        return {"kind": "tensor", "values": torch.stack([sample.detach().cpu() for sample in samples])}
    if alike and kind in (tuple, list) and len({len(sample) for sample in samples}) == 1:
        return {"kind": kind.__name__, "parts": [stack_samples(part) for part in zip(*samples, strict=True)]}
    if alike and kind is dict and all(sample.keys() == first.keys() for sample in samples):
        return {"kind": "dict", "parts": {key: stack_samples([sample[key] for sample in samples]) for key in first}}
    return {"kind": "each", "values": [_plain(sample) for sample in samples]}


def _as_tensor(value: Any) -> Tensor:
    array = np.array(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{_COPIED} a sample holds a numpy array of {array.dtype}.")
    return torch.from_numpy(array.reshape(np.shape(value)))


def _plain(value: Any) -> Any:
    """Return a copy of what a file can hold as it is."""
    if type(value) is Tensor:
        return value.detach().cpu().clone()
    if type(value) in (tuple, list):
        return type(value)(_plain(part) for part in value)
    if type(value) is dict:
        return {key: _plain(part) for key, part in value.items()}
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"{_COPIED} a sample holds {type(value).__name__}.")


def stack_batches(batches: Sequence[Any]) -> Column:
    """Return collated batches (tensors, in tuples, lists and dicts) as columns, one row a sample."""
    first = batches[0]
    if isinstance(first, Tensor):
        return {"kind": "tensor", "values": torch.cat([batch.detach().cpu() for batch in batches])}
    if type(first) in (tuple, list):
        parts = [stack_batches(part) for part in zip(*batches, strict=True)]
        return {"kind": type(first).__name__, "parts": parts}
    if isinstance(first, Mapping):
        return {"kind": "dict", "parts": {key: stack_batches([batch[key] for batch in batches]) for key in first}}
    raise TypeError(f"{_COPIED} a batch holds {type(first).__name__}.")


def take_samples(column: Column, rows: Sequence[int]) -> list[Any]:
    """Return samples as `stack_samples` got them."""
    kind = column["kind"]
    if kind in ("tuple", "list"):
        parts = zip(*(take_samples(part, rows) for part in column["parts"]), strict=True)
        return [tuple(part) if kind == "tuple" else list(part) for part in parts]
    if kind == "dict":
        columns = {key: take_samples(part, rows) for key, part in column["parts"].items()}
        return [{key: values[row] for key, values in columns.items()} for row in range(len(rows))]
    if kind in ("array", "scalar"):
        arrays = [value.numpy() for value in take_samples(column["values"], rows)]
        return arrays if kind == "array" else [array[()] for array in arrays]
    if kind == "each":  # copied, lest a transform that works in place changes what is kept
        return [_plain(column["values"][row]) for row in rows]
    taken = column["values"][torch.as_tensor(rows, dtype=torch.long)]
    return list(taken) if kind == "tensor" else taken.tolist()


def take_batch(column: Column, rows: Tensor) -> Any:
    """Return rows as one collated batch, of columns that `stack_batches` made."""
    if column["kind"] in ("tuple", "list"):
        parts = [take_batch(part, rows) for part in column["parts"]]
        return tuple(parts) if column["kind"] == "tuple" else parts
    if column["kind"] == "dict":
        return {key: take_batch(part, rows) for key, part in column["parts"].items()}
    return column["values"].index_select(0, rows)
