from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision.datasets
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.datasets.vision import VisionDataset

from lightning_cl.datamodules.array_dataset import ArrayDataset
from lightning_cl.datamodules.torchvision_data import TorchvisionData
from lightning_cl.models import ImageClassifier

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def image_folder(tmp_path):
    """Twelve red and twelve blue training images, six of each to test on; sizes differ, and some are grey or RGBA."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", tuple(rng.integers(20, 40, 2).tolist()), colour)
                (image.convert("RGBA") if i == 0 else image).save(folder / f"{i}.png")
    return tmp_path


def _folder_data(root, **kwargs):
    return TorchvisionData("ImageFolder", str(root), image_size=16, batch_size=8, **kwargs)


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "FashionMNIST").is_dir(), reason="FashionMNIST is not beside the checkout")
class TestFashionMNIST:
    def test_it_is_read_into_memory_and_split(self):
        data = TorchvisionData("FashionMNIST", str(DATA))
        data.setup("fit")
        data.setup("test")
        train, val, test = (
            loader.dataset for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        )
        assert (len(train), len(val), len(test)) == (54000, 6000, 10000)
        assert isinstance(train.dataset, ArrayDataset)
        assert test.sample_shape == data.input_shape == (1, 28, 28)
        assert data.classes[9] == "Ankle boot"
        assert data.num_classes == 10

    def test_normalised_training_data_have_mean_0_and_standard_deviation_1(self):
        data = TorchvisionData("FashionMNIST", str(DATA), val_fraction=0.0)
        data.setup("fit")
        train = data.train_dataloader().dataset
        inputs = data.on_after_batch_transfer(train.__getitems__(range(len(train))), 0)[0]
        assert abs(inputs.mean().item()) < 1e-3
        assert abs(inputs.std().item() - 1) < 1e-3

    def test_an_image_size_reads_image_by_image_as_rgb(self):
        data = TorchvisionData("FashionMNIST", str(DATA), image_size=32, batch_size=4)
        data.setup("test")
        images, labels = next(iter(data.test_dataloader()))
        assert images.shape[1:] == data.input_shape == (3, 32, 32)
        assert images.dtype == torch.float32
        assert labels[:4].tolist() == [9, 2, 1, 1]


def test_image_folders_give_normalised_rgb_of_one_size(image_folder):
    data = _folder_data(image_folder)
    data.setup("fit")
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (12, 3, 16, 16)
    assert labels.tolist() == [0] * 6 + [1] * 6
    assert (data.classes, data.num_classes) == (("blue", "red"), 2)
    torch.testing.assert_close(
        images[-1, :, 8, 8], (torch.tensor([1.0, 0, 0]) - torch.tensor(data.mean)) / torch.tensor(data.std)
    )


def test_image_folders_without_a_val_folder_validate_on_a_share_of_each_training_class(image_folder):
    data = _folder_data(image_folder, val_fraction=0.25)
    data.setup("fit")
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert not set(train.indices) & set(val.indices)
    assert [train.dataset.targets[i] for i in val.indices] == [0] * 3 + [1] * 3
    assert len(train) == 18


def test_a_val_folder_beside_a_test_folder_is_the_validation_set(image_folder):
    (image_folder / "val").symlink_to(image_folder / "test", target_is_directory=True)
    data = _folder_data(image_folder)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 24
    assert len(data.val_dataloader().dataset) == 12


def test_a_val_folder_without_a_test_folder_is_the_test_set(image_folder):
    (image_folder / "test").rename(image_folder / "val")
    data = _folder_data(image_folder)
    data.setup("fit")
    data.setup("test")
    assert len(data.test_dataloader().dataset) == 12
    assert len(data.val_dataloader().dataset) == 2


def test_only_the_training_view_of_images_augments(image_folder):
    data = _folder_data(image_folder, augment="crop_flip")
    data.setup("fit")
    train, val = data.train_dataloader().dataset.dataset, data.val_dataloader().dataset.dataset
    names = [[type(step).__name__ for step in view.transform.transforms] for view in (train, val)]
    assert type(train) is type(val)
    assert "RandomResizedCrop" in names[0]
    assert "RandomHorizontalFlip" in names[0]
    assert not any(name.startswith("Random") for name in names[1])


def test_a_classifier_tells_red_folders_from_blue_ones(image_folder):
    data = _folder_data(image_folder)
    model = ImageClassifier("mlp", num_classes=2, input_shape=(3, 16, 16))
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, **settings)
    trainer.fit(model, datamodule=data)
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"] == 1.0


class _Fake(VisionDataset):
    """Six images of three classes, with the labels where FGVCAircraft keeps them; it needs `download=True` once."""

    known_splits = ("trainval", "test")
    downloaded: ClassVar[list[str]] = []

    def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
        super().__init__(root, transform=transform, target_transform=target_transform)
        if split not in self.known_splits:
            raise ValueError(f"Unknown value '{split}' for argument split.")
        if download:
            Path(root, "done").touch()
            self.downloaded.append(split)
        if not Path(root, "done").exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self._labels = [0, 1, 2, 0, 1, 2]
        self.class_to_idx = {"a": 0, "b": 1, "c": 2}

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.transform(Image.new("L", (20, 20), 40 * index)), self._labels[index]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Fake", _Fake, raising=False)
    monkeypatch.setattr(_Fake, "downloaded", [])


@pytest.mark.usefixtures("fake")
class TestAnySplitDataset:
    def test_labels_are_exposed_as_targets_and_grey_images_become_rgb(self, tmp_path):
        data = TorchvisionData("Fake", str(tmp_path), download=True, image_size=16, val_fraction=0.5)
        data.prepare_data()
        data.setup("fit")
        train = data.train_dataloader().dataset
        assert train.dataset.targets == [0, 1, 2, 0, 1, 2]
        assert train[0][0].shape == (3, 16, 16)
        assert (len(train), len(data.val_dataloader().dataset)) == (3, 3)
        assert data.classes == ("a", "b", "c")

    def test_only_prepare_data_downloads(self, tmp_path):
        data = TorchvisionData("Fake", str(tmp_path), download=True)
        with pytest.raises(FileNotFoundError):
            data.setup("fit")
        data.prepare_data()
        assert _Fake.downloaded == ["trainval", "test"]
        data.setup("fit")
        assert _Fake.downloaded == ["trainval", "test"]

    def test_without_download_nothing_is_fetched_and_the_error_names_the_folder(self, tmp_path):
        data = TorchvisionData("Fake", str(tmp_path))
        data.prepare_data()
        with pytest.raises(FileNotFoundError, match=rf"`root`: no Fake under {tmp_path}.*`download=True`"):
            data.setup("fit")

    def test_the_official_validation_set_is_used_where_training_and_test_leave_it_free(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_Fake, "known_splits", ("train", "val", "test"))
        data = TorchvisionData("Fake", str(tmp_path), download=True, val_fraction=0.5)
        data.prepare_data()
        data.setup("fit")
        assert len(data.train_dataloader().dataset) == len(data.val_dataloader().dataset) == 6


@pytest.mark.parametrize("name", ["FGVCAircraft", "SVHN", "STL10", "Food101", "ImageNet", "USPS", "GTSRB"])
def test_torchvisions_classification_sets_are_accepted_by_name(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`root`: no {name} under"):
        TorchvisionData(name, str(tmp_path)).setup("fit")


def test_missing_arrays_name_the_folder_that_was_looked_at(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`root`: no CIFAR100 under {tmp_path}"):
        TorchvisionData("CIFAR100", str(tmp_path)).setup("fit")


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`root`: there is no folder {tmp_path}/trainval or {tmp_path}/train"):
        _folder_data(tmp_path).setup("fit")


def test_classes_that_differ_between_folders_are_an_error(image_folder):
    (image_folder / "test" / "red").rename(image_folder / "test" / "rose")
    data = _folder_data(image_folder)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"the classes of the test images are \('blue', 'rose'\)"):
        data.setup("test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "Cifar_100"}, "got 'Cifar_100'. Nearest names: CIFAR100"),
        ({"dataset": "EuroSAT"}, "EuroSAT has no training and test split"),
        ({"dataset": "FGVCAircraft", "on_device": True}, "`on_device=True` needs a set in memory"),
        ({"dataset": "CIFAR10", "image_size": 64, "on_device": True}, "`on_device=True` needs a set in memory"),
        ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
        ({"dataset": "ImageFolder", "download": True}, "`download=True` does not go with `dataset='ImageFolder'`"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionData(**arguments)
