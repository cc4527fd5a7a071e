"""What all data sources share: loaders, the validation split, and the work on a batch on its device."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from typing_extensions import override

from lightning_cl.datamodules.array_dataset import ArrayDataset, collate
from lightning_cl.datamodules.augmentation import random_crop, random_flip
from lightning_cl.datamodules.splits import stratified_split

Augment = Literal["none", "flip", "crop", "crop_flip"]


class ImageSource(LightningDataModule):
    """Base of the data sources: images with class labels, batches ``(images, labels)``.

    Sources in memory hand out uint8. Once a batch is on its device it becomes float, is normalised with `mean` and
    `std`, and is augmented while training. Batches whose inputs are not uint8 pass through as they are.

    A source says where its data come from in `load_train` and `load_test`, and in `load_val` if it has a validation
    set of its own.

    Args:
        batch_size: Training samples per batch and process.
        eval_batch_size: Samples per batch and process when validating, testing and predicting.
        num_workers: Worker processes of each loader. Sources in memory are fastest without.
        val_fraction: Share of each class that is taken from the training set for validation, where the source has no
            validation set of its own. 0 validates on nothing.
        seed: Seed of that split.
        augment: Augmentation of training images: "flip" mirrors left to right, "crop" shifts by up to 4 pixels.
        on_device: Keep the arrays on the accelerator, so that batches are made there. Needs `num_workers` to be 0.

    Attributes:
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, of pixels in [0, 1].
        num_classes: Number of classes; known after `setup` where files have to be read for it.
        classes: Names of the classes, in the order of the labels; known after `setup`.
        input_shape: Shape of one input, ``(channels, height, width)``; known after `setup` where files have to be read.

    Raises:
        ValueError: If an argument is out of range, or `on_device` meets loader workers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: Augment = "none",
        on_device: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"`val_fraction` must be at least 0 and below 1, got {val_fraction}.")
        if augment not in ("none", "flip", "crop", "crop_flip"):
            raise ValueError(f"`augment` must be 'none', 'flip', 'crop' or 'crop_flip', got {augment!r}.")
        if on_device and num_workers > 0:
            raise ValueError(
                f"`on_device=True` needs `num_workers=0`, got {num_workers}: a worker process cannot index arrays that "
                "are on the accelerator."
            )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        self.augment = augment
        self.on_device = on_device
        self._train: Dataset[Any] | None = None
        self._val: Dataset[Any] | None = None
        self._test: Dataset[Any] | None = None
        self._channels: dict[Any, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def load_train(self) -> Dataset[Any]:
        """Load the training set, the part that may go to validation included. It has the labels as `targets`."""

    def load_val(self) -> Dataset[Any] | None:
        """Load the source's own validation set, or None to take `val_fraction` of the training set."""
        return None

    @abstractmethod
    def load_test(self) -> Dataset[Any]:
        """Load the test set."""

    @override
    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            if self._train is None:
                self._train, self._val = self._training_sets()
            self._place(self._train)
            self._place(self._val)
        else:
            if self._test is None:
                self._test = self.load_test()
            self._place(self._test)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._ready(self._train, "fit"), self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        self._ready(self._train, "fit")
        return [] if self._val is None else self._loader(self._val, self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._ready(self._test, "test"), self.eval_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, Tensor):
            return self._prepare(batch)
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
            return type(batch)((self._prepare(batch[0]), *batch[1:]))
        return batch

    def _prepare(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        training = self.trainer is not None and self.trainer.training
        if training and self.augment in ("crop", "crop_flip"):
            images = random_crop(images)
        if training and self.augment in ("flip", "crop_flip"):
            images = random_flip(images)
        shift, scale = self._channel_constants(images.device)
        normalised = images.float().sub_(shift).mul_(scale)
        # Lightning casts inputs to a "true" half precision before this hook, when they were still uint8.
        return normalised if self.trainer is None else self.trainer.precision_plugin.convert_input(normalised)

    def _channel_constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what to subtract from and what to multiply with raw pixels, ``(channels, 1, 1)``, kept per device."""
        key = (device, self.mean, self.std)
        if key not in self._channels:
            shift = torch.tensor(self.mean, device=device).mul_(255).view(-1, 1, 1)
            scale = torch.tensor(self.std, device=device).mul_(255).reciprocal_().view(-1, 1, 1)
            self._channels[key] = shift, scale
        return self._channels[key]

    def _training_sets(self) -> tuple[Dataset[Any], Dataset[Any] | None]:
        train, val = self.load_train(), self.load_val()
        if val is not None or self.val_fraction == 0:
            return train, val
        targets: Any = train.targets  # type: ignore[attr-defined]
        kept, held_out = stratified_split(torch.as_tensor(targets), self.val_fraction, self.seed)
        return Subset(train, kept), Subset(self._evaluated(train), held_out)

    def _evaluated(self, train: Dataset[Any]) -> Dataset[Any]:
        """Return the training set as validation reads it; for arrays that is the set itself."""
        return train

    def _place(self, dataset: Dataset[Any] | None) -> None:
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        if self.on_device and self.trainer is not None and isinstance(dataset, ArrayDataset):
            dataset.to(self.trainer.strategy.root_device)

    def _ready(self, dataset: Dataset[Any] | None, stage: str) -> Dataset[Any]:
        if dataset is None:
            raise MisconfigurationException(f'Call `setup("{stage}")` on {type(self).__name__} before its loaders.')
        return dataset

    def _loader(self, dataset: Dataset[Any], batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available() and not self.on_device,
            persistent_workers=self.num_workers > 0,
        )
