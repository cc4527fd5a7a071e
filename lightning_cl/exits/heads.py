"""The heads of all exits of a network, and what is made of what they say together."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_cl.heads import ClassMeans, NearestMeanHead, pool_positions
from lightning_cl.heads.exit_ensemble import CascadedHead, Ensemble, GeometricEnsemble
from lightning_cl.heads.exit_heads import pool_features


class ExitHeads(nn.Module):
    """Heads in the order in which a sample meets them.

    Args:
        heads: One for each exit.
        num_classes: Number of logits; needed for an ensemble and for nearest means.
        ensemble: "cascade" shows each head what the one before said; "geometric" also answers with weighted means of
            all predictions so far, the classification layer's among them.
        widths: Widths of the pooled features of each exit and of the classification layer's input, where nearest means
            shall answer in eval mode; ``None`` where heads do.

    Attributes:
        heads: The heads.
        ensemble: The weights of the geometric ensemble; ``None`` without one.
        nearest: A nearest-mean head for each exit and the end; none where heads answer.
        hooks: What lets the heads answer, while they are on a network.
        looks_back: Whether an exit needs what those before it said.
        knows_means: Whether nearest means answer, and some are known.

    Example::

        >>> import torch
        >>> heads = ExitHeads([nn.Linear(4, 3), nn.Linear(8, 3)], num_classes=3, ensemble="cascade")
        >>> said = [heads.say(0, torch.randn(2, 4), [])]
        >>> heads.say(1, torch.randn(2, 8), said).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        num_classes: int = 0,
        ensemble: Ensemble = "none",
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        first, *later = heads
        cascaded = later if ensemble == "none" else [CascadedHead(head, num_classes) for head in later]
        self.heads = nn.ModuleList([first, *cascaded])
        self.ensemble: GeometricEnsemble | None = None
        if ensemble == "geometric":
            self.ensemble = GeometricEnsemble(len(heads) + 1, num_classes)
        self.nearest = nn.ModuleList([NearestMeanHead(num_classes, width) for width in widths or ()])
        self.hooks: object | None = None
        self.looks_back = ensemble != "none"
        self.knows_means = False
        self.register_load_state_dict_post_hook(_look_for_means)  # type: ignore[no-untyped-call]

    def say(self, position: int, features: Tensor, said: Sequence[Tensor]) -> Tensor:
        """Return the logits of a head for its layer's output.

        Args:
            position: Which head.
            features: What the layer put out.
            said: What the heads before it said of the same samples, where it looks back.
        """
        head: nn.Module = self.heads[position]
        if isinstance(head, CascadedHead):
            return head(features, said[-1])  # type: ignore[no-any-return]
        return head(features)  # type: ignore[no-any-return]

    def nearest_to(self, position: int, features: Tensor) -> Tensor:
        """Return minus the squared distance to each class's mean; minus infinity for classes without one.

        Args:
            position: Which exit; the last is the classification layer.
            features: What the exit's layer put out, or what the classification layer got.
        """
        return self.nearest[position](self.pooled(position, features))  # type: ignore[no-any-return]

    def set_means(self, means: Sequence[ClassMeans]) -> None:
        """Take the means of a pass, of each exit and the end; classes without samples keep what they have."""
        for head, part in zip(self.nearest, means, strict=True):
            if isinstance(head, NearestMeanHead):
                head.set_means(part)
        self.look_for_means()

    def look_for_means(self) -> None:
        """Find out whether means are known."""
        end = self.nearest[-1] if len(self.nearest) > 0 else None
        self.knows_means = isinstance(end, NearestMeanHead) and bool(end.known.any())

    def pooled(self, position: int, features: Tensor) -> Tensor:
        """Return one row of features a sample, as nearest means compare them."""
        return pool_positions(features) if position == len(self.heads) else pool_features(features)

    def answer(self, said: Sequence[Tensor]) -> Tensor:
        """Return the logits that an exit answers with, of what it and those before it said."""
        return said[-1] if self.ensemble is None else self.ensemble(said)

    def to_type_of(self, features: Tensor) -> "ExitHeads":
        """Bring the heads to a device and precision; nearest means keep theirs."""
        self.heads.to(features)
        if self.ensemble is not None:
            self.ensemble.to(features.device)
        self.nearest.to(features.device)
        return self


def _look_for_means(heads: nn.Module, keys: object) -> None:
    if isinstance(heads, ExitHeads):
        heads.look_for_means()
