"""Images as the corruptions work on them."""

from torch import Tensor

_PUBLISHED_SIZE = 32


def to_unit(images: Tensor) -> Tensor:
    """Give uint8 images as float64 from 0 to 1."""
    return images.double() / 255


def to_bytes(values: Tensor) -> Tensor:
    """Give floats as uint8 images, clipped to [0, 1] and rounded to the nearest level."""
    return values.clamp(0, 1).mul_(255).round_().byte()


def relative_size(images: Tensor) -> float:
    """Return what lengths that were published for 32x32 images are multiplied by."""
    return min(images.shape[-2:]) / _PUBLISHED_SIZE
