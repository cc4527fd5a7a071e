"""Torchvision's classification data sets, and folders of images."""

import copy
import difflib
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision.datasets
from torch.utils.data import Dataset
from torchvision.datasets.vision import StandardTransform, VisionDataset
from torchvision.transforms import v2
from typing_extensions import override

from lightning_cl.datamodules.array_dataset import ArrayDataset
from lightning_cl.datamodules.image_source import Augment, ImageSource

# Mean, standard deviation, classes and input shape of the sets that fit into memory.
_IN_MEMORY: dict[str, tuple[tuple[float, ...], tuple[float, ...], int, tuple[int, ...]]] = {
    "MNIST": ((0.1307,), (0.3081,), 10, (1, 28, 28)),
    "FashionMNIST": ((0.2860,), (0.3530,), 10, (1, 28, 28)),
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10, (3, 32, 32)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 100, (3, 32, 32)),
}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_DEFAULT_SIZE = 224
_RESIZE_RATIO = 256 / 224
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
_TRAIN_SPLITS = ("trainval", "train")
_VAL_SPLITS = ("val", "valid")
_TEST_SPLITS = ("test", *_VAL_SPLITS)


class TorchvisionData(ImageSource):
    """A classification set of `torchvision.datasets`, or a folder of images.

    MNIST, FashionMNIST, CIFAR10 and CIFAR100 are kept in memory as uint8, fetched a whole batch at a time, and
    normalised and augmented on the device. All others, and these four if `image_size` is given, are read image by
    image, as RGB of `image_size`, normalised with ImageNet's mean and standard deviation.

    Training uses the split "trainval" or "train", testing "test" or, where there is none, "val". Validation uses the
    official "val" split where it is neither of the two, else `val_fraction` of the training set.

    Args:
        dataset: Name of a class in `torchvision.datasets` that has a training and a test split and class labels, or
            "ImageFolder" for images in `root`/train/<class>/ and `root`/test/<class>/ or `root`/val/<class>/ (ImageNet
            subsets, CUB-200).
        root: Folder of the data.
        download: Download the data if they are not there.
        image_size: Side of the square images that are read one by one, in pixels. None: 224, and the four sets in
            memory as they are.
        batch_size: Training samples per batch and process.
        eval_batch_size: Samples per batch and process when validating, testing and predicting.
        num_workers: Worker processes of each loader. Sets in memory are fastest without.
        val_fraction: Share of each training class that is held out for validation where there is no official set.
        seed: Seed of that split.
        augment: Augmentation of training images: "flip" mirrors left to right; "crop" shifts by up to 4 pixels, or is a
            random resized crop where images are read one by one.
        on_device: Keep the arrays on the accelerator; for the sets in memory.

    Raises:
        ValueError: If `dataset` is unknown, has no labels or no splits, or an argument does not go with it.
        FileNotFoundError: In `setup`, if the data are not there.
    """

    def __init__(
        self,
        dataset: str = "CIFAR100",
        root: str = "data",
        download: bool = False,
        image_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: Augment = "none",
        on_device: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, val_fraction, seed, augment, on_device)
        self._dataset_class = _find_class(dataset)
        self._parts = _parts_of(self._dataset_class, dataset)
        self._in_memory = dataset in _IN_MEMORY and image_size is None
        if on_device and not self._in_memory:
            raise ValueError(
                f"`on_device=True` needs a set in memory ({', '.join(_IN_MEMORY)}, without `image_size`), got "
                f"`dataset={dataset!r}` with `image_size={image_size}`."
            )
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {image_size}.")
        if download and dataset == "ImageFolder":
            raise ValueError("`download=True` does not go with `dataset='ImageFolder'`: put the images into `root`.")
        self.dataset = dataset
        self.root = root
        self.download = download
        if dataset in _IN_MEMORY:
            self.mean, self.std, self.num_classes, self.input_shape = _IN_MEMORY[dataset]
        if not self._in_memory:
            self.image_size = image_size or _DEFAULT_SIZE
            self.mean, self.std = _IMAGENET_MEAN, _IMAGENET_STD
            self.input_shape = (3, self.image_size, self.image_size)

    @override
    def prepare_data(self) -> None:
        if self.download:
            for part in self._parts.values():
                self._dataset_class(self.root, **part, download=True)

    @override
    def load_train(self) -> Dataset[Any]:
        return self._load("train")

    @override
    def load_val(self) -> Dataset[Any] | None:
        return self._load("val") if "val" in self._find_parts() else None

    @override
    def load_test(self) -> Dataset[Any]:
        return self._load("test")

    def _load(self, role: str) -> Dataset[Any]:
        images = self._open(self._find_parts()[role])
        images.targets = _read_labels(images, self.dataset)
        classes = _class_names(images)
        known = getattr(self, "classes", classes)
        if classes != known:
            raise ValueError(f"`root`: the classes of the {role} images are {classes}, those read before are {known}.")
        self.classes, self.num_classes = classes, len(classes)
        if self._in_memory:
            return ArrayDataset(*_as_arrays(images))
        return _with_transform(images, self._train_transform() if role == "train" else self._eval_transform())

    def _open(self, part: dict[str, Any]) -> Any:
        if self.dataset == "ImageFolder":
            return self._dataset_class(str(Path(self.root, part["split"])))
        try:
            return self._dataset_class(self.root, **part)
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"`root`: no {self.dataset} under {Path(self.root).resolve()}. Give the folder of the data, or "
                "`download=True`."
            ) from error

    def _find_parts(self) -> dict[str, dict[str, Any]]:
        if self.dataset != "ImageFolder":
            return self._parts
        root = Path(self.root)
        names = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
        parts = _choose_splits(names)
        for role, allowed in (("train", _TRAIN_SPLITS), ("test", _TEST_SPLITS)):
            if role not in parts:
                wanted = " or ".join(str(root.resolve() / name) for name in allowed)
                raise FileNotFoundError(f"`root`: there is no folder {wanted}.")
        return parts

    @override
    def _evaluated(self, train: Dataset[Any]) -> Dataset[Any]:
        return train if self._in_memory else _with_transform(copy.copy(train), self._eval_transform())

    def _train_transform(self) -> v2.Compose:
        if self.augment in ("crop", "crop_flip"):
            steps: list[Any] = [v2.RandomResizedCrop(self.image_size)]
        else:
            steps = self._centre_crop()
        if self.augment in ("flip", "crop_flip"):
            steps.append(v2.RandomHorizontalFlip())
        return self._composed(steps)

    def _eval_transform(self) -> v2.Compose:
        return self._composed(self._centre_crop())

    def _centre_crop(self) -> list[Any]:
        return [v2.Resize(round(self.image_size * _RESIZE_RATIO)), v2.CenterCrop(self.image_size)]

    def _composed(self, steps: list[Any]) -> v2.Compose:
        to_float = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(self.mean, self.std),
            v2.ToPureTensor(),
        ]
        return v2.Compose([v2.RGB(), *steps, *to_float])


def _find_class(name: str) -> type[VisionDataset]:
    known = {
        key: value
        for key, value in vars(torchvision.datasets).items()
        if inspect.isclass(value) and issubclass(value, VisionDataset) and value is not VisionDataset
    }
    if name not in known:
        by_lower = {key.lower(): key for key in known}
        nearest = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower)]
        hint = f" Nearest names: {', '.join(nearest)}." if nearest else ""
        raise ValueError(f"`dataset` must be a data set of torchvision.datasets, got {name!r}.{hint}")
    return known[name]


def _parts_of(dataset_class: type[VisionDataset], name: str) -> dict[str, dict[str, Any]]:
    """Return the constructor arguments that open the training, the test and, if there is one, the validation set."""
    if name == "ImageFolder":
        return {}
    parameters = inspect.signature(dataset_class).parameters
    required = {
        key for key, value in parameters.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD
    }
    parts: dict[str, dict[str, Any]] = {}
    if required == {"root"} and "train" in parameters:
        parts = {"train": {"train": True}, "test": {"train": False}}
    elif required == {"root"} and "split" in parameters:
        parts = _choose_splits({split for split in (*_TRAIN_SPLITS, *_TEST_SPLITS) if _has_split(dataset_class, split)})
    if not {"train", "test"} <= set(parts):
        raise ValueError(
            f"`dataset`: torchvision's {name} has no training and test split. Put its images into folders "
            "`root`/train/<class>/ and `root`/test/<class>/, and use `dataset='ImageFolder'`."
        )
    return parts


def _choose_splits(names: set[str]) -> dict[str, dict[str, Any]]:
    """Say which of the splits is used for what; the official validation split only where it is not used otherwise."""
    chosen = {}
    for role, candidates in (("train", _TRAIN_SPLITS), ("test", _TEST_SPLITS), ("val", _VAL_SPLITS)):
        found = [name for name in candidates if name in names]
        if found:
            chosen[role] = {"split": found[0]}
    if chosen.get("train") != {"split": "train"} or chosen.get("test") != {"split": "test"}:
        chosen.pop("val", None)
    return chosen


def _has_split(dataset_class: type[VisionDataset], split: str) -> bool:
    """Whether the class knows a split; torchvision checks the name before it looks for the data."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            dataset_class(empty, split=split)
        except ValueError:
            return False
        except Exception:  # whatever a class raises when its files are missing
            return True
    return True


def _read_labels(images: Any, name: str) -> list[int]:
    for attribute in _LABEL_ATTRIBUTES:
        if getattr(images, attribute, None) is not None:
            return [int(label) for label in getattr(images, attribute)]
    samples = getattr(images, "_samples", None)
    if samples and isinstance(samples[0], tuple) and isinstance(samples[0][-1], int):
        return [label for *_, label in samples]
    raise ValueError(f"`dataset`: {name} has no class labels; looked for {', '.join(_LABEL_ATTRIBUTES)}.")


def _class_names(images: Any) -> tuple[str, ...]:
    names = getattr(images, "classes", None) or getattr(images, "class_to_idx", None)
    if not names:
        return tuple(map(str, range(max(images.targets) + 1)))
    # ImageNet gives a tuple of synonyms for each class.
    return tuple(name if isinstance(name, str) else str(name[0]) for name in names)


def _as_arrays(images: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.as_tensor(images.data)
    if pixels.dim() == 4:
        pixels = pixels.movedim(-1, 1).contiguous()
    return pixels, torch.tensor(images.targets)


def _with_transform(images: Any, transform: v2.Compose) -> Dataset[Any]:
    images.transform = transform
    images.transforms = StandardTransform(transform, images.target_transform)
    result: Dataset[Any] = images
    return result
