"""The anti-collapse loss: features keep spreading out in all their directions."""

import torch
from torch import Tensor


def anti_collapse_loss(features: Tensor, bound: float = 1.0) -> Tensor:
    r"""Compute the anti-collapse loss of a batch of features (AdaGauss, arXiv 2409.18265).

    .. math:: -\frac{1}{S} \sum_{i=1}^{S} \min(L_{ii}, \beta), \quad L L^\top = \mathrm{cov}(Z)

    It is smallest, :math:`-\beta`, when no feature is a linear function of the others and each keeps a spread of its
    own, and 0 when all of them stand still. The order of the features counts. Where features lie in fewer dimensions
    than there are (dead units), the covariance gets the smallest ridge that lets it be factorised.

    Args:
        features: Of shape ``(batch, width)``; the batch must be larger than the width.
        bound: Spread beyond which a feature gains nothing (the paper's beta).

    Returns:
        A scalar, in single precision at least.

    Raises:
        ValueError: If the batch is not larger than the width.

    Example::

        >>> features = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
        >>> anti_collapse_loss(features).round(decimals=3)
        tensor(-0.7040)
    """
    if features.ndim != 2:
        raise ValueError(f"`features` must have the shape (batch, width), got {tuple(features.shape)}.")
    rows, width = features.shape
    if rows <= width:
        raise ValueError(
            f"The anti-collapse loss needs more samples in a batch than features, got {rows} samples and {width}"
            " features. Use a larger batch, or a narrower layer of features before the classification layer."
        )
    with torch.autocast(features.device.type, enabled=False):
        rows_of_features = features if features.dtype == torch.float64 else features.float()
        centred = rows_of_features - rows_of_features.mean(0)
        factor = _cholesky(centred.t() @ centred / (rows - 1))
        return -factor.diagonal().clamp(max=bound).mean()


def _cholesky(covariance: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    ridge = torch.finfo(covariance.dtype).eps
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    level = covariance.detach().diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny ** 0.5)
    # NaNs never succeed, and are not hidden
    while bool(failed) and ridge < 1:
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(covariance + ridge * level * identity)
    return factor
