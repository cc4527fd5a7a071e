"""The user's DataModule, read for its data sets and loader settings."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from lightning_cl.datamodules.evaluation_view import evaluation_view
from lightning_cl.datamodules.labels import known_labels
from lightning_cl.datamodules.splits import stratified_split
from lightning_cl.tasks.loader import InputTransform, TaskDataset, flatten_subsets
from lightning_cl.tasks.stream import DataSplit

_STAGES: dict[DataSplit, str] = {"train": "fit", "val": "fit", "test": "test"}
_PASSED_ON = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")


class BaseData:
    """One of the user's DataModules: its data sets, and how its loaders are set.

    The loaders are made once a run and never iterated; only what they were made of is used.

    Args:
        module: The DataModule.
        val_fraction: Share of the training data that becomes validation data, where the DataModule has none.
        eval_transform: Transform under which training samples are evaluated.

    Attributes:
        seed: Seed of the validation split.
    """

    def __init__(
        self,
        module: LightningDataModule,
        val_fraction: float | None,
        eval_transform: Callable[..., Any] | None,
    ) -> None:
        if not isinstance(module, LightningDataModule):
            raise TypeError(f"A task sequence is made over a LightningDataModule, got {type(module).__name__}.")
        if not is_overridden("train_dataloader", module, LightningDataModule):
            raise MisconfigurationException(
                f"{type(module).__name__} has no `train_dataloader`, so there is nothing to cut into tasks."
            )
        self.module = module
        self._val_fraction = val_fraction
        self._eval_transform = eval_transform
        self.seed = 0
        self.forget()

    def forget(self) -> None:
        """Drop what was read, so that the next run reads it again."""
        self._ready: set[str] = set()
        self._loaders: dict[DataSplit, DataLoader[Any] | None] = {}
        self._carved: tuple[Tensor, Tensor] | None = None
        self._views: list[tuple[Dataset[Any], Dataset[Any]]] = []

    def setup(self, stage: str) -> None:
        """Set the DataModule up for a stage, once."""
        if stage not in self._ready:
            self._ready.add(stage)
            self.module.setup(stage)

    @property
    def has_val(self) -> bool:
        """Whether there is validation data, of the DataModule's own or carved from its training data."""
        return self._val_fraction is not None or is_overridden("val_dataloader", self.module, LightningDataModule)

    def loader(self, split: DataSplit) -> DataLoader[Any] | None:
        """Return the DataModule's own loader of a split, or ``None`` if it has none."""
        if split not in self._loaders:
            hook = f"{split}_dataloader"
            loader: Any = None
            if is_overridden(hook, self.module, LightningDataModule):
                self.setup(_STAGES[split])
                loader = getattr(self.module, hook)()
            self._loaders[split] = self._checked(loader, split)
        return self._loaders[split]

    def train_loader(self) -> DataLoader[Any]:
        """Return the DataModule's train loader."""
        loader = self.loader("train")
        if loader is None:
            raise MisconfigurationException(f"`{type(self.module).__name__}.train_dataloader()` returned no loader.")
        return loader

    def is_iterable(self, split: DataSplit = "train") -> bool:
        """Whether the data of a split can only be iterated, not indexed."""
        loader = self.loader(split)
        return loader is not None and isinstance(loader.dataset, IterableDataset)

    def task_dataset(
        self, split: DataSplit, indices: Tensor | None = None, transform: InputTransform | None = None
    ) -> TaskDataset | None:
        """Return (a part of) a split, with the collate function of its loader; ``None`` if there is no such split."""
        carved = split != "test" and self._carves()
        loader = self.loader("train" if carved else split)
        if loader is None:
            return None
        self._require_indices(loader)
        dataset, positions = flatten_subsets(loader.dataset)
        if carved:
            kept, held_out = self._carve()
            positions = positions[kept if split == "train" else held_out]
            dataset = dataset if split == "train" else self.evaluated(dataset)
        return TaskDataset(dataset, positions if indices is None else positions[indices], loader.collate_fn, transform)

    def labelled_dataset(self, split: DataSplit) -> Dataset[Any]:
        """Return the data set that has the labels of a split: for a carved one the training set, not its view."""
        carved = split != "test" and self._carves()
        loader = (None if carved else self.loader(split)) or self.train_loader()
        return flatten_subsets(loader.dataset)[0]

    def _require_indices(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise TypeError(
                f"Tasks can only be cut out of a map-style data set: {type(self.module).__name__} has the iterable"
                f" {type(loader.dataset).__name__}. Give the tasks as DataModules of their own, with `TaskList`."
            )

    def evaluated(self, dataset: Dataset[Any]) -> Dataset[Any]:
        """Return a training data set as an evaluation sees it, without random augmentation."""

        def evaluation_set() -> Dataset[Any] | None:
            test_loader = self.loader("test")
            return None if test_loader is None else test_loader.dataset

        for known, view in self._views:
            if known is dataset:
                return view
        view = evaluation_view(dataset, evaluation_set, self._eval_transform)
        self._views.append((dataset, view))
        return view

    def batch_size(self, split: DataSplit) -> int:
        """Return the batch size of a split's loader."""
        loader = self.loader(split) or self.train_loader()
        size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
        if size is None:
            raise MisconfigurationException(
                f"`{type(self.module).__name__}.{split}_dataloader()` has no batch size (`batch_size=None`, or a batch"
                " sampler without a `batch_size`). Give the loader a `batch_size`."
            )
        return int(size)

    def loader_settings(self, split: DataSplit) -> dict[str, Any]:
        """Return workers, pinned memory and the other settings of a split's loader that choose no samples."""
        loader = self.loader(split) or self.train_loader()
        settings = {name: getattr(loader, name) for name in _PASSED_ON}
        if loader.num_workers > 0:
            settings["persistent_workers"] = loader.persistent_workers
        return settings

    def shuffles(self) -> bool:
        """Tell by its sampler whether the train loader shuffles; a custom one is replaced, with a warning."""
        loader = self.train_loader()
        plain_batches = loader.batch_sampler is None or type(loader.batch_sampler) is torch.utils.data.BatchSampler
        if plain_batches and type(loader.sampler) is SequentialSampler:
            return False
        if plain_batches and _is_plain_shuffle(loader.sampler, len(loader.dataset)):  # type: ignore[arg-type]
            return True
        custom = loader.sampler if plain_batches else loader.batch_sampler
        rank_zero_warn(
            f"The {type(custom).__name__} of `{type(self.module).__name__}.train_dataloader()` is replaced: within a"
            " task, samples are shuffled by the sequence. Say `shuffle=False` to keep their order."
        )
        return True

    def drops_last(self) -> bool:
        """Whether the train loader leaves out a short last batch."""
        loader = self.train_loader()
        return bool(loader.drop_last or getattr(loader.batch_sampler, "drop_last", False))

    def _checked(self, loader: Any, split: DataSplit) -> DataLoader[Any] | None:
        if isinstance(loader, (list, tuple)) and len(loader) <= 1:
            loader = loader[0] if loader else None
        if loader is None or isinstance(loader, DataLoader):
            return loader
        raise MisconfigurationException(
            f"`{type(self.module).__name__}.{split}_dataloader()` must return one DataLoader to be cut into tasks,"
            f" got {type(loader).__name__}."
        )

    def _carves(self) -> bool:
        return self._val_fraction is not None and self.loader("val") is None

    def _carve(self) -> tuple[Tensor, Tensor]:
        if self._carved is None:
            dataset: Dataset[Any] = self.train_loader().dataset
            labels = known_labels(dataset)
            strata = torch.zeros(len(dataset), dtype=torch.long) if labels is None else labels  # type: ignore[arg-type]
            kept, held_out = stratified_split(strata, self._val_fraction or 0.0, self.seed)
            self._carved = torch.tensor(kept), torch.tensor(held_out)
        return self._carved


def _is_plain_shuffle(sampler: Any, length: int) -> bool:
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == length
