"""One corruption on a batch of images."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_cl.corruptions import blur, digital, noise, weather
from lightning_cl.corruptions.draws import Draws

_RULES: dict[str, Callable[[Tensor, int, Draws], Tensor]] = {
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "defocus_blur": blur.defocus_blur,
    "elastic_transform": digital.elastic_transform,
    "fog": weather.fog,
    "gaussian_blur": blur.gaussian_blur,
    "gaussian_noise": noise.gaussian_noise,
    "glass_blur": blur.glass_blur,
    "impulse_noise": noise.impulse_noise,
    "jpeg_compression": digital.jpeg_compression,
    "motion_blur": blur.motion_blur,
    "pixelate": digital.pixelate,
    "shot_noise": noise.shot_noise,
}
CORRUPTIONS: tuple[str, ...] = tuple(sorted(_RULES))

_SEVERITIES = range(6)
# Values that are worked on at once: a bound on the memory, since every value takes eight bytes, several times over.
_CHUNK = 1 << 20


def check_corruption(name: str, severity: int) -> None:
    """Refuse a corruption that is not known, and a severity other than 0 to 5.

    Raises:
        ValueError: Saying what is allowed; the arguments are called ``corruption`` and ``severity``.
    """
    if name not in CORRUPTIONS:
        raise ValueError(
            f"`corruption` must be one of {', '.join(CORRUPTIONS)}, got {name!r}. Of the published ones, frost needs "
            "photographs, and snow and spatter need long recipes: they are left out."
        )
    if not isinstance(severity, int) or isinstance(severity, bool) or severity not in _SEVERITIES:
        raise ValueError(f"`severity` must be a whole number from 0 (no corruption) to 5, got {severity!r}.")


def corrupt(images: Tensor, name: str, severity: int, ids: Tensor, seed: int = 0) -> Tensor:
    """Corrupt images, each by random draws that depend on nothing but the corruption, its id and the seed.

    A sample is corrupted the same way in every batch, epoch and process, and on every device: all is computed on the
    CPU, and the global random state stays as it is. The severities share their draws, so that a higher one gives more
    of the same noise. Results are rounded to the nearest of the 256 levels.

    Args:
        images: ``(batch, channels, height, width)``, uint8, of one channel or three (RGB).
        name: One of `CORRUPTIONS`.
        severity: 1 to 5; 0 leaves the images as they are.
        ids: The id of each sample, ``(batch,)``.
        seed: Another seed corrupts the same sample in another way.

    Returns:
        Corrupted images of the shape and on the device of ``images``.

    Raises:
        ValueError: For an argument of another kind, saying what is allowed.

    Example::

        >>> image = torch.full((1, 1, 2, 2), 100, dtype=torch.uint8)
        >>> corrupt(image, "brightness", 5, ids=torch.tensor([0])).flatten().tolist()
        [176, 176, 176, 176]
    """
    check_corruption(name, severity)
    _check_images(images)
    _check_ids(ids, len(images))
    corrupted = images.to("cpu", copy=True, memory_format=torch.contiguous_format)
    if severity and corrupted.numel():
        step = max(1, _CHUNK // corrupted[0].numel())
        for start in range(0, len(images), step):
            chunk = slice(start, start + step)
            corrupted[chunk] = _RULES[name](corrupted[chunk], severity, Draws(ids[chunk], name, seed))
    return corrupted.to(images.device)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise ValueError(f"`images` must be of torch.uint8, with values from 0 to 255, got {images.dtype}.")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"`images` must have the shape (batch, channels, height, width) with 1 or 3 channels, "
            f"got {tuple(images.shape)}."
        )


def _check_ids(ids: Tensor, batch: int) -> None:
    if ids.shape != (batch,) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"`ids` must hold one integer for each of the {batch} images, got {ids.dtype} of shape {tuple(ids.shape)}."
        )
