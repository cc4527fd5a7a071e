import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lightning_cl.reporting.contact_sheet import SheetRow, contact_sheet, write_contact_sheet


def _row(label, pairs, channels=3, corruption="gaussian_blur"):
    dark, light = torch.zeros(channels, 8, 8, dtype=torch.uint8), torch.full((channels, 8, 8), 200).to(torch.uint8)
    return SheetRow(label, corruption, [(dark, light)] * pairs)


def test_each_class_is_a_row_of_clean_images_beside_poisoned_ones():
    axes = contact_sheet([_row(3, 2), _row(7, 1, corruption="contrast")], "task 1").axes
    assert [ax.get_title() for ax in axes] == ["clean", "poisoned"] * 2 + [""] * 2
    assert [ax.get_ylabel() for ax in axes] == ["class 3\ngaussian blur", "", "", "", "class 7\ncontrast", ""]
    assert [int(ax.images[0].get_array().max()) for ax in axes] == [0, 200] * 3


def test_the_title_says_which_task():
    assert contact_sheet([_row(0, 1)], "task 1 (cats), bait").get_suptitle() == "task 1 (cats), bait"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_file_is_an_image(tmp_path, channels):
    path = write_contact_sheet(tmp_path / "new" / "sheet.png", [_row(0, 4, channels), _row(1, 4, channels)], "task 0")
    image = imread(path)
    assert image.shape[1] > 2 * image.shape[0] > 600
    assert np.unique(image[..., 0]).size > 2
