"""scikit-learn's handwritten digits: real images that need no download."""

import torch
from sklearn.datasets import load_digits
from typing_extensions import override

from lightning_cl.datamodules.array_dataset import ArrayDataset
from lightning_cl.datamodules.image_source import ImageSource
from lightning_cl.datamodules.splits import stratified_split

_TEST_FRACTION = 0.2
_TEST_SEED = 0


class Digits(ImageSource):
    """1797 grey 8x8 images of handwritten digits, which come with scikit-learn.

    A fifth of each class, the same for every `seed`, is the test set. The pixels' 17 levels are spread over 0 to 255.

    Example::

        >>> digits = Digits(batch_size=32)
        >>> digits.setup("fit")
        >>> images, labels = next(iter(digits.train_dataloader()))
        >>> images.shape, images.dtype
        (torch.Size([32, 1, 8, 8]), torch.uint8)
    """

    mean = (0.3060,)
    std = (0.3763,)
    num_classes = 10
    classes = tuple(str(digit) for digit in range(10))
    input_shape = (1, 8, 8)

    @override
    def load_train(self) -> ArrayDataset:
        return _load(train=True)

    @override
    def load_test(self) -> ArrayDataset:
        return _load(train=False)


def _load(train: bool) -> ArrayDataset:
    digits = load_digits()
    images = torch.as_tensor(digits.images).mul(255 / 16).round().to(torch.uint8)
    labels = torch.as_tensor(digits.target)
    kept, held_out = stratified_split(labels, _TEST_FRACTION, _TEST_SEED)
    chosen = torch.tensor(kept if train else held_out)
    return ArrayDataset(images[chosen], labels[chosen])
