"""Images in the forms that data sets have them, and a poisoned sequence beside the clean one."""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import VisionDataset
from torchvision.transforms import v2

from lightning_cl.datamodules import ClassIncremental, PoisonedTask
from lightning_cl.datamodules.array_dataset import ArrayDataset, collate

CLASSES, PER_CLASS = 6, 10
LABELS = torch.arange(CLASSES).repeat(PER_CLASS)
PIXELS = torch.randint(0, 256, (len(LABELS), 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class ImageData(LightningDataModule):
    """Data sets of images, one for each split."""

    def __init__(self, train, val=None, test=None, batch_size=8, **settings):
        super().__init__()
        self.sets = {"train": train, "val": val or train, "test": test or train}
        self.settings = {"batch_size": batch_size, **settings}

    def train_dataloader(self):
        return DataLoader(self.sets["train"], shuffle=True, **self.settings)

    def val_dataloader(self):
        return DataLoader(self.sets["val"], **self.settings)

    def test_dataloader(self):
        return DataLoader(self.sets["test"], **self.settings)


class TrainingImages(LightningDataModule):
    """Training images alone."""

    def __init__(self, train):
        super().__init__()
        self.train = train

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, collate_fn=collate)


class Photos(VisionDataset):
    """PIL images with a transform, as torchvision's data sets have them."""

    def __init__(self, transform=None):
        super().__init__(root="", transform=transform)
        self.targets = LABELS.tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = Image.fromarray(PIXELS[index].movedim(0, -1).numpy())
        return image if self.transform is None else self.transform(image), self.targets[index]


class BothAtOnce(Photos):
    """A transform of image and target together."""

    def __init__(self, transforms):
        VisionDataset.__init__(self, root="", transforms=transforms)
        self.targets = LABELS.tolist()

    def __getitem__(self, index):
        return self.transforms(Image.fromarray(PIXELS[index].movedim(0, -1).numpy()), self.targets[index])


class Unlabelled(Dataset):
    """Arrays with the channels last, in dicts, of a data set that does not know its labels."""

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return {"image": np.ascontiguousarray(PIXELS[index].movedim(0, -1).numpy()), "label": int(LABELS[index])}


class Listed(Dataset):
    """Many samples at once, as a list."""

    targets = LABELS

    def __len__(self):
        return len(LABELS)

    def __getitems__(self, indices):
        return [(PIXELS[index], int(LABELS[index])) for index in indices]

    def __getitem__(self, index):
        return self.__getitems__([index])[0]


def to_tensor():
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def levels(image):
    """The pixels of an image of floats."""
    return image.mul(255).round().to(torch.uint8)


def augmented():
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8, padding=2), to_tensor(), v2.Normalize([0.5], [0.2])])


FORMS = {
    "arrays": lambda: ImageData(ArrayDataset(PIXELS, LABELS), collate_fn=collate),
    "tensors": lambda: ImageData(TensorDataset(PIXELS, LABELS)),
    "floats": lambda: ImageData(TensorDataset(PIXELS / 255, LABELS)),
    "grey": lambda: ImageData(TensorDataset(PIXELS[:, 0], LABELS)),
    "photos": lambda: ImageData(Photos(augmented()), Photos(to_tensor()), Photos(to_tensor())),
    "both": lambda: ImageData(BothAtOnce(lambda image, target: (augmented()(image), target)), Photos(to_tensor())),
    "unlabelled": lambda: ImageData(Unlabelled()),
    "listed": lambda: ImageData(Listed()),
    "joined": lambda: ImageData(Photos(to_tensor()) + Photos(augmented()), Photos(to_tensor())),
}


def streams(make=None, wrap=None, **settings):
    """A sequence of three tasks whose task 1 is poisoned, and the same without, both ready to fit."""
    make = FORMS["arrays"] if make is None else make
    wrap = wrap or (lambda base: ClassIncremental(base, num_tasks=3))
    settings = {"task": 1, "corruption": "gaussian_noise", "seed": 0, **settings}
    poisoned, clean = PoisonedTask(wrap(make()), **settings), wrap(make())
    for sequence in (poisoned, clean):
        sequence.setup("fit")
    return poisoned, clean


def epoch(sequence, task):
    """The inputs and labels of an epoch of a task."""
    sequence.enter_task(task)
    return rows_of(sequence.train_dataloader())


def rows_of(loader):
    batches = [tuple(batch.values()) if isinstance(batch, dict) else batch for batch in loader]
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


def split_of(sequence, task, split):
    """The inputs and labels of a task's validation or test data."""
    return rows_of(sequence.evaluation_loader(task, split))


def differing(first, second):
    """Which rows differ."""
    return (first != second).flatten(1).any(1)


def unshuffled(base):
    return ClassIncremental(base, num_tasks=3, shuffle=False)
