"""The Gaussian head: a sample belongs to the class whose Gaussian its features fit best."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_cl.heads.class_gaussians import ClassGaussians, Covariance
from lightning_cl.heads.covariances import LEAST_JITTER, cholesky, correlation, scales_of, shrink
from lightning_cl.heads.nearest_mean import pool_positions

Prior = Literal["equal", "counts"]


class GaussianHead(nn.Module):
    """Score classes by the log density of their Gaussians, up to a constant.

    The score is minus half the squared Mahalanobis distance of the features to the class mean, minus half the log
    determinant of the covariance, plus the log of the class's prior probability. With full covariances that is
    quadratic discriminant analysis (QDA), with a shared one linear discriminant analysis (LDA), so that a softmax gives
    probabilities of the classes. A class without samples has the score minus infinity.

    Args:
        num_classes: How many classes there may be.
        width: Width of the features.
        covariance: The kind of covariance, see `ClassGaussians`.
        normalize: Whether features and means are brought to length 1 before distances are taken, as AdaGauss does
            (arXiv 2409.18265); covariances stay those of the features as they are.
        log_determinant: Whether the determinant counts. Without it, the class of the smallest distance wins.
        temperature: What scores are divided by.

    Example::

        >>> gaussians = ClassGaussians(num_classes=3, width=2, covariance="diagonal")
        >>> features = torch.tensor([[1.0, 1.0], [3.0, -1.0], [0.0, 5.0], [2.0, 3.0]])
        >>> gaussians.update(features, torch.tensor([0, 0, 2, 2]))
        >>> head = GaussianHead(num_classes=3, width=2, covariance="diagonal", log_determinant=False)
        >>> head.set_gaussians(gaussians)
        >>> head(torch.tensor([[2.0, 0.0], [1.0, 4.0]]))
        tensor([[ 0.0000,    -inf, -4.2500],
                [-4.2500,    -inf,  0.0000]])
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        covariance: Covariance = "full",
        normalize: bool = False,
        log_determinant: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        shapes = {"full": (num_classes, width, width), "diagonal": (num_classes, width), "shared": (width, width)}
        if covariance not in shapes:
            raise ValueError(f"`covariance` must be one of {', '.join(map(repr, shapes))}, got {covariance!r}.")
        self.covariance: str = covariance
        self.normalize = normalize
        self.log_determinant = log_determinant
        self.temperature = temperature
        self.means: Tensor
        self.known: Tensor
        self.whitening: Tensor
        self.offsets: Tensor
        self.register_buffer("means", torch.zeros(num_classes, width, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("whitening", torch.zeros(shapes[covariance], dtype=torch.float64))
        self.register_buffer("offsets", torch.zeros(num_classes, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GaussianHead":
        precise = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and tensor.ndim > 0}
        for name, tensor in precise.items():
            if name != "known":
                self._buffers[name] = tensor.float()  # some devices know no double precision
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in precise.items():
            applied = self._buffers[name]
            if name != "known" and applied is not None:  # a network of half precision has distances of better
                dtype = torch.float32 if applied.device.type == "mps" else torch.float64
                self._buffers[name] = applied.to(dtype) if tensor.is_meta else tensor.to(applied.device, dtype)
        return self

    def set_gaussians(
        self,
        gaussians: ClassGaussians,
        shrinkage: float = 0.0,
        off_diagonal_shrinkage: float = 0.0,
        correlation: bool = False,
        prior: Prior = "equal",
    ) -> None:
        """Take Gaussians in place of those that there are.

        A covariance that is not positive definite gets the smallest multiple of the identity that makes it so, from
        1e-8 of its mean variance, in steps of ten. Factors are computed on the CPU, so that they are the same wherever
        the head is used.

        Args:
            gaussians: Of the same kind of covariance.
            shrinkage: Share of the mean variance that is added to the variances, see `shrink`.
            off_diagonal_shrinkage: Share of the mean covariance that is added to the others.
            correlation: Whether covariances are made correlations, after shrinking.
            prior: "equal", or as probable as the class was among the samples ("counts").
        """
        if gaussians.covariance != self.covariance:
            raise ValueError(f"`gaussians` are {gaussians.covariance}, the head is {self.covariance}.")
        known = gaussians.known.cpu()
        counts, means, covariances = (t.cpu() for t in (gaussians.counts, gaussians.means, gaussians.covariances()))
        if self.covariance == "diagonal":
            whitening, log_determinants = _whiten_each(covariances[known], shrinkage, correlation)
        else:
            matrices = covariances[None] if self.covariance == "shared" else covariances[known]
            whitening, log_determinants = _whiten(matrices, shrinkage, off_diagonal_shrinkage, correlation)
        offsets = torch.zeros_like(counts)
        if self.log_determinant:
            offsets[known] = -log_determinants / 2
        if prior == "counts":
            offsets += (counts / counts.sum()).log()
        factors = torch.zeros(self.whitening.shape, dtype=whitening.dtype)
        if self.covariance == "shared":
            factors = whitening[0]
        else:
            factors[known] = whitening
        if self.normalize:
            means = functional.normalize(means, dim=1)
        device = self.means.device
        self.known = known.to(device)
        self.means = means.to(self.means, copy=True)
        # products are rounded by how a matrix lies in memory, and a saved one is loaded in rows
        self.whitening = factors.to(self.means, copy=True).contiguous()
        self.offsets = offsets.masked_fill(~known, 0).to(self.means)

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores.

        Args:
            features: Of shape ``(batch, width)``, or ``(batch, width, height, columns)`` where the head stands in for
                a 1x1 convolution.

        Returns:
            Of shape ``(batch, classes)``, or ``(batch, classes, height, columns)`` with the same scores everywhere; in
            single precision at least.
        """
        precision = torch.float32 if features.device.type == "mps" else torch.float64
        rows, means = pool_positions(features).to(precision), self.means.to(precision)
        whitening, offsets = self.whitening.to(precision), self.offsets.to(precision)
        if rows.dim() != 2:
            raise ValueError("`features` must have the shape (batch, width) or (batch, width, height, columns).")
        if self.normalize:
            rows = functional.normalize(rows, dim=1)
        if self.covariance == "shared":
            # products of whitened rows and means are much less work than all differences
            centre = means.mean(0)
            rows, means = (rows - centre) @ whitening.t(), (means - centre) @ whitening.t()
            distances = rows.square().sum(1, keepdim=True) + means.square().sum(1) - 2 * (rows @ means.t())
        else:
            off = rows[None, :, :] - means[:, None, :]
            if self.covariance == "diagonal":
                off = off * whitening[:, None, :]
            else:
                off = torch.bmm(off, whitening.transpose(1, 2))
            distances = off.square().sum(2).t()
        scores = ((offsets - distances / 2) / self.temperature).masked_fill(~self.known, -float("inf"))
        if features.dtype != torch.float64:
            scores = scores.float()
        if features.dim() == 4:
            scores = scores[:, :, None, None].expand(-1, -1, features.size(2), features.size(3))
        return scores


def _whiten(covariances: Tensor, diagonal: float, off_diagonal: float, as_correlation: bool) -> tuple[Tensor, Tensor]:
    """Return factors that make covariances the identity, and the logs of the covariances' determinants.

    Args:
        covariances: Of shape ``(matrices, width, width)``.
        diagonal: Share of the mean variance that is added.
        off_diagonal: Share of the mean covariance that is added.
        as_correlation: Whether they are made correlations.
    """
    covariances = shrink(covariances, diagonal, off_diagonal)
    factors = cholesky(correlation(covariances) if as_correlation else covariances)
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype).expand_as(factors)
    log_determinants = 2 * factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.linalg.solve_triangular(factors, identity, upper=False), log_determinants


def _whiten_each(variances: Tensor, diagonal: float, as_correlation: bool) -> tuple[Tensor, Tensor]:
    """Do what `_whiten` does with the variances of features that do not covary, ``(classes, width)``."""
    variances = variances + diagonal * variances.mean(1, keepdim=True)
    if as_correlation:
        variances = torch.ones_like(variances)
    flat = ~(variances > 0).all(1, keepdim=True)
    jitter = LEAST_JITTER * scales_of(variances.mean(1))[:, None]
    variances = torch.where(flat, variances + jitter, variances)
    return variances.rsqrt(), variances.log().sum(1)
