"""The place where a data set keeps its transform."""

import copy
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset


def with_transform(dataset: Dataset[Any], transform: Callable[..., Any] | None) -> Dataset[Any]:
    """Return a shallow copy of a data set with another transform.

    Args:
        dataset: A data set with an attribute ``transform``.
        transform: What takes its place.
    """
    view: Any = copy.copy(dataset)
    view.transform = transform
    # torchvision's data sets apply this wrapper, not the attribute above
    if getattr(view, "transforms", None) is not None and hasattr(view.transforms, "transform"):
        view.transforms = copy.copy(view.transforms)
        view.transforms.transform = transform
    return view  # type: ignore[no-any-return]
