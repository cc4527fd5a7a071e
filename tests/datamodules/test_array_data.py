from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits

from lightning_cl.datamodules.array_data import ArrayData
from lightning_cl.models import ImageClassifier

CIFAR100 = Path(__file__).parents[2].parent / "shared" / "data" / "cifar100"


@pytest.fixture
def digits():
    data = load_digits()
    return (data.images * 15).astype(np.uint8), data.target.astype(np.int32)


@pytest.fixture
def folder(tmp_path, digits):
    """The digits as two training files and one test file, each as ``.npz`` and as ``.npy`` pair."""
    for name, rows in (("a", slice(0, 600)), ("b", slice(600, 1200)), ("test", slice(1200, None))):
        images, labels = digits[0][rows], digits[1][rows]
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
        np.save(tmp_path / f"{name}_x.npy", images)
        np.save(tmp_path / f"{name}_y.npy", labels)
    return tmp_path


def _npz(folder, **kwargs):
    return ArrayData(train=[folder / "a.npz", folder / "b.npz"], test=folder / "test.npz", **kwargs)


def _npy(folder, **kwargs):
    return ArrayData(
        train=[folder / "a_x.npy", folder / "b_x.npy"],
        train_labels=[folder / "a_y.npy", folder / "b_y.npy"],
        test=str(folder / "test_x.npy"),
        test_labels=str(folder / "test_y.npy"),
        **kwargs,
    )


def _save(folder, images, labels, name="train"):
    np.savez(folder / f"{name}.npz", images=images, labels=labels)
    return str(folder / f"{name}.npz")


def _ready(data, stage="fit"):
    data.setup(stage)
    return data


@pytest.mark.parametrize("make", [_npz, _npy])
def test_several_files_make_one_set_in_order(make, folder, digits):
    data = _ready(make(folder, val_fraction=0.0))
    train = data.train_dataloader().dataset
    images, labels = train.__getitems__([1199, 0, 600, 599])
    assert len(train) == 1200
    assert np.array_equal(images[:, 0].numpy(), digits[0][[1199, 0, 600, 599]])
    assert labels.tolist() == digits[1][[1199, 0, 600, 599]].tolist()


def test_npy_files_stay_memory_mapped(folder):
    data = _ready(_npy(folder))
    assert all(isinstance(array, np.memmap) for array in data.train_dataloader().dataset.dataset.arrays)


@pytest.mark.parametrize("make", [_npz, _npy])
def test_mean_and_standard_deviation_come_from_the_training_files(make, folder, digits):
    data = _ready(make(folder))
    pixels = digits[0][:1200] / 255
    assert data.mean == pytest.approx((pixels.mean(),))
    assert data.std == pytest.approx((pixels.std(),))


def test_a_test_without_a_fit_uses_the_training_files_statistics(folder):
    data = _ready(_npz(folder), "test")
    assert data.mean == _ready(_npz(folder)).mean
    assert data.num_classes == 10
    assert len(data.test_dataloader().dataset) == 597


def test_given_statistics_and_class_names_are_kept(folder):
    data = _ready(_npz(folder, mean=[0.5], std=[0.25], classes=list("abcdefghij")))
    assert (data.mean, data.std) == ((0.5,), (0.25,))
    assert data.classes == tuple("abcdefghij")


def test_a_validation_file_is_used_instead_of_a_split(folder):
    data = _ready(ArrayData(train=folder / "a.npz", val=folder / "b.npz"))
    assert len(data.train_dataloader().dataset) == len(data.val_dataloader().dataset) == 600


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((5, 8, 6), "auto", (1, 8, 6)),
        ((5, 8, 6, 3), "auto", (3, 8, 6)),
        ((5, 3, 8, 6), "auto", (3, 8, 6)),
        ((5, 2, 8, 4), "auto", (4, 2, 8)),
        ((5, 2, 8, 4), "nchw", (2, 8, 4)),
        ((5, 8, 6, 2), "nhwc", (2, 8, 6)),
    ],
)
def test_layouts_all_come_out_channels_first(shape, layout, expected, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = _ready(ArrayData(_save(tmp_path, images, np.array([0, 0, 1, 1, 1])), layout=layout))
    assert data.input_shape == expected
    assert len(data.mean) == len(data.std) == expected[0]
    assert next(iter(data.train_dataloader()))[0].shape[1:] == expected


def test_float_features_are_used_as_they_are(tmp_path):
    features = np.random.default_rng(0).random((40, 7))
    data = _ready(ArrayData(_save(tmp_path, features, np.arange(40) % 4), val_fraction=0.0))
    batch = data.train_dataloader().dataset.__getitems__([3])
    inputs, _ = data.on_after_batch_transfer(batch, 0)
    assert inputs.dtype == torch.float32
    assert np.allclose(inputs[0], features[3])
    assert data.input_shape == (7,)


@pytest.mark.parametrize("make", [_npz, _npy])
def test_a_classifier_learns_from_files(make, folder):
    torch.manual_seed(0)
    data, model = make(folder, batch_size=32), ImageClassifier("mlp", input_shape=(1, 8, 8))
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=3, **settings)
    trainer.fit(model, datamodule=data)
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"] > 0.85


@pytest.mark.data
@pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not beside the checkout")
def test_cifar100_in_three_files_is_one_set_with_the_known_statistics():
    data = ArrayData(
        train=[CIFAR100 / f"train-{i}.npz" for i in range(3)], test=CIFAR100 / "test.npz", augment="crop_flip"
    )
    data.setup("fit")
    data.setup("test")
    assert data.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=1e-4)
    assert data.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=1e-4)
    assert (data.num_classes, data.input_shape) == (100, (3, 32, 32))
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sizes == [45000, 5000, 10000]


def test_the_command_line_takes_one_file_or_a_list(folder):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ArrayData, "data")
    config = parser.parse_args(
        ["--data=ArrayData", f'--data.train=["{folder}/a.npz", "{folder}/b.npz"]', f"--data.test={folder}/test.npz"]
    )
    data = _ready(parser.instantiate_classes(config).data)
    assert len(data.train_dataloader().dataset.dataset) == 1200


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"train": []}, "`train` must name at least one file"),
            ({"train": "x.npy"}, "`train` without `train_labels` must be .npz files, got x.npy"),
            ({"train": "x.npz", "train_labels": "y.npy"}, "`train` with `train_labels` must be .npy files, got x.npz"),
            ({"train": ["a.npy", "b.npy"], "train_labels": "y.npy"}, "`train` has 2 files, `train_labels` has 1"),
            ({"train": "x.npz", "test_labels": "y.npy"}, "`test_labels` was given without `test`"),
            ({"train": "x.npz", "mean": [0.5]}, "`mean` and `std` go together"),
            ({"train": "x.npz", "layout": "hwc"}, "`layout` must be 'auto', 'nhwc' or 'nchw', got 'hwc'"),
        ],
    )
    def test_arguments_that_do_not_go_together(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ArrayData(**arguments)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"`train`: there is no file {tmp_path}/none.npz"):
            ArrayData(tmp_path / "none.npz").setup("fit")

    def test_a_missing_key_shows_the_keys_that_are_there(self, folder):
        with pytest.raises(ValueError, match=r"`images`: .*a.npz has no key 'x'; its keys are images, labels"):
            ArrayData(folder / "a.npz", images="x").setup("fit")

    def test_a_truncated_file_is_named(self, folder):
        path = folder / "a.npz"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"`train`: .*a.npz is no complete .npz file"):
            ArrayData(path).setup("fit")

    def test_different_lengths_are_shown(self, tmp_path):
        path = _save(tmp_path, np.zeros((5, 8, 8), np.uint8), np.zeros(4, int))
        with pytest.raises(ValueError, match=r"train.npz has 5 inputs, but its labels have shape \(4,\)"):
            ArrayData(path).setup("fit")

    def test_float_labels_and_integer_images_are_refused(self, tmp_path):
        images, labels = np.zeros((5, 8, 8), np.uint8), np.zeros(5, int)
        with pytest.raises(TypeError, match=r"labels for .* have type float64; allowed are integers"):
            ArrayData(_save(tmp_path, images, labels.astype(float))).setup("fit")
        with pytest.raises(TypeError, match=r"inputs in .* have type int32; allowed are uint8 and floats"):
            ArrayData(_save(tmp_path, images.astype(np.int32), labels)).setup("fit")

    def test_flat_uint8_images_are_refused_with_their_shape(self, tmp_path):
        with pytest.raises(ValueError, match=r"have shape \(5, 64\); allowed are"):
            ArrayData(_save(tmp_path, np.zeros((5, 64), np.uint8), np.zeros(5, int))).setup("fit")

    def test_files_of_different_shapes_are_refused(self, tmp_path):
        paths = [_save(tmp_path, np.zeros((5, n, n), np.uint8), np.zeros(5, int), name=f"n{n}") for n in (8, 9)]
        with pytest.raises(ValueError, match=r"n9.npz holds inputs of shape \(9, 9\)"):
            ArrayData(paths).setup("fit")
        with pytest.raises(ValueError, match=r"`test` holds inputs of shape \(1, 9, 9\)"):
            ArrayData(paths[0], test=paths[1]).setup("test")

    def test_test_labels_that_training_does_not_have_are_refused(self, tmp_path):
        train = _save(tmp_path, np.zeros((5, 8, 8), np.uint8), np.arange(5))
        test = _save(tmp_path, np.zeros((5, 8, 8), np.uint8), np.arange(1, 6), name="test")
        with pytest.raises(ValueError, match="`test`: labels must be 0 to 4, got 1 to 5"):
            ArrayData(train, test=test).setup("test")

    def test_augmenting_features_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`augment`, `mean` and `std` are for uint8 images"):
            ArrayData(_save(tmp_path, np.zeros((5, 7)), np.arange(5)), augment="flip").setup("fit")

    def test_statistics_for_another_number_of_channels_are_refused(self, folder):
        with pytest.raises(ValueError, match="`mean` and `std` need one value for each of the 1 channels"):
            _npz(folder, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]).setup("fit")

    def test_testing_without_test_files_says_so(self, folder):
        with pytest.raises(Exception, match="`test` was not given to ArrayData"):
            ArrayData(folder / "a.npz").setup("test")
