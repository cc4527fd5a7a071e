import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, default_collate

from lightning_cl.datamodules.array_dataset import ArrayDataset, collate


def _random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def nhwc_file(tmp_path):
    np.save(tmp_path / "images.npy", _random_images(20, 6, 5, 3))
    return tmp_path / "images.npy"


@pytest.mark.parametrize(
    ("images", "channels_last", "shape"),
    [
        (torch.from_numpy(_random_images(20, 3, 6, 5)), False, (3, 6, 5)),
        (_random_images(20, 6, 5, 3), True, (3, 6, 5)),
        (_random_images(20, 6, 5), False, (1, 6, 5)),
        (np.random.default_rng(0).random((20, 7)), False, (7,)),
        ([_random_images(8, 6, 5), _random_images(12, 6, 5)], False, (1, 6, 5)),
    ],
    ids=["nchw", "nhwc", "nhw", "features", "two arrays"],
)
def test_a_batch_by_one_index_equals_the_stacked_samples(images, channels_last, shape):
    dataset = ArrayDataset(images, np.arange(20), channels_last)
    indices = [7, 0, 19, 7, 8]
    batch, labels = dataset.__getitems__(indices)
    expected_batch, expected_labels = default_collate([dataset[i] for i in indices])
    assert batch.shape == (5, *shape)
    assert dataset.sample_shape == shape
    assert labels.tolist() == indices
    assert batch.equal(expected_batch)
    assert labels.equal(expected_labels)


def test_channels_last_arrays_come_out_channels_first():
    images = _random_images(4, 6, 5, 3)
    batch, _ = ArrayDataset(images, np.arange(4), channels_last=True).__getitems__([2])
    assert np.array_equal(batch[0].numpy(), images[2].transpose(2, 0, 1))


def test_images_keep_uint8_and_float_features_become_float32():
    assert ArrayDataset(_random_images(4, 6, 5), np.arange(4)).__getitems__([0])[0].dtype == torch.uint8
    assert ArrayDataset(np.zeros((4, 2)), np.arange(4)).__getitems__([0])[0].dtype == torch.float32


def test_a_loader_over_a_subset_gives_the_batches_that_single_samples_make():
    dataset = ArrayDataset(_random_images(20, 6, 5), np.arange(20))
    subset = Subset(dataset, list(range(19, 4, -1)))
    batches = list(DataLoader(subset, batch_size=4, collate_fn=collate))
    singles = list(DataLoader([subset[i] for i in range(len(subset))], batch_size=4, collate_fn=collate))
    assert len(batches) == len(singles) == 4
    for (images, labels), (single_images, single_labels) in zip(batches, singles, strict=True):
        assert images.equal(single_images)
        assert labels.equal(single_labels)


def test_targets_are_one_long_tensor_and_the_evaluation_view_is_the_set_itself():
    dataset = ArrayDataset(_random_images(4, 6, 5), np.array([3, 1, 0, 2], dtype=np.int16))
    assert dataset.targets.dtype == torch.long
    assert dataset.targets.tolist() == [3, 1, 0, 2]
    assert dataset.evaluation_view() is dataset


def test_iterating_ends_after_the_last_sample():
    assert len(list(ArrayDataset(_random_images(4, 6, 5), np.arange(4)))) == 4


def test_an_index_past_the_end_is_an_error():
    with pytest.raises(IndexError):
        ArrayDataset(_random_images(4, 6, 5), np.arange(4))[4]


def test_a_memory_map_stays_one_through_indexing_and_pickling(nhwc_file):
    dataset = ArrayDataset(np.load(nhwc_file, mmap_mode="r"), np.arange(20), channels_last=True)
    pickled = pickle.dumps(dataset)
    copy = pickle.loads(pickled)
    assert isinstance(dataset.arrays[0], np.memmap)
    assert isinstance(copy.arrays[0], np.memmap)
    assert len(pickled) < nhwc_file.stat().st_size + 1000
    assert copy.__getitems__([3, 1])[0].equal(dataset.__getitems__([3, 1])[0])


def test_moving_memory_maps_to_a_device_reads_them_whole_and_changes_no_batch(nhwc_file):
    mapped = np.load(nhwc_file, mmap_mode="r")
    dataset = ArrayDataset([mapped, mapped], np.arange(40), channels_last=True)
    before, labels_before = dataset.__getitems__([30, 1])
    dataset.to(torch.device("cpu"))
    images, labels = dataset.__getitems__([30, 1])
    assert [type(array) for array in dataset.arrays] == [torch.Tensor]
    assert images.equal(before)
    assert labels.equal(labels_before)


def test_a_different_number_of_labels_is_an_error():
    with pytest.raises(ValueError, match="`labels` has 3 entries for 4 `images`"):
        ArrayDataset(_random_images(4, 6, 5), np.arange(3))
