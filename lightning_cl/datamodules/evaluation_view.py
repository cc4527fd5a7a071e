"""Training samples as an evaluation sees them: without random augmentation."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_cl.datamodules.poisoned_dataset import PoisonedDataset
from lightning_cl.datamodules.transform_slot import with_transform


def evaluation_view(
    dataset: Dataset[Any],
    evaluation_set: Callable[[], Dataset[Any] | None],
    eval_transform: Callable[..., Any] | None,
) -> Dataset[Any]:
    """Return a training data set whose samples pass through the evaluation transform.

    In this order: what the data set itself offers (``evaluation_view()``), ``eval_transform``, the transform of an
    evaluation set of the same class, and else, with a warning, the data set as it is.

    Args:
        dataset: The training data; `Subset`, `ConcatDataset` and `PoisonedDataset` are looked through.
        evaluation_set: Returns the base's evaluation data, if there are any; called only where they are needed.
        eval_transform: The transform that the user named.

    Raises:
        MisconfigurationException: If there is an ``eval_transform``, but no place to put it.
    """
    own = getattr(dataset, "evaluation_view", None)
    if callable(own):
        return own()  # type: ignore[no-any-return]
    if isinstance(dataset, PoisonedDataset):
        return dataset.over(evaluation_view(dataset.source, evaluation_set, eval_transform))
    if isinstance(dataset, Subset):
        view = copy.copy(dataset)
        view.dataset = evaluation_view(dataset.dataset, evaluation_set, eval_transform)
        return view
    if isinstance(dataset, ConcatDataset):
        joined = copy.copy(dataset)
        joined.datasets = [evaluation_view(part, evaluation_set, eval_transform) for part in dataset.datasets]
        return joined
    if not hasattr(dataset, "transform"):
        if eval_transform is not None:
            raise MisconfigurationException(
                f"`eval_transform` has no place: {type(dataset).__name__} has no attribute `transform` to put it in."
                " Give the data set such an attribute, or a method `evaluation_view()` that returns it without"
                " augmentation."
            )
        return dataset
    if eval_transform is not None:
        return with_transform(dataset, eval_transform)
    if dataset.transform is None:
        return dataset
    evaluated = evaluation_set()
    for candidate in () if evaluated is None else _inner(evaluated):
        if type(candidate) is type(dataset):
            return with_transform(dataset, candidate.transform)  # type: ignore[attr-defined]
    rank_zero_warn(
        f"Samples of {type(dataset).__name__} are evaluated under the training transform, because no evaluation"
        " transform was found. Name one with `eval_transform=...`."
    )
    return dataset


def _inner(dataset: Dataset[Any]) -> Iterator[Dataset[Any]]:
    if isinstance(dataset, Subset):
        yield from _inner(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _inner(part)
    else:
        yield dataset
