"""Images or feature vectors in ``.npz`` and ``.npy`` files."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from typing_extensions import override

from lightning_cl.datamodules.array_dataset import ArrayDataset
from lightning_cl.datamodules.image_source import Augment, ImageSource

Layout = Literal["auto", "nhwc", "nchw"]
Files = str | Path | Sequence[str | Path]

_CHUNK = 1024
_CHANNEL_COUNTS = (1, 3, 4)


class ArrayData(ImageSource):
    """Data in numpy files.

    Either every file of a set is an ``.npz`` that holds inputs and labels under the keys `images` and `labels`, or the
    inputs are ``.npy`` files and the labels are ``.npy`` files given beside them. Several files make one set, in order.
    ``.npy`` inputs are memory-mapped and may be larger than the memory; ``.npz`` files are read whole.

    Inputs are uint8 images, ``(samples, height, width)`` or with channels first or last, or floats of any kind, which
    are neither normalised nor augmented: feature vectors ``(samples, features)``, or images in the layouts above.

    Args:
        train: File or files of the training set.
        val: File or files of the validation set. None takes `val_fraction` of the training set.
        test: File or files of the test set.
        train_labels: ``.npy`` file or files with the labels for `train`, as many as there are files in `train`.
        val_labels: The same for `val`.
        test_labels: The same for `test`.
        images: Key of the inputs in ``.npz`` files.
        labels: Key of the labels in ``.npz`` files.
        layout: Where 4-dimensional arrays have their channels. "auto" takes them to be last ("nhwc") if the last
            dimension is 1, 3 or 4, else first ("nchw").
        mean: Mean of each channel, of pixels in [0, 1]. None computes it from the training set.
        std: Standard deviation of each channel, of pixels in [0, 1]. None computes it from the training set.
        classes: Names of the classes in the order of the labels. None numbers them, up to the largest training label.
        batch_size: Training samples per batch and process.
        eval_batch_size: Samples per batch and process when validating, testing and predicting.
        num_workers: Worker processes of each loader.
        val_fraction: Share of each training class that is held out for validation if `val` is None.
        seed: Seed of that split.
        augment: Augmentation of training images: "flip" mirrors left to right, "crop" shifts by up to 4 pixels.
        on_device: Keep the arrays on the accelerator; memory-maps are then read whole.

    Raises:
        ValueError: If arguments do not go together, or, in `setup`, if the arrays do not.
        FileNotFoundError: In `setup`, if a file does not exist.
        TypeError: In `setup`, if an array has a type that is not allowed.
    """

    def __init__(
        self,
        train: Files,
        val: Files | None = None,
        test: Files | None = None,
        train_labels: Files | None = None,
        val_labels: Files | None = None,
        test_labels: Files | None = None,
        images: str = "images",
        labels: str = "labels",
        layout: Layout = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: Augment = "none",
        on_device: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, val_fraction, seed, augment, on_device)
        if layout not in ("auto", "nhwc", "nchw"):
            raise ValueError(f"`layout` must be 'auto', 'nhwc' or 'nchw', got {layout!r}.")
        if (mean is None) != (std is None):
            raise ValueError("`mean` and `std` go together: give both or neither.")
        self.layout = layout
        self.keys = (images, labels)
        self._files = {
            "train": _pair_files("train", train, train_labels),
            "val": _pair_files("val", val, val_labels),
            "test": _pair_files("test", test, test_labels),
        }
        self._train_was_read = False
        if mean is not None and std is not None:
            self.mean, self.std = tuple(mean), tuple(std)
        if classes is not None:
            self.classes, self.num_classes = tuple(classes), len(classes)

    @override
    def load_train(self) -> ArrayDataset:
        train = self._load("train")
        if not hasattr(self, "classes"):
            self.num_classes = int(train.targets.max()) + 1
            self.classes = tuple(map(str, range(self.num_classes)))
        self._check_labels("train", train)
        self._train_was_read = True
        return train

    @override
    def load_val(self) -> ArrayDataset | None:
        return self._load_other("val") if self._files["val"] else None

    @override
    def load_test(self) -> ArrayDataset:
        if not self._files["test"]:
            raise MisconfigurationException("`test` was not given to ArrayData: there is nothing to test on.")
        return self._load_other("test")

    def _load_other(self, role: str) -> ArrayDataset:
        if not self._train_was_read:
            self.load_train()  # a test on its own: classes, shape and mean are those of the training set
        dataset = self._load(role)
        self._check_labels(role, dataset)
        return dataset

    def _load(self, role: str) -> ArrayDataset:
        pairs = [self._read(role, images, labels) for images, labels in self._files[role]]
        inputs, labels = [pair[0] for pair in pairs], np.concatenate([pair[1] for pair in pairs])
        names = [str(path) for path, _ in self._files[role]]
        for name, array in zip(names, inputs, strict=True):
            if array.shape[1:] != inputs[0].shape[1:] or array.dtype != inputs[0].dtype:
                raise ValueError(
                    f"`{role}`: {name} holds inputs of shape {array.shape[1:]} and type {array.dtype}, {names[0]} "
                    f"those of shape {inputs[0].shape[1:]} and type {inputs[0].dtype}."
                )
        if len(inputs) > 1 and not any(isinstance(array, np.memmap) for array in inputs):
            inputs = [np.concatenate(inputs)]  # one array in memory is faster to index than several
        dataset = ArrayDataset(inputs, labels, channels_last=self._has_channels_last(inputs[0]))
        if len(dataset) == 0:
            raise ValueError(f"`{role}`: no samples in {', '.join(names)}.")
        self._describe(role, dataset, inputs)
        return dataset

    def _read(self, role: str, path: Path, labels_path: Path | None) -> tuple[NDArray[Any], NDArray[Any]]:
        if labels_path is None:
            images, labels = _read_npz(role, path, self.keys)
        else:
            images, labels = _read_npy(role, path, mapped=True), _read_npy(f"{role}_labels", labels_path)
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise TypeError(f"`{role}`: inputs in {path} have type {images.dtype}; allowed are uint8 and floats.")
        if images.ndim not in ((3, 4) if images.dtype == np.uint8 else (2, 3, 4)):
            raise ValueError(
                f"`{role}`: inputs in {path} have shape {images.shape}; allowed are (samples, height, width), "
                "(samples, height, width, channels), (samples, channels, height, width) and, for floats, "
                "(samples, features)."
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"`{role}`: labels for {path} have type {labels.dtype}; allowed are integers.")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"`{role}`: {path} has {len(images)} inputs, but its labels have shape {labels.shape}.")
        return images, labels.astype(np.int64)

    def _has_channels_last(self, array: NDArray[Any]) -> bool:
        if self.layout == "auto":
            return array.ndim == 4 and array.shape[-1] in _CHANNEL_COUNTS
        return array.ndim == 4 and self.layout == "nhwc"

    def _describe(self, role: str, dataset: ArrayDataset, inputs: list[NDArray[Any]]) -> None:
        shape = dataset.sample_shape
        if getattr(self, "input_shape", shape) != shape:
            raise ValueError(f"`{role}` holds inputs of shape {shape}, the other sets those of {self.input_shape}.")
        self.input_shape = shape
        if inputs[0].dtype != np.uint8:
            if self.augment != "none" or hasattr(self, "mean"):
                raise ValueError(
                    "`augment`, `mean` and `std` are for uint8 images; the inputs in `train` have type "
                    f"{inputs[0].dtype}, and are used as they are."
                )
            return
        if not hasattr(self, "mean"):
            self.mean, self.std = _channel_statistics(inputs, dataset.channels_last)
        if len(self.mean) != shape[0] or len(self.std) != shape[0]:
            raise ValueError(
                f"`mean` and `std` need one value for each of the {shape[0]} channels, got {self.mean} and {self.std}."
            )

    def _check_labels(self, role: str, dataset: ArrayDataset) -> None:
        low, high = int(dataset.targets.min()), int(dataset.targets.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"`{role}`: labels must be 0 to {self.num_classes - 1}, got {low} to {high}.")


def _pair_files(name: str, files: Files | None, labels: Files | None) -> list[tuple[Path, Path | None]]:
    if files is None:
        if labels is not None:
            raise ValueError(f"`{name}_labels` was given without `{name}`.")
        return []
    paths, label_paths = _as_paths(files), _as_paths(labels) if labels is not None else []
    suffix = ".npy" if label_paths else ".npz"
    wrong = [str(path) for path in paths if path.suffix != suffix]
    if wrong:
        rule = "with" if label_paths else "without"
        raise ValueError(f"`{name}` {rule} `{name}_labels` must be {suffix} files, got {', '.join(wrong)}.")
    if not paths:
        raise ValueError(f"`{name}` must name at least one file.")
    if not label_paths:
        return [(path, None) for path in paths]
    if len(label_paths) != len(paths):
        raise ValueError(f"`{name}` has {len(paths)} files, `{name}_labels` has {len(label_paths)}.")
    return list(zip(paths, label_paths, strict=True))


def _as_paths(files: Files) -> list[Path]:
    return [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]


def _read_npz(role: str, path: Path, keys: tuple[str, str]) -> tuple[NDArray[Any], NDArray[Any]]:
    _check_exists(role, path)
    try:
        with np.load(path) as archive:
            for argument, key in zip(("images", "labels"), keys, strict=True):
                if key not in archive:
                    raise ValueError(f"`{argument}`: {path} has no key {key!r}; its keys are {', '.join(archive)}.")
            return archive[keys[0]], archive[keys[1]]
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"`{role}`: {path} is no complete .npz file.") from error


def _read_npy(role: str, path: Path, mapped: bool = False) -> NDArray[Any]:
    _check_exists(role, path)
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None)
    except (ValueError, EOFError) as error:
        raise ValueError(f"`{role}`: {path} is no complete .npy file of numbers.") from error
    return array


def _check_exists(role: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"`{role}`: there is no file {path.resolve()}.")


def _channel_statistics(arrays: list[NDArray[Any]], channels_last: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images, exactly, in one pass over the files."""
    axis = -1 if channels_last else 1
    channels = arrays[0].shape[axis] if arrays[0].ndim == 4 else 1
    counts = np.zeros((channels, 256), dtype=np.int64)
    for array in arrays:
        for start in range(0, len(array), _CHUNK):
            chunk = np.asarray(array[start : start + _CHUNK])
            planes = np.moveaxis(chunk, axis, 0) if chunk.ndim == 4 else chunk[None]
            for channel, plane in enumerate(planes):
                counts[channel] += np.bincount(plane.reshape(-1), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    mean = share @ levels
    std = np.sqrt(((levels - mean[:, None]) ** 2 * share).sum(axis=1))
    std[std == 0] = 1.0  # a constant channel: nothing to scale
    return tuple(mean.tolist()), tuple(std.tolist())
