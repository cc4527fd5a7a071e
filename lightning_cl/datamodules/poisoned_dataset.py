"""A data set with some of its images corrupted, before any transform of its own."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_cl.corruptions import corrupt
from lightning_cl.datamodules.array_dataset import ArrayDataset
from lightning_cl.datamodules.image_pixels import change_image, change_images
from lightning_cl.datamodules.labels import known_labels
from lightning_cl.datamodules.transform_slot import with_transform
from lightning_cl.tasks import BatchStructure
from lightning_cl.tasks.batches import replace_part
from lightning_cl.tasks.loader import only_passes_on

_CHUNK = 1024


class PixelPoison(NamedTuple):
    """Which samples of a data set are corrupted, and how: a pure function of image, position and seed.

    Args:
        kinds: Position in `corruptions` of each sample's corruption, -1 for those that stay clean, ``(samples,)``.
        corruptions: Names of corruptions.
        severity: Their severity.
        seed: Seed of their draws.
    """

    kinds: Tensor
    corruptions: tuple[str, ...]
    severity: int
    seed: int

    def of_image(self, image: Any, position: int) -> Any:
        """Return the corrupted image of a sample that is poisoned."""
        return change_image(image, self._corruption(int(self.kinds[position]), torch.tensor([position])))

    def of_images(self, images: Tensor, positions: Tensor) -> Tensor:
        """Return the corrupted images of samples that are all poisoned: ``(batch, ...)`` at positions ``(batch,)``."""
        corrupted = images.clone()
        for kind in sorted(set(self.kinds[positions].tolist())):
            rows = (self.kinds[positions] == kind).nonzero().squeeze(1)
            here = rows.to(images.device)
            corrupted[here] = change_images(images[here], self._corruption(kind, positions[rows]))
        return corrupted

    def _corruption(self, kind: int, ids: Tensor) -> Callable[[Tensor], Tensor]:
        return partial(corrupt, name=self.corruptions[kind], severity=self.severity, ids=ids, seed=self.seed)


def poison_dataset(dataset: Dataset[Any], poison: PixelPoison, structure: BatchStructure) -> Dataset[Any]:
    """Return a data set with the images of some samples corrupted, and all else as it was.

    A `TensorDataset` comes back as one, with a copy of its images. Other data sets are wrapped.

    Args:
        dataset: The clean data.
        poison: What to corrupt.
        structure: Where a sample has its image.

    Raises:
        MisconfigurationException: If the data set fetches batches and transforms them itself, so that there is no
            telling which image is whose.
    """
    if type(dataset) is TensorDataset:
        return _poison_tensors(dataset, poison, structure)
    if getattr(type(dataset), "__getitems__", None) is None or only_passes_on(dataset):
        return PoisonedDataset(dataset, poison, structure)
    if getattr(dataset, "transform", None) is not None:
        raise MisconfigurationException(
            f"{type(dataset).__name__} fetches many samples at once (`__getitems__`) and has a `transform`, so the"
            " images cannot be corrupted before it. Take one of the two out of the data set."
        )
    return PoisonedBatches(dataset, poison, structure)


class PoisonedDataset(Dataset[Any]):
    """The samples of a data set, some of them corrupted.

    An image is corrupted as the data set hands it to its ``transform`` (or ``transforms``), also inside of
    `ConcatDataset` and `Subset`; where there is none, as it stands in the sample.

    Args:
        source: The clean data.
        poison: What to corrupt.
        structure: Where a sample has its image.
    """

    def __init__(self, source: Dataset[Any], poison: PixelPoison, structure: BatchStructure) -> None:
        self.source = source
        self.poison = poison
        self.structure = structure
        self._visit = _Visit(poison)
        self._visited = _with_visits(source, self._visit)
        labels = known_labels(source)
        if labels is not None:
            self.targets = labels

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        position = range(len(self))[index]
        return self.source[index] if self.poison.kinds[position] < 0 else self._corrupted(position)

    def before_and_after(self, position: int) -> tuple[Any, Any]:
        """Return the image of a poisoned sample as it was and as it is, before any transform."""
        self._corrupted(position)
        return self._visit.before, self._visit.after

    def over(self, source: Dataset[Any]) -> "Dataset[Any]":
        """Return another view of the source with the same samples corrupted."""
        return self if source is self.source else poison_dataset(source, self.poison, self.structure)

    def _corrupted(self, position: int) -> Any:
        self._visit.begin(position)
        return self._completed(self._visited[position])

    def _completed(self, sample: Any) -> Any:
        if self._visit.done:
            return sample
        image = self.structure.find_inputs(sample)
        return replace_part(sample, image, self._visit.poison_image(image))


class PoisonedBatches(PoisonedDataset):
    """The same for a data set that fetches many samples at once.

    Images in memory are corrupted once; those of memory-maps and other data sets whenever they are fetched.
    """

    def __init__(self, source: Dataset[Any], poison: PixelPoison, structure: BatchStructure) -> None:
        super().__init__(source, poison, structure)
        self.deterministic = getattr(source, "deterministic", False)
        self._images: Tensor | None = None  # the corrupted ones
        self._places = torch.zeros(0, dtype=torch.long)  # where each sample's image stands among them

    def prepare(self) -> None:
        """Corrupt the images that are in memory, if that was not done yet."""
        source = self.source
        if self._images is not None or not isinstance(source, ArrayDataset):
            return
        positions = (self.poison.kinds >= 0).nonzero().squeeze(1)
        if len(positions) == 0 or any(isinstance(array, np.memmap) for array in source.arrays):
            return
        chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
        found = (self.structure.find_inputs(source.__getitems__(chunk)) for chunk in chunks)
        self._images = torch.cat(
            [self.poison.of_images(images, chunk) for images, chunk in zip(found, chunks, strict=True)]
        )
        self._places = torch.full((len(source),), -1)
        self._places[positions] = torch.arange(len(positions))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Any:
        """Return what the source makes of many samples: a list of them, or a collated batch.

        Args:
            indices: The samples, in order.
        """
        batch = self.source.__getitems__(indices)  # type: ignore[attr-defined]
        positions = torch.as_tensor(indices, dtype=torch.long).cpu()
        rows = (self.poison.kinds[positions] >= 0).nonzero().squeeze(1)
        if len(rows) == 0:
            return batch
        if isinstance(batch, list):
            for row in rows.tolist():
                self._visit.begin(int(positions[row]))
                batch[row] = self._completed(batch[row])
            return batch
        images = self.structure.find_inputs(batch)
        poisoned = self._poisoned_images(images, rows.to(images.device), positions[rows])
        order = torch.arange(len(images))
        order[rows] = torch.arange(len(images), len(images) + len(rows))
        # several times faster than assigning to `images[rows]`: whole rows are copied
        changed = torch.cat([images, poisoned]).index_select(0, order.to(images.device))
        return replace_part(batch, images, changed)

    def _poisoned_images(self, images: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        self.prepare()
        if self._images is None:
            return self.poison.of_images(images.index_select(0, rows), positions)
        self._images = self._images.to(images.device)  # where the source's arrays were moved to
        return self._images.index_select(0, self._places[positions].to(images.device))


class _Visit:
    """The sample that is being fetched, whose image is corrupted at the first place it is met at.

    A data set may make several views of one image, all of which must be corrupted.
    """

    def __init__(self, poison: PixelPoison) -> None:
        self._poison = poison
        self._position = -1
        self._place: object = None
        self.done = True
        self.before: Any = None
        self.after: Any = None

    def begin(self, position: int) -> None:
        """Say which sample comes next."""
        self._position, self.done = position, False

    def poison_image(self, image: Any, place: object = None) -> Any:
        """Corrupt the sample's image.

        Args:
            image: What the data set hands over.
            place: Whom it hands it to. What comes out of one place may go on into another.

        Raises:
            ValueError: If the same place gets one image and then another.
        """
        if not self.done:
            self.done, self._place = True, place
            self.before, self.after = image, self._poison.of_image(image, self._position)
            return self.after
        if image is self.before:
            return self.after
        if image is self.after or place is not self._place:
            return image
        raise ValueError(
            f"The data set calls its transform with several images for sample {self._position}, and only one can be"
            " corrupted. Let it fetch the sample's image once, and hand the same object over for each view."
        )


class _PoisonFirst:
    """A data set's transform, with the poison before it."""

    def __init__(self, transform: Callable[..., Any] | None, visit: _Visit) -> None:
        self._transform = transform
        self._visit = visit

    def __call__(self, *args: Any, **named: Any) -> Any:
        if args:
            args = (self._visit.poison_image(args[0], self), *args[1:])
        elif "image" in named:  # as albumentations is called
            named = {**named, "image": self._visit.poison_image(named["image"], self)}
        else:
            raise ValueError(
                f"The data set calls its transform with {', '.join(map(repr, named)) or 'nothing'}, which does not tell"
                " the image. Let it hand the image over first, or as `image=`."
            )
        if self._transform is not None:
            return self._transform(*args, **named)
        if not args:
            return named
        return args if len(args) > 1 else args[0]


def _with_visits(dataset: Dataset[Any], visit: _Visit) -> Dataset[Any]:
    if isinstance(dataset, Subset):
        part = copy.copy(dataset)
        part.dataset = _with_visits(dataset.dataset, visit)
        return part
    if isinstance(dataset, ConcatDataset):
        joined = copy.copy(dataset)
        joined.datasets = [_with_visits(part, visit) for part in dataset.datasets]
        return joined
    if not hasattr(dataset, "transform"):
        return dataset
    view: Any = with_transform(dataset, _PoisonFirst(dataset.transform, visit))
    both = getattr(view, "transforms", None)  # of image and target together
    if callable(both) and not hasattr(both, "transform"):
        view.transforms = _PoisonFirst(both, visit)
    return view  # type: ignore[no-any-return]


def _poison_tensors(dataset: TensorDataset, poison: PixelPoison, structure: BatchStructure) -> TensorDataset:
    images = structure.find_inputs(dataset.tensors)
    rows = (poison.kinds >= 0).nonzero().squeeze(1)
    corrupted = images.clone()
    corrupted[rows] = poison.of_images(images[rows], rows)
    return TensorDataset(*replace_part(dataset.tensors, images, corrupted))
