"""Samples of any structure as columns: one tensor for each part of a sample, fit for one file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Column = dict[str, Any]

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
    first = samples[0]
    kind = type(first)
    if any(type(sample) is not kind for sample in samples):
        names = sorted({type(sample).__name__ for sample in samples})
        raise TypeError(f"Samples must have one structure to be copied, got {' and '.join(names)} in one place.")
    if kind in _NUMBERS:
        return {"kind": kind.__name__, "values": torch.tensor(samples, dtype=_NUMBERS[kind])}
    if kind is str:
        return {"kind": "each", "values": list(samples)}
    if isinstance(first, np.ndarray):
        return {"kind": "array", "values": stack_samples([torch.from_numpy(np.array(sample)) for sample in samples])}
    if isinstance(first, np.generic):
        return {"kind": "scalar", "values": stack_samples([torch.as_tensor(sample) for sample in samples])}
    if isinstance(first, Tensor):
        if all(sample.shape == first.shape and sample.dtype == first.dtype for sample in samples):
            return {"kind": "tensor", "values": torch.stack([sample.detach().cpu() for sample in samples])}
        return {"kind": "each", "values": [sample.detach().cpu().clone() for sample in samples]}
    if kind in (tuple, list) and len({len(sample) for sample in samples}) == 1:
        return {"kind": kind.__name__, "parts": [stack_samples(part) for part in zip(*samples, strict=True)]}
    if isinstance(first, Mapping) and len({tuple(sample) for sample in samples}) == 1:
        return {"kind": "dict", "parts": {key: stack_samples([sample[key] for sample in samples]) for key in first}}
    raise TypeError(
        f"Only tensors, numpy arrays, numbers and strings, in tuples, lists and dicts, can be copied; a sample holds"
        f" {kind.__name__}."
    )


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
    raise TypeError(f"Only tensors, in tuples, lists and dicts, can be copied; a batch holds {type(first).__name__}.")


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
    if kind == "each":
        return [column["values"][row] for row in rows]
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
