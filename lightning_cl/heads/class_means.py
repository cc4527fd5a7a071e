"""Means of features by class, summed up batch by batch."""

import torch
from torch import Tensor
from torch.nn import functional


class ClassMeans:
    """Sum up features by class, in double precision.

    One pass over the samples gives their means, whatever the batches; sums of several processes can be added. Every
    sample weighs the same unless weights are given.

    Args:
        num_classes: How many classes there may be.
        width: Width of the features.
        normalize: Whether each sample's features are brought to length 1 first, and the means afterwards.
        device: Where the sums are kept.

    Attributes:
        sums: Sums of the features, ``(classes, width)``, float64.
        counts: Samples of each class, or the sum of their weights, ``(classes,)``, float64.

    Example::

        >>> means = ClassMeans(num_classes=3, width=2, normalize=False)
        >>> means.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 2]))
        >>> means.compute()
        tensor([[2., 0.],
                [0., 0.],
                [0., 5.]], dtype=torch.float64)
        >>> means.counts
        tensor([2., 0., 1.], dtype=torch.float64)
    """

    def __init__(
        self, num_classes: int, width: int, normalize: bool = True, device: torch.device | str | None = None
    ) -> None:
        self.normalize = normalize
        if device is not None and torch.device(device).type == "mps":  # which knows no double precision
            device = "cpu"
        self.sums = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def update(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Of shape ``(batch, width)``.
            labels: Of shape ``(batch,)``.
            weights: How many samples each one stands for, ``(batch,)``; 1 if ``None``.

        Raises:
            ValueError: If the shapes do not go together, or a label is outside the classes.
        """
        check_samples(features, labels, *self.sums.shape)
        if len(labels) == 0:
            return
        rows = features.detach().to(self.sums.device)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.normalize:
            rows = functional.normalize(rows, dim=1)
        labels = labels.to(self.sums.device)
        rows = rows.double()
        ones = torch.ones_like(rows[:, 0])
        if weights is not None:
            ones *= weights.to(ones)
            rows *= ones[:, None]
        self.sums.index_add_(0, labels, rows)
        self.counts.index_add_(0, labels, ones)

    def add(self, other: "ClassMeans") -> None:
        """Add the sums of another pass."""
        self.sums += other.sums.to(self.sums.device)
        self.counts += other.counts.to(self.counts.device)

    def compute(self) -> Tensor:
        """Return the means, ``(classes, width)``, float64; zeros for a class without samples."""
        means = self.sums / self.counts.where(self.counts > 0, 1)[:, None]
        return functional.normalize(means, dim=1) if self.normalize else means

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of sums and counts, on the CPU."""
        return {"sums": self.sums.cpu().clone(), "counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved sums and counts."""
        self.sums = state["sums"].to(self.sums.device, copy=True)
        self.counts = state["counts"].to(self.counts.device, copy=True)


def check_samples(features: Tensor, labels: Tensor, classes: int, width: int) -> None:
    """Refuse samples that do not go with so many classes and features of such a width.

    Raises:
        ValueError: If the shapes do not go together, or a label is outside the classes.
    """
    if features.ndim != 2 or features.shape[1] != width or labels.shape != features.shape[:1]:
        raise ValueError(
            f"`features` must have the shape (batch, {width}) and `labels` (batch,), got {tuple(features.shape)}"
            f" and {tuple(labels.shape)}."
        )
    if len(labels) > 0 and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(f"`labels` must be from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}.")
