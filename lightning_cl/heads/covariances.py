"""What is done to covariance matrices before distances are taken with them."""

import torch
from torch import Tensor

# share of a feature's variance that the features before it must leave open
_LEAST_OPEN = 1e-13

# share of the mean variance that is added where a matrix has no inverse
LEAST_JITTER = 1e-8
_MOST_JITTER = 1e16  # more than any finite matrix needs


def shrink(covariances: Tensor, diagonal: float, off_diagonal: float = 0.0) -> Tensor:
    """Add a part of its mean variance to the diagonal of each matrix, and of its mean covariance to the rest.

    ``C + diagonal * mean(variances) * I + off_diagonal * mean(covariances) * (1 - I)``, as FeCAM (arXiv 2309.14062) and
    AdaGauss (arXiv 2409.18265) do.

    Args:
        covariances: Of shape ``(..., width, width)``.
        diagonal: Share of the mean variance.
        off_diagonal: Share of the mean covariance of two features.

    Example::

        >>> shrink(torch.tensor([[4.0, 2.0], [2.0, 3.0]]), diagonal=3)
        tensor([[14.5000,  2.0000],
                [ 2.0000, 13.5000]])
    """
    width = covariances.shape[-1]
    identity = torch.eye(width, dtype=covariances.dtype, device=covariances.device)
    variances = covariances.diagonal(dim1=-2, dim2=-1).sum(-1)
    shrunk = covariances + diagonal * (variances / width)[..., None, None] * identity
    if off_diagonal != 0 and width > 1:
        mean = (covariances.sum((-2, -1)) - variances) / (width * (width - 1))
        shrunk = shrunk + off_diagonal * mean[..., None, None] * (1 - identity)
    return shrunk


def correlation(covariances: Tensor) -> Tensor:
    """Return the matrices of correlations; a feature that does not vary has none with the others.

    Args:
        covariances: Of shape ``(..., width, width)``.

    Example::

        >>> correlation(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    scales = torch.where(variances > 0, variances.clamp_min(0).rsqrt(), torch.zeros_like(variances))
    correlations = scales[..., :, None] * covariances * scales[..., None, :]
    identity = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    return torch.where(identity > 0, identity, correlations)


def cholesky(covariances: Tensor) -> Tensor:
    """Return lower Cholesky factors, also of matrices that are not positive definite.

    A feature counts as open if the others do not give it away up to rounding. Where one is not, as with fewer samples
    than features, the smallest of 1e-8, 1e-7, ... times the mean variance is added to the variances with which all are.
    A matrix of zeros takes the mean variance of the other matrices, or 1.

    Args:
        covariances: Of shape ``(matrices, width, width)``; their entries must be finite.

    Example::

        >>> cholesky(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]], dtype=torch.float64))[0]
        tensor([[2.0000e+00, 0.0000e+00],
                [0.0000e+00, 1.4142e-04]], dtype=torch.float64)
    """
    factors, failed = _factors(covariances)
    scales = scales_of(covariances.diagonal(dim1=-2, dim2=-1).mean(-1))
    identity = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    jitter = LEAST_JITTER
    while bool(failed.any()) and jitter < _MOST_JITTER:
        factors[failed], still = _factors(covariances[failed] + jitter * scales[failed, None, None] * identity)
        failed[failed.clone()] = still
        jitter *= 10
    return factors


def scales_of(variances: Tensor) -> Tensor:
    """Return the mean variance of each matrix; where it is zero, that of the other matrices, or 1.

    Args:
        variances: The mean variances, ``(matrices,)``.
    """
    others = variances[variances > 0]
    return torch.where(variances > 0, variances, others.mean() if len(others) else torch.ones_like(variances))


def square_root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semi-definite matrix, ``(width, width)``.

    Example::

        >>> square_root(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
        tensor([[2., 0.],
                [0., 0.]])
    """
    if not bool(covariance.isfinite().all()):  # of features that diverged: what is made of it shall show that
        return torch.full_like(covariance, torch.nan)
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


def _factors(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return Cholesky factors, and of which matrices there is none that distances could be taken with."""
    factors, info = torch.linalg.cholesky_ex(covariances)
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    remaining = factors.diagonal(dim1=-2, dim2=-1).square()
    singular = ~(remaining > _LEAST_OPEN * variances).all(-1)
    return factors, (info != 0) | singular
