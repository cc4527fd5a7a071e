"""A data set in memory (or memory-mapped) that hands out whole batches by one index."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Array = Tensor | NDArray[Any]


def collate(batch: Any) -> Any:
    """Pass a batch that is already collated through, and collate a list of samples.

    `ArrayDataset.__getitems__` returns the whole batch, and a DataLoader hands what it returns to its collate function.

    Args:
        batch: A collated batch (a tuple of tensors), or a list of samples.

    Returns:
        The collated batch.
    """
    return default_collate(batch) if isinstance(batch, list) else batch


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images (or feature vectors) and labels as arrays.

    A DataLoader that finds ``__getitems__`` asks for a batch once, not for each sample. Here that is one gather on
    uint8, many times faster than decoding, transforming and stacking samples. Use it with `collate`.

    Args:
        images: One array or several, which then follow one another as one set. Images are ``(samples, height,
            width)``, ``(samples, channels, height, width)`` or, with `channels_last`, ``(samples, height, width,
            channels)``; features are ``(samples, features)``. Tensors, numpy arrays and memory-maps; a memory-map
            is read only where it is indexed.
        labels: Integer labels of all arrays together, ``(samples,)``.
        channels_last: Whether 4-dimensional arrays have their channels last. Batches have them first.

    Raises:
        ValueError: If there are not as many labels as images.

    Example::

        >>> dataset = ArrayDataset(torch.zeros(10, 8, 8, dtype=torch.uint8), torch.arange(10))
        >>> images, labels = dataset.__getitems__([3, 1])
        >>> images.shape, labels
        (torch.Size([2, 1, 8, 8]), tensor([3, 1]))
    """

    deterministic = True  # task sequences then spare it the seeding of random transforms

    def __init__(self, images: Array | Sequence[Array], labels: Array, channels_last: bool = False) -> None:
        self.arrays: list[Array] = [images] if isinstance(images, (Tensor, np.ndarray)) else list(images)
        self.targets = torch.as_tensor(labels, dtype=torch.long)
        self.channels_last = channels_last
        self._starts = np.cumsum([0, *map(len, self.arrays)])
        if len(self.targets) != self._starts[-1]:
            raise ValueError(f"`labels` has {len(self.targets)} entries for {self._starts[-1]} `images`.")
        # `targets` stay on the CPU, where task sequences read them; batches come from this copy.
        self._labels = self.targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        position = range(len(self))[index]
        images, labels = self.__getitems__([position])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return a collated batch: inputs ``(batch, …)`` and labels ``(batch,)``.

        Args:
            indices: The samples of the batch, in order.
        """
        index = torch.as_tensor(indices, dtype=torch.long).to(self._labels.device, non_blocking=True)
        return self._first_channels(self._gather(index)), self._labels.index_select(0, index)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input as batches have it: ``(channels, height, width)`` or ``(features,)``."""
        _, *shape = self.arrays[0].shape
        if len(shape) == 2:
            return (1, *shape)
        return (shape[-1], *shape[:-1]) if self.channels_last and len(shape) == 3 else tuple(shape)

    def evaluation_view(self) -> "ArrayDataset":
        """Return the set as evaluation sees it: the set itself, since augmentation happens on the device."""
        return self

    def to(self, device: torch.device) -> "ArrayDataset":
        """Move the arrays to a device, in place; batches are then made there.

        Args:
            device: Where to keep the arrays. Memory-maps are read whole.

        Returns:
            The data set itself.
        """
        if any(not isinstance(array, Tensor) or array.device != device for array in self.arrays):
            parts = [array if isinstance(array, Tensor) else _as_tensor(np.array(array)) for array in self.arrays]
            self.arrays = [torch.cat([part.to(device) for part in parts]) if len(parts) > 1 else parts[0].to(device)]
            self._starts = np.array([0, len(self)])
            self._labels = self.targets.to(device)
        return self

    def _gather(self, index: Tensor) -> Tensor:
        if len(self.arrays) == 1:
            return _take(self.arrays[0], index)
        owners = np.searchsorted(self._starts, index.cpu().numpy(), side="right") - 1
        batch: Tensor | None = None
        for owner in np.unique(owners):
            rows = torch.from_numpy(np.flatnonzero(owners == owner)).to(index.device)
            part = _take(self.arrays[owner], index[rows] - int(self._starts[owner]))
            if batch is None:
                batch = part.new_empty((len(index), *part.shape[1:]))
            batch[rows] = part
        return _take(self.arrays[0], index) if batch is None else batch

    def _first_channels(self, batch: Tensor) -> Tensor:
        if batch.dim() == 3:
            return batch.unsqueeze(1)
        return batch.movedim(-1, 1) if self.channels_last and batch.dim() == 4 else batch

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory-map would write out the whole file, once for each spawned loader worker.
        state = self.__dict__.copy()
        state["arrays"] = [_MappedFile.of(array) for array in self.arrays]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = [array.open() if isinstance(array, _MappedFile) else array for array in state["arrays"]]


class _MappedFile:
    """The path of a memory-mapped ``.npy`` file, standing for its array in a pickle."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def of(cls, array: Array) -> "Array | _MappedFile":
        """Return the file behind a whole memory-map, and any other array as it is."""
        if isinstance(array, np.memmap) and str(array.filename).endswith(".npy"):
            path = str(array.filename)
            if np.load(path, mmap_mode="r").shape == array.shape:
                return cls(path)
        return array

    def open(self) -> Array:
        """Map the file again."""
        array: NDArray[Any] = np.load(self.path, mmap_mode="r")
        return array


def _take(array: Array, index: Tensor) -> Tensor:
    if isinstance(array, Tensor):
        # Far faster than `array[index]` on the CPU: whole rows are copied.
        return array.index_select(0, index)
    return _as_tensor(np.asarray(array[index.cpu().numpy()]))


def _as_tensor(array: NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.is_floating_point() else tensor
