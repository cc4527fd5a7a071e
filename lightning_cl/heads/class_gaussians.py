"""Means and covariances of features by class, taken in one pass."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cl.heads.class_means import check_samples
from lightning_cl.heads.covariances import square_root

Covariance = Literal["full", "diagonal", "shared"]


class ClassGaussians:
    """Describe the features of each class by a mean and a covariance, in double precision.

    One pass over the samples gives them, whatever the batches; passes of several processes can be merged. Batches are
    merged around the running means (Chan, Golub and LeVeque 1979), so that features far from zero lose no digits.

    Args:
        num_classes: How many classes there may be.
        width: Width of the features.
        covariance: "full" keeps a matrix of each class, "diagonal" the variances of each class only, "shared" one
            matrix of how samples of all classes scatter around the mean of their class.
        device: Where they are kept.

    Attributes:
        counts: Samples of each class, or the sum of their weights, ``(classes,)``, float64.
        means: Of shape ``(classes, width)``, float64; zeros for a class without samples.
        scatter: Sums of products of what features are off the mean: full ``(classes, width, width)``, diagonal
            ``(classes, width)``, shared ``(width, width)``, float64. The matrices are symmetric to the bit.

    Example::

        >>> gaussians = ClassGaussians(num_classes=3, width=2, covariance="diagonal")
        >>> gaussians.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 2]))
        >>> gaussians.means[0]
        tensor([2., 0.], dtype=torch.float64)
        >>> gaussians.covariances()[0]
        tensor([2., 0.], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        covariance: Covariance = "full",
        device: torch.device | str | None = None,
    ) -> None:
        self.covariance: Covariance = covariance
        if device is not None and torch.device(device).type == "mps":  # which knows no double precision
            device = "cpu"
        shapes = {"full": (num_classes, width, width), "diagonal": (num_classes, width), "shared": (width, width)}
        if covariance not in shapes:
            raise ValueError(f"`covariance` must be one of {', '.join(map(repr, shapes))}, got {covariance!r}.")
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.means = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(shapes[covariance], dtype=torch.float64, device=device)

    @property
    def known(self) -> Tensor:
        """Which classes have samples, ``(classes,)``."""
        return self.counts > 0

    @property
    def finite(self) -> bool:
        """Whether all means and covariances are finite numbers."""
        return bool(self.means.isfinite().all() and self.scatter.isfinite().all())

    @property
    def numbers_per_class(self) -> int:
        """How many numbers are kept of a class, without its count; a shared matrix is kept once and not in them."""
        width = self.means.shape[1]
        return width + {"full": width * (width + 1) // 2, "diagonal": width, "shared": 0}[self.covariance]

    def update(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Of shape ``(batch, width)``.
            labels: Of shape ``(batch,)``.
            weights: How many samples each one stands for, ``(batch,)``; 1 if ``None``.

        Raises:
            ValueError: If the shapes do not go together, or a label is outside the classes.
        """
        width = self.means.shape[1]
        check_samples(features, labels, *self.means.shape)
        if len(labels) == 0:
            return
        device = self.counts.device
        rows, labels = features.detach().to(device).double(), labels.to(device)
        ones = torch.ones_like(rows[:, 0]) if weights is None else weights.to(device).double()
        present, places = torch.unique(labels, return_inverse=True)
        counts = ones.new_zeros(len(present)).index_add_(0, places, ones)
        sums = rows.new_zeros(len(present), width).index_add_(0, places, rows * ones[:, None])
        means = sums / counts.where(counts > 0, 1)[:, None]
        off = (rows - means[places]) * ones.sqrt()[:, None]
        if self.covariance == "diagonal":
            scatter = torch.zeros_like(means).index_add_(0, places, off.square())
        elif self.covariance == "shared":
            scatter = _symmetric(off.T @ off)
        else:
            parts = [off[places == place] for place in range(len(present))]
            scatter = torch.stack([_symmetric(part.T @ part) for part in parts])
        self._merge(present, counts, means, scatter)

    def add(self, other: "ClassGaussians") -> None:
        """Merge what another pass found, of the same classes or of others.

        Raises:
            ValueError: If the other pass has another kind of covariance or other shapes.
        """
        if other.covariance != self.covariance or other.means.shape != self.means.shape:
            raise ValueError(
                f"`other` has {other.covariance} covariances of {tuple(other.means.shape)} means, needed are"
                f" {self.covariance} covariances of {tuple(self.means.shape)}."
            )
        classes, device = other.known.nonzero().flatten(), self.counts.device
        scatter = other.scatter if self.covariance == "shared" else other.scatter[classes]
        parts = (classes, other.counts[classes], other.means[classes], scatter)
        self._merge(*(part.to(device) for part in parts))

    def _merge(self, classes: Tensor, counts: Tensor, means: Tensor, scatter: Tensor) -> None:
        """Merge samples of some classes that are described by their own means and scatter."""
        if len(classes) == 0:
            return
        before = self.counts[classes]
        total = before + counts
        safe = total.where(total > 0, 1)
        off = means - self.means[classes]
        shares = before * counts / safe
        self.counts[classes] = total
        # the mean of a class that is new is its samples' to the bit
        moved = self.means[classes] + off * (counts / safe)[:, None]
        self.means[classes] = torch.where(before[:, None] > 0, moved, means)
        if self.covariance == "diagonal":
            self.scatter[classes] += scatter + off.square() * shares[:, None]
        elif self.covariance == "shared":
            scaled = off * shares.sqrt()[:, None]
            self.scatter += scatter + _symmetric(scaled.T @ scaled)
        else:
            # a product is the same from both sides, so this stays symmetric
            self.scatter[classes] += scatter + off[:, :, None] * off[:, None, :] * shares[:, None, None]

    def covariances(self) -> Tensor:
        """Return unbiased covariances: full ``(classes, width, width)``, diagonal ``(classes, width)``, shared one.

        A class with a single sample has the covariance zero.
        """
        if self.covariance == "shared":
            free = self.counts.sum() - self.known.sum()
            return self.scatter / free if bool(free > 0) else torch.zeros_like(self.scatter)
        free = self.counts - 1
        shape = (-1,) + (1,) * (self.scatter.ndim - 1)
        return self.scatter / free.where(free > 0, 1).view(shape)

    def put(self, classes: Tensor, means: Tensor, covariances: Tensor) -> None:
        """Replace means and covariances of some classes, which keep their counts; not for a shared covariance.

        The covariance of a class with a single sample stays zero.

        Args:
            classes: Which ones, ``(some,)``; they must have samples.
            means: Of shape ``(some, width)``.
            covariances: Of shape ``(some, width, width)``, or ``(some, width)`` where diagonal.

        Raises:
            ValueError: If the shapes do not fit, a class has no samples, or the covariance is shared.
        """
        if self.covariance == "shared":
            raise ValueError("`put` replaces covariances of single classes, and these share one.")
        classes = classes.to(self.counts.device)
        wanted = (len(classes), *self.means.shape[1:]), (len(classes), *self.scatter.shape[1:])
        if (means.shape, covariances.shape) != wanted:
            raise ValueError(
                f"`means` and `covariances` must have the shapes {wanted[0]} and {wanted[1]}, got {tuple(means.shape)}"
                f" and {tuple(covariances.shape)}."
            )
        if not bool(self.known[classes].all()):
            raise ValueError(f"`classes` must have samples, and some of {classes.tolist()} have none.")
        fresh = covariances.detach().to(self.scatter, copy=True)
        fresh = _symmetric(fresh) if self.covariance == "full" else fresh
        free = (self.counts[classes] - 1).clamp_min(0)
        self.means[classes] = means.detach().to(self.means, copy=True)  # it may be a slice of these
        self.scatter[classes] = fresh * free.view((-1,) + (1,) * (fresh.ndim - 1))

    def draw(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """Draw features of a class from its Gaussian, ``(count, width)``, float64.

        Args:
            label: The class.
            count: How many.
            generator: One on the CPU, so that draws are the same on every device.
        """
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        noise = noise.to(self.means.device)
        covariance = self.covariances() if self.covariance == "shared" else self._covariance_of(label)
        spread = noise * covariance.sqrt() if covariance.ndim == 1 else noise @ square_root(covariance)
        return self.means[label] + spread

    def _covariance_of(self, label: int) -> Tensor:
        free = float(self.counts[label]) - 1
        return self.scatter[label] / (free if free > 0 else 1)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of what is known, on the CPU; of a symmetric matrix the lower triangle."""
        classes = self.known.nonzero().flatten()
        scatter = self.scatter if self.covariance == "shared" else self.scatter[classes]
        if self.covariance != "diagonal":
            rows, columns = torch.tril_indices(*scatter.shape[-2:], device=scatter.device)
            scatter = scatter[..., rows, columns]
        return {
            "covariance": self.covariance,
            "num_classes": len(self.counts),
            "classes": classes.cpu().clone(),
            "counts": self.counts[classes].cpu().clone(),
            "means": self.means[classes].cpu().clone(),
            "scatter": scatter.cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was saved.

        Raises:
            ValueError: If it was saved with another kind of covariance or other shapes.
        """
        saved = state["covariance"], state["num_classes"], state["means"].shape[1]
        own = self.covariance, *self.means.shape
        if saved != own:
            raise ValueError(f"`state` is of (covariance, num_classes, width) = {saved}, needed is {own}.")
        device, classes = self.counts.device, state["classes"].to(self.counts.device)
        for tensor in (self.counts, self.means, self.scatter):
            tensor.zero_()
        self.counts[classes] = state["counts"].to(device)
        self.means[classes] = state["means"].to(device)
        scatter = state["scatter"].to(device)
        if self.covariance == "diagonal":
            self.scatter[classes] = scatter
            return
        rows, columns = torch.tril_indices(*self.scatter.shape[-2:], device=device)
        full = self.scatter.new_zeros(*scatter.shape[:-1], *self.scatter.shape[-2:])
        full[..., rows, columns] = scatter
        full[..., columns, rows] = scatter
        if self.covariance == "shared":
            self.scatter.copy_(full)
        else:
            self.scatter[classes] = full

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device | str | None = None) -> "ClassGaussians":
        """Return what was saved."""
        gaussians = cls(state["num_classes"], state["means"].shape[1], state["covariance"], device)
        gaussians.load_state_dict(state)
        return gaussians


def _symmetric(matrices: Tensor) -> Tensor:
    # a matrix product may round the two halves differently
    return (matrices + matrices.mT) / 2
