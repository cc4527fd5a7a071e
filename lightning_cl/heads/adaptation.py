"""Bring the Gaussians of past classes along when the features change."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_cl.heads.class_gaussians import ClassGaussians
from lightning_cl.heads.covariances import shrink

Adaptation = Literal["none", "mean", "diag", "full"]


@torch.no_grad()
def adapt_gaussians(
    gaussians: ClassGaussians,
    adapter: Callable[[Tensor], Tensor],
    adapt: Adaptation = "full",
    samples: int = 10_000,
    generator: torch.Generator | None = None,
    shrinkage: float = 0.0,
) -> ClassGaussians:
    """Return the Gaussians that classes have after an adapter from old features to new ones (arXiv 2409.18265).

    Of each class, samples are drawn from its Gaussian and pushed through the adapter; their mean and covariance are the
    new ones, up to a sampling error of about ``1 / sqrt(samples)``. Counts of samples stay.

    Args:
        gaussians: With full covariances; left as they are.
        adapter: From features ``(batch, width)`` to features of the same shape.
        adapt: "none"; "mean" moves each mean to where the adapter puts it and keeps the covariances; "diag" takes the
            samples' means and variances and keeps the correlations; "full" takes means and covariances.
        samples: How many are drawn of each class; more than the width.
        generator: What they are drawn from, on the CPU.
        shrinkage: Of the samples' covariances: this much of the mean variance is added to each variance.

    Example::

        >>> gaussians = ClassGaussians(num_classes=1, width=2)
        >>> gaussians.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), torch.zeros(4).long())
        >>> adapt_gaussians(gaussians, lambda features: 2 * features + 1, adapt="mean").means
        tensor([[1., 1.]], dtype=torch.float64)
    """
    adapted = copy.deepcopy(gaussians)
    labels = gaussians.known.nonzero().flatten()
    if adapt == "none" or len(labels) == 0:
        return adapted
    covariances = gaussians.covariances()[labels]
    if adapt == "mean":
        old = gaussians.means[labels]
        adapted.put(labels, adapter(old.float()).to(old), covariances)
        return adapted
    means, fresh = [], []
    for label in labels.tolist():
        drawn = gaussians.draw(label, samples, generator or torch.default_generator)
        moved = adapter(drawn.float()).to(drawn)
        means.append(moved.mean(0))
        fresh.append(moved.t().cov())
    covariances = torch.stack(fresh) if adapt == "full" else _rescaled(covariances, torch.stack(fresh))
    adapted.put(labels, torch.stack(means), shrink(covariances, shrinkage))
    return adapted


def _rescaled(covariances: Tensor, others: Tensor) -> Tensor:
    """Return covariances with the variances of others and their own correlations."""
    before, after = (matrices.diagonal(dim1=1, dim2=2) for matrices in (covariances, others))
    scales = (after / before.where(before > 0, 1)).sqrt()
    return covariances * scales[:, :, None] * scales[:, None, :]
