import pytest
import torch

from lightning_cl.datamodules.augmentation import random_crop, random_flip

IMAGES = torch.randint(0, 256, (64, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _reference_random_crop(images, padding):
    batch, _, height, width = images.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, batch))
    result = torch.zeros_like(images)
    for n in range(batch):
        for row in range(height):
            for column in range(width):
                source_row = row + int(offsets[0, n]) - padding
                source_column = column + int(offsets[1, n]) - padding
                if 0 <= source_row < height and 0 <= source_column < width:
                    result[n, :, row, column] = images[n, :, source_row, source_column]
    return result


def _reference_random_flip(images):
    draws = torch.rand(len(images))
    return torch.stack(
        [torch.flip(image, [2]) if draw < 0.5 else image for image, draw in zip(images, draws, strict=True)]
    )


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_random_crop_equals_cropping_sample_by_sample(padding):
    torch.manual_seed(1)
    got = random_crop(IMAGES, padding)
    torch.manual_seed(1)
    assert got.equal(_reference_random_crop(IMAGES, padding))


def test_random_flip_equals_flipping_sample_by_sample():
    torch.manual_seed(1)
    got = random_flip(IMAGES)
    torch.manual_seed(1)
    assert got.equal(_reference_random_flip(IMAGES))


def test_samples_of_one_batch_get_different_draws():
    same = IMAGES[:1].expand(64, -1, -1, -1)
    torch.manual_seed(0)
    assert len(random_crop(same).flatten(1).unique(dim=0)) > 30
    assert len(random_flip(same).flatten(1).unique(dim=0)) == 2
