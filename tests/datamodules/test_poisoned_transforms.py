"""A data set's transform gets the corrupted image, in whatever way the data set calls it."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from poisoned_streams import LABELS, PIXELS, ImageData, streams
from torch.utils.data import Dataset

from lightning_cl.corruptions import corrupt
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.datamodules.array_dataset import ArrayDataset, collate


class Calls(Dataset):
    """Calls its transform in a way of its own."""

    targets = LABELS

    def __init__(self, call, transform=None):
        self.call = call
        self.transform = transform

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return self.call(self.transform, PIXELS[index]), int(LABELS[index])


def _poisoned(call, transform=None):
    """The first sample of the poisoned task, and what its image is corrupted to."""
    poisoned, _ = streams(lambda: ImageData(Calls(call, transform)))
    data = poisoned.task_data(1, "train")
    position = int(data.indices[0])
    expected = corrupt(PIXELS[position][None], "gaussian_noise", 5, torch.tensor([position]))[0]
    return data.dataset[position][0], expected


def _named(transform, image):
    return image if transform is None else transform(image=image)["image"]


def test_an_image_that_is_handed_over_by_name_is_corrupted():
    image, expected = _poisoned(_named, lambda image: {"image": image.flip(-1)})
    assert torch.equal(image, expected.flip(-1))


def test_an_image_that_is_handed_over_by_name_needs_no_transform():
    image, expected = _poisoned(_named)
    assert torch.equal(image, expected)


def test_what_comes_with_the_image_goes_on_to_the_transform():
    def call(transform, image):
        return transform(image, scale=2)

    image, expected = _poisoned(call, lambda image, scale: image // scale)
    assert torch.equal(image, expected // 2)


def test_an_image_of_another_name_is_refused():
    with pytest.raises(MisconfigurationException, match=r"Task 1 cannot be poisoned .* with 'img', .* or as `image=`"):
        _poisoned(lambda transform, image: transform(img=image), lambda img: img)


def _two_views(transform, image):
    return torch.stack([transform(image), transform(image)])


@pytest.mark.parametrize("transform", [None, lambda image: image.flip(-1)], ids=["none", "flip"])
def test_all_views_of_an_image_are_corrupted(transform):
    views, expected = _poisoned(_two_views, transform)
    wanted = expected if transform is None else transform(expected)
    assert torch.equal(views, torch.stack([wanted, wanted]))


def test_a_second_image_of_a_sample_is_refused():
    with pytest.raises(MisconfigurationException, match="several images for sample 2, and only one"):
        _poisoned(lambda transform, image: transform(image) + transform(image.clone()), lambda image: image)


def test_an_image_that_goes_through_two_transforms_is_corrupted_once():
    class Both(Calls):
        def __init__(self):
            super().__init__(None, lambda image: image.flip(-1))
            self.transforms = lambda image, target: (image.flip(-2), target)

        def __getitem__(self, index):
            return self.transforms(self.transform(PIXELS[index]), int(LABELS[index]))

    poisoned, _ = streams(lambda: ImageData(Both()))
    data = poisoned.task_data(1, "train")
    position = int(data.indices[0])
    expected = corrupt(PIXELS[position][None], "gaussian_noise", 5, torch.tensor([position]))[0]
    assert torch.equal(data.dataset[position][0], expected.flip(-1, -2))


class Weighted(ArrayDataset):
    """Hands out batches whose first entry is not the images."""

    def __getitems__(self, indices):
        images, labels = super().__getitems__(indices)
        return torch.rand(len(labels), 3, 2, 2), images, labels

    def __getitem__(self, index):
        return tuple(part[0] for part in self.__getitems__([index]))


def test_images_in_memory_are_corrupted_wherever_a_batch_has_them():
    def wrap(base):
        return ClassIncremental(base, num_tasks=3, inputs=1, target_key=2)

    poisoned, _ = streams(lambda: ImageData(Weighted(PIXELS, LABELS), collate_fn=collate), wrap)
    data = poisoned.task_data(1, "train")
    expected = corrupt(PIXELS[data.indices], "gaussian_noise", 5, data.indices)
    assert torch.equal(data.dataset.__getitems__(data.indices)[1], expected)
