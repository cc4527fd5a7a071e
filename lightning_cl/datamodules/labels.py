"""Find the labels of any map-style data set without touching its samples, if that is possible."""

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_cl.tasks import TaskDataset
from lightning_cl.tasks.batches import BatchStructure, as_labels, describe
from lightning_cl.tasks.random_state import forked_cpu_generators

LABEL_ATTRIBUTES = ("targets", "labels")


def known_labels(dataset: Dataset[Any]) -> Tensor | None:
    """Return labels that a data set knows of itself, or ``None``.

    They are its ``targets`` or ``labels`` (with its ``target_transform`` applied, as its samples have them), also
    through `Subset` and `ConcatDataset`, or the second tensor of a `TensorDataset`.
    """
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices, dtype=torch.long)]
    if isinstance(dataset, ConcatDataset):
        parts = [known_labels(part) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    if type(dataset) is TensorDataset:
        return _integers(dataset.tensors[1]) if len(dataset.tensors) > 1 else None
    for name in LABEL_ATTRIBUTES:
        labels = _integers(getattr(dataset, name, None))
        if labels is not None and len(labels) == len(dataset):  # type: ignore[arg-type]
            transform = getattr(dataset, "target_transform", None)
            return labels if transform is None else _integers([transform(label) for label in labels.tolist()])
    return None


def known_classes(data: TaskDataset | None) -> tuple[int, ...] | None:
    """Return the classes in a task's data, or ``None`` if its labels are not known without reading every sample."""
    labels = None if data is None else known_labels(data.dataset)
    return None if data is None or labels is None else tuple(sorted(set(labels[data.indices].tolist())))


def read_labels(dataset: Dataset[Any], structure: BatchStructure) -> Tensor:
    """Return the labels of a data set, reading every sample once if it does not know them.

    Raises:
        ValueError: If a sample's label cannot be told.
    """
    labels = known_labels(dataset) if structure.target_key is None else None
    if labels is not None:
        return labels
    count = len(dataset)  # type: ignore[arg-type]
    silent = getattr(rank_zero_only, "rank", 0) > 0
    # `rich.progress.track` is a generator: one that a sample's error leaves open is closed whenever Python collects it,
    # and where that is in Rich's own thread, it waits for itself
    with forked_cpu_generators(), Progress(transient=True, disable=silent) as progress:  # random transforms draw
        bar = progress.add_task("Reading labels", total=count)
        labels = torch.empty(count, dtype=torch.long)
        for index in range(count):
            labels[index] = _label(structure.find_targets(dataset[index]))
            progress.advance(bar)
    return labels


def labels_of_task(data: TaskDataset, structure: BatchStructure, read: bool) -> Tensor | None:
    """Return the labels of a task's samples; where they are not known, read every sample once, or return ``None``."""
    labels = known_labels(data.dataset) if structure.target_key is None else None
    if labels is not None:
        return labels[data.indices]
    return read_labels(Subset(data.dataset, data.indices.tolist()), structure) if read else None


def _label(target: Any) -> int:
    label = _integers([target])
    if label is None:
        raise ValueError(
            f"Targets are no class labels: expected one integer a sample, got {describe(target)}."
            " Name the labels with `target_key=...` (a key, a dotted key or a position)."
        )
    return int(label)


def _integers(values: Any) -> Tensor | None:
    try:
        return as_labels(values)
    except (TypeError, ValueError, RuntimeError):  # names, boxes, masks, methods and whatever else bears the name
        return None
