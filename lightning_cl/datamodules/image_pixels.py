"""Work on the pixels of images, in whatever form a data set has them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_cl.tasks.batches import describe

_CHANNEL_COUNTS = (1, 3)
_PLAIN_MODES = {"L": "L", "LA": "L", "1": "L"} | dict.fromkeys(("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV"), "RGB")
_ADVICE = (
    " Allowed are uint8 images and floats in [0, 1], of shape (channels, height, width), (height, width, channels) or"
    " (height, width) with 1 or 3 channels, and PIL images."
)

Change = Callable[[Tensor], Tensor]
"""Takes uint8 images ``(batch, channels, height, width)`` and gives images of the same shape."""


def change_image(image: Any, change: Change) -> Any:
    """Return one image with its pixels changed, of the kind and type that it was.

    Args:
        image: A PIL image, an array or a tensor. A PIL image keeps its mode, so that it can be put in one batch with
            others: of "LA" and "RGBA" the alpha channel stays as it was, "P" gets a palette of its changed colours,
            and "1" is dithered.
        change: What to do with the pixels.

    Raises:
        ValueError: If it is no image, of floats outside of [0, 1], or a PIL image of a mode without 8-bit colours.
    """
    if isinstance(image, Image.Image):
        return _change_pillow(image, change)
    if isinstance(image, np.ndarray):
        rows = torch.from_numpy(np.array(image))[None]
        return change_images(rows, change, channels_last=True)[0].numpy()
    if isinstance(image, Tensor):
        changed = change_images(image.as_subclass(Tensor)[None], change)[0]
        # torchvision's image tensors tell its transforms what they are
        return changed if type(image) is Tensor else changed.as_subclass(type(image))
    raise ValueError(f"The inputs are no images: got {describe(image)}.{_ADVICE}")


def change_images(images: Tensor, change: Change, channels_last: bool = False) -> Tensor:
    """Return a batch of images with their pixels changed, of the layout and type that it was.

    Floats are rounded to the 256 levels.

    Args:
        images: ``(batch, channels, height, width)``, ``(batch, height, width, channels)`` or ``(batch, height,
            width)``; uint8, or floats in [0, 1].
        change: What to do with the pixels.
        channels_last: Whether the last dimension is the channels where the first could be too.

    Raises:
        ValueError: If they are no images, or floats outside of [0, 1].
    """
    axis = _channel_axis(images, channels_last)
    planes = images.unsqueeze(1) if axis is None else images.movedim(axis, 1)
    if images.dtype == torch.uint8:
        changed = change(planes.contiguous())
    elif images.dtype.is_floating_point:
        _check_range(images)
        changed = change(planes.float().mul(255).round().to(torch.uint8)).to(images.dtype).div(255)
    else:
        raise ValueError(f"The inputs are no images: got {describe(images[0])}.{_ADVICE}")
    return changed.squeeze(1) if axis is None else changed.movedim(1, axis)


def pixels_of(image: Any) -> Tensor:
    """Return the pixels of one image, uint8 ``(channels, height, width)``.

    Raises:
        ValueError: If it is no image, or of floats outside of [0, 1].
    """
    found: list[Tensor] = []

    def keep(pixels: Tensor) -> Tensor:
        found.append(pixels[0])
        return pixels

    change_image(image, keep)
    return found[0]


def _change_pillow(image: Image.Image, change: Change) -> Image.Image:
    plain = _PLAIN_MODES.get(image.mode)
    if plain is None:
        raise ValueError(
            f"The inputs are PIL images of mode {image.mode!r}. Allowed are {', '.join(map(repr, _PLAIN_MODES))}:"
            " convert them in the data set, before its `transform`."
        )
    colours = image if image.mode == plain else image.convert(plain)
    changed = Image.fromarray(change_image(np.asarray(colours), change))
    if image.mode in ("LA", "RGBA"):
        changed.putalpha(image.getchannel("A"))
    elif image.mode == "P":
        changed = changed.convert("P", palette=Image.Palette.ADAPTIVE)
    elif image.mode != plain:
        changed = changed.convert(image.mode)
    return changed


def _channel_axis(images: Tensor, channels_last: bool) -> int | None:
    if images.ndim == 3:
        return None
    if images.ndim == 4:
        for axis in (3, 1) if channels_last else (1, 3):
            if images.shape[axis] in _CHANNEL_COUNTS:
                return axis
    raise ValueError(f"The inputs are no images: got {describe(images[0])}.{_ADVICE}")


def _check_range(images: Tensor) -> None:
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # NaN, too
        raise ValueError(
            f"The inputs are floats from {low:.4g} to {high:.4g}, and a corruption needs the pixels before they are"
            " normalised: uint8, or floats in [0, 1]. Normalise in the data set's `transform` attribute, which comes"
            " after the poison, or in the DataModule's `on_after_batch_transfer`."
        )
