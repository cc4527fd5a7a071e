import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import VisionDataset

from lightning_cl.datamodules.array_dataset import ArrayDataset
from lightning_cl.datamodules.evaluation_view import evaluation_view

DIGITS = load_digits()


class Images(Dataset):
    """The digits with a transform, as people write data sets."""

    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = torch.as_tensor(DIGITS.images[index])
        return (image if self.transform is None else self.transform(image)), int(DIGITS.target[index])


class TorchvisionImages(VisionDataset):
    """The same, over torchvision's base class, which keeps the transform in two places."""

    def __init__(self, transform=None):
        super().__init__(root="", transform=transform)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.transforms(torch.as_tensor(DIGITS.images[index]), int(DIGITS.target[index]))


def _augment(image):
    return image + 1000 + torch.rand(())


def _scale(image):
    return image / 16


def _view(dataset, evaluation_set=None, eval_transform=None):
    return evaluation_view(dataset, lambda: evaluation_set, eval_transform)


def _image(index):
    return torch.as_tensor(DIGITS.images[index])


@pytest.mark.parametrize("make", [Images, TorchvisionImages])
def test_the_evaluation_sets_transform_is_taken(make):
    train = make(_augment)
    view = _view(train, make(_scale))
    assert torch.equal(view[3][0], _image(3) / 16)
    assert train[3][0].min() >= 1000  # the training set itself goes on augmenting


@pytest.mark.parametrize("make", [Images, TorchvisionImages])
def test_an_evaluation_set_without_a_transform_means_no_transform(make):
    assert torch.equal(_view(make(_augment), make(None))[3][0], _image(3))


@pytest.mark.parametrize("make", [Images, TorchvisionImages])
def test_a_named_transform_is_taken_before_that_of_the_evaluation_set(make):
    assert torch.equal(_view(make(_augment), make(_augment), _scale)[3][0], _image(3) / 16)


def test_what_the_data_set_itself_offers_comes_first():
    class Own(Images):
        def evaluation_view(self):
            return Images(lambda image: -image)

    assert torch.equal(_view(Own(_augment), Images(_scale), _scale)[3][0], -_image(3))


def test_our_own_arrays_are_their_own_view():
    arrays = ArrayDataset(DIGITS.images, DIGITS.target)
    assert _view(arrays) is arrays


@pytest.mark.parametrize("evaluation_set", [Subset(Images(_scale), [1]), ConcatDataset([Images(_scale)])])
def test_the_evaluation_set_is_looked_through(evaluation_set):
    assert torch.equal(_view(Images(_augment), evaluation_set)[3][0], _image(3) / 16)


def test_the_training_data_are_looked_through():
    view = _view(ConcatDataset([Images(_augment), Subset(Images(_augment), [5, 3])]), Images(_scale))
    assert len(view) == 22
    assert torch.equal(view[3][0], _image(3) / 16)
    assert torch.equal(view[21][0], _image(3) / 16)


@pytest.mark.parametrize("evaluation_set", [None, TensorDataset(torch.zeros(2))])
def test_without_an_evaluation_transform_there_is_a_warning(evaluation_set):
    train = Images(_augment)
    with pytest.warns(UserWarning, match="Images are evaluated under the training transform.*`eval_transform=...`"):
        assert _view(train, evaluation_set) is train


@pytest.mark.parametrize("dataset", [Images(None), TensorDataset(torch.zeros(2))])
def test_data_that_have_no_transform_are_their_own_view_without_a_warning_or_a_look_at_the_test_set(dataset):
    def evaluation_set():
        raise AssertionError("asked for")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluation_view(dataset, evaluation_set, None) is dataset


def test_a_named_transform_that_has_no_place_is_an_error():
    with pytest.raises(MisconfigurationException, match="`eval_transform` has no place: TensorDataset"):
        _view(TensorDataset(torch.zeros(2)), None, _scale)
