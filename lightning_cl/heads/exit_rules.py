"""Where a sample leaves a network with several exits."""

import math
from typing import Literal

import torch
from torch import Tensor

Confidence = Literal["max_softmax", "entropy", "patience"]

_LEAST = -1e4  # a class that is ruled out has no gradient, and must not make one that is no number


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute logarithms of softened probabilities that are all finite, in single precision at least.

    Args:
        logits: Of shape ``(..., classes)``; a class may be ruled out with minus infinity.
        temperature: What logits are divided by.

    Example::

        >>> log_probabilities(torch.tensor([0.0, -torch.inf]))
        tensor([     0., -10000.])
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (precise / temperature).log_softmax(-1).clamp(min=_LEAST)


def confidence_of(logits: Tensor, confidence: Literal["max_softmax", "entropy"] = "max_softmax") -> Tensor:
    """Compute how sure each row of logits is, from 0 to 1.

    Args:
        logits: Of shape ``(..., classes)``; a class may be ruled out with minus infinity.
        confidence: The largest probability, or 1 less the entropy as a share of the largest possible.

    Returns:
        Of shape ``(...)``.

    Example::

        >>> confidence_of(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([0.5000, 1.0000])
        >>> confidence_of(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), "entropy")
        tensor([0., 1.])
    """
    probabilities = logits.float().softmax(-1)
    if confidence == "max_softmax":
        return probabilities.amax(-1)
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return 1 - entropy / math.log(max(2, logits.shape[-1]))


def patience_of(predictions: Tensor, exits: int | None = None) -> Tensor:
    """Compute how often each prediction was repeated, as a share of how often it could be (arXiv 2006.04152).

    Args:
        predictions: The class that each exit predicts, of shape ``(samples, exits)``.
        exits: How many exits there are, where the later ones have not predicted yet.

    Returns:
        Of the same shape: 0 at the first exit and wherever the prediction changes, 1 at the last if all agree.

    Example::

        >>> patience_of(torch.tensor([[3, 3, 3], [3, 1, 1]]))
        tensor([[0.0000, 0.5000, 1.0000],
                [0.0000, 0.0000, 0.5000]])
    """
    repeats = torch.zeros_like(predictions)
    for position in range(1, predictions.shape[1]):
        same = predictions[:, position] == predictions[:, position - 1]
        repeats[:, position] = (repeats[:, position - 1] + 1) * same
    return repeats / max(1, (exits or predictions.shape[1]) - 1)


def confidences_by_exit(logits: Tensor, confidence: Confidence = "max_softmax") -> Tensor:
    """Compute how sure each exit is of each sample, where every exit was asked.

    Args:
        logits: What the exits answer, of shape ``(samples, exits, classes)``.
        confidence: What sure is.

    Returns:
        Of shape ``(samples, exits)``.

    Example::

        >>> confidences_by_exit(torch.tensor([[[0.0, 0.0], [0.0, 9.0]]])).round(decimals=1)
        tensor([[0.5000, 1.0000]])
    """
    return patience_of(logits.argmax(-1)) if confidence == "patience" else confidence_of(logits, confidence)


def first_confident(confidences: Tensor, threshold: float) -> Tensor:
    """Find the exit that each sample takes: the first that is surer than the threshold, else the last.

    Args:
        confidences: Of shape ``(samples, exits)``.
        threshold: From 0, where all leave at the first exit that is sure at all, to 1, where all go to the end.

    Returns:
        Positions of exits, of shape ``(samples,)``.

    Example::

        >>> first_confident(torch.tensor([[0.6, 0.9, 0.8], [0.2, 0.3, 0.4]]), threshold=0.5)
        tensor([0, 2])
    """
    sure = confidences > threshold
    sure[:, -1] = True
    return sure.int().argmax(dim=1)
