"""Transforms that make a domain-incremental stream out of one data set."""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional


class Permute:
    """Permute the pixels of an image by one fixed, seeded permutation: the classic permuted MNIST.

    All channels are permuted alike, so that normalisation by channel may come before or after.

    Args:
        seed: Chooses the permutation.

    Example::

        >>> image = torch.arange(4.0).view(1, 2, 2)
        >>> sorted(Permute(seed=1)(image).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0]
    """

    batched = True

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def __call__(self, images: Any) -> Tensor:
        """Permute images of shape ``(..., height, width)``, a PIL image, or a vector ``(features,)``."""
        images = images if isinstance(images, Tensor) else functional.to_image(images)
        if images.ndim == 1:
            return self(images.unsqueeze(0)).squeeze(0)
        pixels = images.shape[-2] * images.shape[-1]
        if pixels not in self._orders:
            self._orders[pixels] = torch.randperm(pixels, generator=torch.Generator().manual_seed(self.seed))
        permuted: Tensor = images.flatten(-2)[..., self._orders[pixels].to(images.device)]
        return permuted.view(images.shape)

    def __repr__(self) -> str:
        return f"Permute(seed={self.seed})"


class Rotate:
    """Rotate an image about its centre; corners that leave the frame are lost, empty ones become black.

    Args:
        degrees: Angle, counter-clockwise.

    Example::

        >>> Rotate(90)(torch.tensor([[[1, 2], [3, 4]]])).tolist()
        [[[2, 4], [1, 3]]]
    """

    batched = True

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, images: Any) -> Any:
        """Rotate images of shape ``(..., height, width)``, or a PIL image."""
        if not isinstance(images, Tensor) or images.ndim > 2:
            return functional.rotate(images, self.degrees)
        if images.ndim < 2:
            raise ValueError(
                f"`Rotate` turns images of shape (..., height, width), got the shape {tuple(images.shape)}."
            )
        return functional.rotate(images.unsqueeze(0), self.degrees).squeeze(0)

    def __repr__(self) -> str:
        return f"Rotate(degrees={self.degrees:g})"
