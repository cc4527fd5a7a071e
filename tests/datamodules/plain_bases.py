"""DataModules as people write them, who never heard of tasks."""

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

PIXELS, LABELS = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
PIXELS = PIXELS.float()


def digits(start=0, stop=600):
    return TensorDataset(PIXELS[start:stop], LABELS[start:stop])


class PlainData(LightningDataModule):
    """A train loader over any data set, and a memory of what was called."""

    def __init__(self, train=None, **settings):
        super().__init__()
        self.train = digits() if train is None else train
        self.settings = {"batch_size": 32, "shuffle": True, **settings}
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {getattr(stage, 'value', stage)}")

    def teardown(self, stage):
        self.calls.append(f"teardown {getattr(stage, 'value', stage)}")

    def train_dataloader(self):
        return DataLoader(self.train, **self.settings)


class FullData(PlainData):
    """With validation and test data too, whose loaders have settings of their own."""

    def val_dataloader(self):
        return DataLoader(digits(600, 900), batch_size=50)

    def test_dataloader(self):
        return DataLoader(digits(900, 1200), batch_size=70)


class Stream(IterableDataset):
    """Samples that can only be iterated."""

    def __init__(self, labels=(0, 1, 2, 3), pixel=0.0):
        self.labels, self.pixel = labels, pixel

    def __iter__(self):
        return iter([(torch.full((64,), self.pixel), label) for label in self.labels])


class IterableData(LightningDataModule):
    """Training (and, if asked for, validation) data that can only be iterated."""

    def __init__(self, pixel=0.0):
        super().__init__()
        self.pixel = pixel

    def train_dataloader(self):
        return DataLoader(Stream(pixel=self.pixel), batch_size=2)


class Coloured(Dataset):
    """Samples with a transform, labels known."""

    def __init__(self, start=0, stop=300, transform=None):
        self.start, self.targets, self.transform = start, LABELS[start:stop].tolist(), transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        pixels = PIXELS[self.start + index]
        return pixels if self.transform is None else self.transform(pixels), self.targets[index]


def ready(sequence, stage="fit"):
    sequence.setup(stage)
    return sequence


def samples_in(loader):
    """The inputs and labels of an epoch, put together."""
    batches = list(loader)
    return torch.cat([batch[0] for batch in batches]), torch.cat([torch.as_tensor(batch[1]) for batch in batches])


def training_labels(sequence, task):
    """The labels of an epoch of a task."""
    sequence.enter_task(task)
    return samples_in(sequence.train_dataloader())[1]
