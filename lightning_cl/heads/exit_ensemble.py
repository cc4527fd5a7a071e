"""Exits that use what the exits before them said: Zero-Time-Waste (Wołczyk et al., NeurIPS 2021)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.heads.exit_rules import log_probabilities

Ensemble = Literal["none", "cascade", "geometric"]


class CascadedHead(nn.Module):
    """A head that also sees the logits of the exit before it, normalised and without a gradient to them.

    For a head that ends with a linear layer this is that layer on features and logits together.

    Args:
        head: Makes logits of features.
        num_classes: Number of logits.

    Example::

        >>> head = CascadedHead(nn.Linear(8, 3), num_classes=3)
        >>> head(torch.randn(2, 8), torch.randn(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.head = head
        self.norm = nn.LayerNorm(num_classes)
        self.earlier = nn.Linear(num_classes, num_classes, bias=False)

    @override
    def forward(self, features: Tensor, earlier: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``, of features and the logits of the exit before."""
        logits: Tensor = self.head(features) + self.earlier(self.norm(earlier.detach()))
        return logits


class GeometricEnsemble(nn.Module):
    """Weighted geometric means of what the exits predict until each of them.

    Exit ``i`` answers ``softmax(mean_{j <= i} exp(w_ij) log p_j + b_i)``. Only ``w`` and ``b`` have a gradient.

    Args:
        exits: How many predictions there are in all.
        num_classes: Number of logits.

    Example::

        >>> ensemble = GeometricEnsemble(exits=2, num_classes=3)
        >>> sure, unsure = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
        >>> ensemble([sure, unsure]).argmax(1)
        tensor([0])
    """

    def __init__(self, exits: int, num_classes: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(0.01 * torch.randn(exits, exits))  # of which those with j > i have no part
        self.bias = nn.Parameter(torch.zeros(exits, num_classes))

    @override
    def forward(self, said: Sequence[Tensor]) -> Tensor:
        """Return the logits of an exit's answer, ``(batch, classes)``.

        Args:
            said: The logits of this exit and all before it, ``(batch, classes)`` each.
        """
        last = len(said) - 1
        predicted = log_probabilities(torch.stack([logits.detach() for logits in said]))
        weights = self.weights[last, : len(said), None, None].exp()
        return (weights * predicted).mean(0) + self.bias[last]
