"""Which samples of a task moved unlike others of their class, and how well that finds the poisoned ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

_NORMAL = 1.4826  # what a median absolute deviation is multiplied by to be the deviation of a normal distribution


def sample_scores(before: Mapping[str, Tensor], after: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    r"""Compute how far each sample moved, compared with others of its class.

    In a layer a sample moves by :math:`\log (\lVert a - b \rVert / \lVert b \rVert)`, from its outputs :math:`b` before
    to those after: relative to the outputs, since a sample that a corruption made fainter moves little and yet far for
    what it is, and as a logarithm, or one layer of many could decide. Each layer's shifts are standardised within the
    class by median and median absolute deviation, which a minority of poisoned samples hardly changes, and added up
    over the layers.

    Of a layer that has grown in between, such as a head with new classes, what it had before is compared.

    Args:
        before: What each layer put out for each sample, ``(samples, width)``.
        after: The same later.
        labels: The class of each sample, ``(samples,)``.

    Returns:
        Scores ``(samples,)``, float32; higher ones are more suspicious.

    Raises:
        ValueError: If a layer is gone, or has changed its shape in another way.

    Example::

        >>> before, labels = {"fc": torch.ones(5, 2)}, torch.zeros(5, dtype=torch.long)
        >>> after = {"fc": torch.tensor([[1.1, 1.0], [1.2, 1.0], [1.3, 1.0], [1.4, 1.0], [9.0, 1.0]])}
        >>> sample_scores(before, after, labels).argmax()
        tensor(4)
    """
    scores = torch.zeros(len(labels), dtype=torch.float64)
    for layer, old in before.items():
        new = after.get(layer)
        if new is None or len(new) != len(old) or new.shape[1] < old.shape[1]:
            found = "is not called any more" if new is None else f"now gives {tuple(new.shape)}"
            raise ValueError(
                f"Layer {layer!r} gave {tuple(old.shape)} when the task began and {found}, so how far samples moved"
                " cannot be told. Name the layers to compare with `layers=[...]`."
            )
        first, second = old.double(), new[:, : old.shape[1]].double()
        scores += _standardised(_logarithm((second - first).norm(dim=1)) - _logarithm(first.norm(dim=1)), labels)
    return scores.float()


def _logarithm(lengths: Tensor) -> Tensor:
    # a sample that puts out nothing, or does not move, is no further from the others than a thousandth is
    return (lengths + 1e-3 * lengths.quantile(0.5) + 1e-12).log()


def _standardised(values: Tensor, labels: Tensor) -> Tensor:
    """Subtract the median of each class, and divide by its deviation."""
    result = torch.zeros_like(values)
    for label in set(labels.tolist()):
        rows = labels == label
        centred = values[rows] - values[rows].quantile(0.5)
        deviation = _NORMAL * centred.abs().quantile(0.5)
        # of logarithms: where all moved alike to a thousandth there is nothing to tell them by but rounding
        result[rows] = centred / (deviation + 1e-3)
    return result


def precision_at_k(scores: Tensor, poisoned: Tensor) -> Tensor:
    """Compute which share of the k highest scores are poisoned samples, k being the number of those; NaN without any.

    Args:
        scores: One for each sample, ``(samples,)``.
        poisoned: Which samples are poisoned, ``(samples,)``.

    Example::

        >>> precision_at_k(torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.tensor([True, False, True, False]))
        tensor(0.5000)
    """
    if scores.shape != poisoned.shape or scores.ndim != 1:
        raise ValueError(
            f"`scores` and `poisoned` must have one entry a sample, got {tuple(scores.shape)} and"
            f" {tuple(poisoned.shape)}."
        )
    first = scores.argsort(descending=True, stable=True)[: int(poisoned.sum())]
    return poisoned[first].float().mean()
