"""Modules and DataModules as people write them: none of them knows about tasks."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
    "num_sanity_val_steps": 0,
}


def quiet_trainer(**settings):
    """A Trainer that writes and shows nothing."""
    return Trainer(**{**QUIET, "max_epochs": 2, **settings})


def digits(first, count, num_classes=6):
    """Real images, flattened, with pixels in [0, 1]: ``count`` of each class, from the ``first`` on."""
    data = load_digits()
    labels = torch.as_tensor(data.target)
    chosen = torch.cat([(labels == label).nonzero().squeeze(1)[first : first + count] for label in range(num_classes)])
    return torch.as_tensor(data.images, dtype=torch.float32)[chosen].div(16).flatten(1), labels[chosen]


class TrainingDigits(LightningDataModule):
    """Six digits, 24 training images of each: ``(image, label)`` batches of 16, and nothing to validate on."""

    offset = 0.25

    def __init__(self, num_workers=0):
        super().__init__()
        self.num_workers = num_workers

    def dataset(self, first, count):
        return TensorDataset(*digits(first, count))

    def setup(self, stage):
        self.sets = {"train": self.dataset(0, 24), "val": self.dataset(24, 10), "test": self.dataset(34, 10)}

    def loader(self, split, **settings):
        return DataLoader(self.sets[split], batch_size=16, num_workers=self.num_workers, **settings)

    def train_dataloader(self):
        return self.loader("train", shuffle=True)


class DigitsData(TrainingDigits):
    """The same with 10 validation and 10 test images of each digit."""

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


class NamedSamples(Dataset):
    """Samples as dicts, of data that knows its labels."""

    def __init__(self, images, targets):
        self.images, self.targets = images, targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.targets[index]}


class DictDigits(DigitsData):
    def dataset(self, first, count):
        return NamedSamples(*digits(first, count))


class TokenSamples(NamedSamples):
    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.targets[index]}


class TokenDigits(DigitsData):
    def dataset(self, first, count):
        return TokenSamples(*digits(first, count))


class BrightnessData(DigitsData):
    """Regression: the share of the ink in the upper half of an image."""

    def dataset(self, first, count):
        images, _ = digits(first, count)
        return TensorDataset(images, images[:, :32].mean(dim=1) * 4)


class ShiftingDigits(DigitsData):
    """Batches are worked on where they are used, and augmented while training only."""

    def __init__(self):
        super().__init__()
        self.transferred = {"train": 0, "eval": 0}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        training = self.trainer.training
        self.transferred["train" if training else "eval"] += 1
        if training:
            images = images + 0.05 * torch.randn_like(images)
        return images * 2 - 1, labels


class Plain(LightningModule):
    """A small classifier with ``validation_step(batch, batch_idx)`` that logs ``val_acc``."""

    def __init__(self, lr=0.2, dropout=0.0, batch_norm=False):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, 24),
            nn.BatchNorm1d(24) if batch_norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(24, 6),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test_acc", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


class BoringClassifier(BoringModel):
    """Lightning's BoringModel with another layer and a loss that reads labels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 6)

    def step(self, batch):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class DictModule(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self(batch["image"]), batch["label"])}

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch["image"]).argmax(1) == batch["label"]).float().mean())


class PerTask(Plain):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


class WithoutValidation(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 6)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


class ReadsTheBase(Plain):
    def forward(self, images):
        return self.net(images - self.trainer.datamodule.offset)


class OwnTransfer(Plain):
    """Works on its batches in a hook of its own."""

    def __init__(self):
        super().__init__()
        self.transferred = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.transferred += 1
        return batch[0] * 2 - 1, batch[1]


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, images):
        return self.net(images).squeeze(1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_mae", F.l1_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class HuggingFaceLike(LightningModule):
    """``forward(**batch)`` gives an object with ``loss`` and ``logits``, and its head is not the only layer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(64, 24)
        self.classifier = nn.Linear(24, 6)

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(torch.relu(self.encoder(pixel_values)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


class HuggingFaceDict(HuggingFaceLike):
    """As before, with a dict for an answer."""

    def forward(self, **batch):
        return vars(super().forward(**batch))

    def training_step(self, batch, batch_idx):
        return self(**batch)["loss"]

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(**batch)["loss"])


class Scheduled(Plain):
    """Keeps what `configure_optimizers` saw of the Trainer, and what it built, once for each call."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.horizons = []
        self.schedulers = []

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        self.horizons.append((self.trainer.max_epochs, self.trainer.max_steps, steps))
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        self.schedulers.append(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Plain):
    """Manual optimisation, with a term from outside if there is one to take."""

    def __init__(self, extra_loss=None, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False
        self.extra_loss = extra_loss

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        if self.extra_loss is not None:
            loss = loss + self.extra_loss(self, batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class TorchvisionModule(Plain):
    """A classification model of torchvision's, on images enlarged to what it takes."""

    def __init__(self):
        super().__init__()
        self.net = torchvision.models.shufflenet_v2_x0_5(num_classes=6)

    def forward(self, images):
        images = images.view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        return self.net(F.interpolate(images, size=(32, 32)))


class PredictsLabels(Plain):
    """`predict_step` is for people: it returns names of classes, not scores. It has no usable `forward`."""

    def forward(self, *args):
        raise RuntimeError("call predict_step")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]).argmax(1)


class TwoHeads(Plain):
    """Two linear layers of the classes' number, and an answer that is neither."""

    def __init__(self):
        super().__init__()
        self.main = nn.Linear(24, 6)
        self.auxiliary = nn.Linear(24, 6)
        self.net = nn.Sequential(nn.Linear(64, 24), nn.ReLU())

    def forward(self, images):
        features = self.net(images)
        return {"main": self.main(features), "auxiliary": self.auxiliary(features)}

    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(logits, batch[1]) for logits in self(batch[0]).values())

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0])["main"].argmax(1) == batch[1]).float().mean())


# modules of all kinds that classify digits, each with a DataModule that it can train on
CLASSIFIERS = [
    (BoringClassifier, DigitsData),
    (DictModule, DictDigits),
    (Plain, DigitsData),
    (ReadsTheBase, DigitsData),
    (WithoutValidation, DigitsData),
    (Plain, ShiftingDigits),
    (OwnTransfer, DigitsData),
    (HuggingFaceLike, TokenDigits),
    (HuggingFaceDict, TokenDigits),
]
