"""A small network from features to features."""

from torch import Tensor, nn
from typing_extensions import override


class FeatureAdapter(nn.Module):
    """Map features of one network to those of another (AdaGauss, arXiv 2409.18265).

    A linear layer that widens, GELU, and one that comes back. The same shape serves as the projector of distillation,
    from new features to old ones, and as the adapter that brings Gaussians along, from old features to new ones.

    Args:
        width: Width of the features.
        expansion: How many times wider the hidden layer is.

    Example::

        >>> import torch
        >>> FeatureAdapter(width=4, expansion=8)(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, width: int, expansion: int = 32) -> None:
        super().__init__()
        self.widen = nn.Linear(width, expansion * width)
        self.activation = nn.GELU()
        self.narrow = nn.Linear(expansion * width, width)

    @override
    def forward(self, features: Tensor) -> Tensor:
        return self.narrow(self.activation(self.widen(features)))  # type: ignore[no-any-return]

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        self.widen.reset_parameters()
        self.narrow.reset_parameters()
