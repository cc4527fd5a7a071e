"""The nearest-mean head: a sample belongs to the class whose prototype is next to its features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_cl.heads.class_means import ClassMeans


class NearestMeanHead(nn.Module):
    """Score classes by the squared distance of features to their prototypes, as iCaRL does (arXiv 1611.07725).

    The score is minus the squared distance, so the largest score is the nearest prototype; with ``normalize`` that is
    the one of the largest cosine. A class without a prototype has the score minus infinity.

    Args:
        num_classes: How many classes there may be.
        width: Width of the features.
        normalize: Whether features are brought to length 1, as the prototypes then must be.
        temperature: What scores are divided by, for modules that go on to probabilities.

    Example::

        >>> head = NearestMeanHead(num_classes=3, width=2)
        >>> means = ClassMeans(num_classes=3, width=2)
        >>> means.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 2]))
        >>> head.set_means(means)
        >>> head(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
        tensor([[ 0., -inf, -2.],
                [-2., -inf,  0.]])
    """

    def __init__(self, num_classes: int, width: int, normalize: bool = True, temperature: float = 1.0) -> None:
        super().__init__()
        self.normalize = normalize
        self.temperature = temperature
        self.prototypes: Tensor
        self.known: Tensor
        self.register_buffer("prototypes", torch.zeros(num_classes, width))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NearestMeanHead":
        prototypes = self.prototypes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not prototypes.is_meta:  # a network of half precision has features of that, and means of better
            self.prototypes = prototypes.to(self.prototypes.device)
        return self

    def set_means(self, means: ClassMeans) -> None:
        """Take the means of a pass as prototypes; classes without samples keep what they have."""
        if means.normalize != self.normalize:
            raise ValueError(f"`means` has `normalize={means.normalize}`, the head has `normalize={self.normalize}`.")
        seen = means.counts > 0
        fresh = means.compute().to(self.prototypes)
        seen = seen.to(self.known.device)
        self.prototypes = torch.where(seen[:, None], fresh, self.prototypes)
        self.known = self.known | seen

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores.

        Args:
            features: Of shape ``(batch, width)``, or ``(batch, width, height, columns)`` where the head stands in for
                a 1x1 convolution.

        Returns:
            Of shape ``(batch, classes)``, or ``(batch, classes, height, columns)`` with the same scores everywhere; in
            single precision at least.
        """
        # autocast leaves double precision alone, and squares of features far from zero need it
        precision = torch.float32 if features.device.type == "mps" else torch.float64
        rows, prototypes = pool_positions(features).to(precision), self.prototypes.to(precision)
        if rows.dim() != 2:
            raise ValueError("`features` must have the shape (batch, width) or (batch, width, height, columns).")
        if self.normalize:
            # of two vectors of length 1, and the same for features that are scaled
            scores = 2 * (functional.normalize(rows, dim=1) @ prototypes.t()) - 2
        else:
            lengths = rows.square().sum(1, keepdim=True) + prototypes.square().sum(1)
            scores = 2 * (rows @ prototypes.t()) - lengths
        scores = (scores / self.temperature).masked_fill(~self.known, -float("inf"))
        if features.dtype != torch.float64:
            scores = scores.float()
        if features.dim() == 4:
            scores = scores[:, :, None, None].expand(-1, -1, features.size(2), features.size(3))
        return scores


def pool_positions(features: Tensor) -> Tensor:
    """Return one row a sample: features as they are, those of an image's positions averaged."""
    return features.flatten(2).mean(2) if features.dim() == 4 else features
