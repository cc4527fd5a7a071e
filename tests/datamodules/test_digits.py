import torch

from lightning_cl.datamodules.digits import Digits


def _everything(dataset):
    return dataset.__getitems__(range(len(dataset)))


def _whole_training_set():
    digits = Digits(val_fraction=0.0)
    digits.setup("fit")
    return digits, digits.train_dataloader().dataset


def test_a_fifth_of_each_class_is_the_test_set_whatever_the_seed():
    sets = []
    for seed in (0, 1):
        digits = Digits(seed=seed)
        digits.setup("test")
        sets.append(_everything(digits.test_dataloader().dataset))
    (images, labels), (other_images, other_labels) = sets
    assert images.equal(other_images)
    assert labels.equal(other_labels)
    assert len(labels) == 359
    assert set(labels.bincount().tolist()) <= {35, 36, 37}


def test_training_and_test_images_are_different_rows_of_the_1797():
    digits, train = _whole_training_set()
    digits.setup("test")
    images = torch.cat([_everything(train)[0], _everything(digits.test_dataloader().dataset)[0]])
    assert len(images) == 1797
    assert images.shape[1:] == digits.input_shape
    assert images.dtype == torch.uint8
    assert images.max() == 255


def test_normalised_training_data_have_mean_0_and_standard_deviation_1():
    digits, train = _whole_training_set()
    inputs = digits.on_after_batch_transfer(_everything(train), 0)[0]
    assert abs(inputs.mean().item()) < 1e-3
    assert abs(inputs.std().item() - 1) < 1e-3


def test_class_names_are_known_before_setup():
    assert Digits().classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert Digits().num_classes == 10
