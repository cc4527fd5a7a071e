"""Images of every kind, worked on as uint8 pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from lightning_cl.datamodules.image_pixels import change_image, change_images, pixels_of

COLOURS = torch.randint(0, 256, (3, 4, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LAST = COLOURS.movedim(0, -1).numpy()


def _invert(pixels):
    assert (pixels.dtype, pixels.ndim) == (torch.uint8, 4)
    return 255 - pixels


@pytest.mark.parametrize(
    "image",
    [COLOURS, COLOURS[:1], COLOURS[0], COLOURS.movedim(0, -1), tv_tensors.Image(COLOURS), LAST, LAST[..., 0]],
    ids=["channels first", "grey", "flat", "channels last", "torchvision's", "array", "flat array"],
)
def test_bytes_keep_their_layout_and_kind(image):
    changed = change_image(image, _invert)
    assert type(changed) is type(image)
    assert np.array_equal(np.asarray(changed), 255 - np.asarray(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_keep_their_type(dtype):
    changed = change_image(COLOURS.to(dtype) / 255, _invert)
    assert changed.dtype == dtype
    assert torch.allclose(changed.double(), (255 - COLOURS.double()) / 255, atol=1e-3)


def test_floats_of_a_data_set_of_bytes_come_back_to_the_bit():
    levels = torch.arange(256, dtype=torch.float32).view(1, 16, 16) / 255
    assert torch.equal(change_image(levels, lambda pixels: pixels), levels)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV"])
def test_pillow_images_keep_their_mode(mode):
    image = Image.fromarray(LAST).convert(mode)
    changed = change_image(image, _invert)
    assert (changed.mode, changed.size) == (mode, image.size)
    colours = [np.asarray(each.convert("RGB")).astype(int) for each in (image, changed)]
    assert np.allclose(colours[1], 255 - colours[0], atol=4)  # other colour spaces round


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_the_alpha_channel_stays_as_it_was(mode):
    image = Image.fromarray(LAST).convert(mode)
    image.putalpha(Image.fromarray(LAST[..., 0]))
    assert np.array_equal(np.asarray(change_image(image, _invert))[..., -1], LAST[..., 0])


def test_pillow_images_without_bytes_for_colours_are_refused():
    with pytest.raises(ValueError, match=r"PIL images of mode 'I;16'. Allowed are 'L', .*'RGBA'.*: convert them"):
        change_image(Image.new("I;16", (4, 4)), _invert)


def test_three_rows_of_an_array_are_no_channels():
    assert pixels_of(np.zeros((3, 8, 3), dtype=np.uint8)).shape == (3, 3, 8)
    assert pixels_of(np.zeros((3, 8, 8), dtype=np.uint8)).shape == (3, 8, 8)


def test_the_image_that_was_given_stays_as_it_was():
    image = COLOURS.clone()
    change_image(image, _invert)
    assert torch.equal(image, COLOURS)


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        (torch.zeros(64), r"Tensor\(64,\) float32"),
        (torch.zeros(4, 8, 8), r"Tensor\(4, 8, 8\) float32"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"Tensor\(3, 8, 8\) int64"),
        ("cat.png", "str"),
    ],
    ids=["vector", "four channels", "integers", "path"],
)
def test_what_is_no_image_is_refused(image, shown):
    with pytest.raises(ValueError, match=f"no images: got {shown}. Allowed are uint8 images and floats in"):
        change_image(image, _invert)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_floats_that_are_no_pixels_are_refused(value):
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match=r"a corruption needs the pixels before they are normalised.*`transform`"):
        change_images(images, _invert)
