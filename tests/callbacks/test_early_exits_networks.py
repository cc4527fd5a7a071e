"""Networks of all kinds are trained with exits by a Trainer, at any precision, and answer as the rule says offline."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from nearest_means import predictions
from numbered_streams import fit_stream
from torch.utils.data import DataLoader, Dataset

import lightning_cl
from lightning_cl.callbacks import EarlyExits, Replay
from lightning_cl.heads.exit_rules import confidence_of, first_confident
from tests.exits.networks import NETWORKS
from tests.modules import DigitsData, Plain, digits, quiet_trainer


def _vit_b_16():
    return torchvision.models.vit_b_16(image_size=32, num_classes=5)


# how a network is built, the shape of its inputs, its exits
KINDS = {name: (build, shape, layers) for name, (build, shape, layers, _) in NETWORKS.items()}
KINDS["resnet18"] = (KINDS["resnet18"][0], (3, 16, 16), ["layer1", "layer3"])
KINDS["vit_b_16"] = (_vit_b_16, (3, 32, 32), [f"encoder.layers.encoder_layer_{index}" for index in (2, 7)])
SIZES = {"train": 4, "val": 2, "test": 4}  # of each class


def _images(split, shape):
    images, labels = digits({"train": 0, "val": 24, "test": 34}[split], SIZES[split], num_classes=5)
    images = F.interpolate(images.view(-1, 1, 8, 8), shape[1:])
    return images.expand(-1, shape[0], -1, -1), labels


class Images(Dataset):
    """Digits of any size and number of channels."""

    def __init__(self, split, shape, named):
        self.images, self.targets = _images(split, shape)
        self.named = named

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image, label = self.images[index], self.targets[index]
        return {"image": image, "label": label} if self.named else (image, label)


class ImageData(LightningDataModule):
    def __init__(self, shape, named=False):
        super().__init__()
        self.shape, self.named = shape, named

    def loader(self, split, **settings):
        return DataLoader(Images(split, self.shape, self.named), batch_size=8, **settings)

    def train_dataloader(self):
        return self.loader("train", shuffle=True)

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")

    def predict_dataloader(self):
        return self.loader("test")


class Classifier(LightningModule):
    """A network in an attribute, on batches ``(images, labels)``."""

    def __init__(self, network, lr):
        super().__init__()
        self.net, self.lr = network, lr

    def parts(self, batch):
        return batch

    def training_step(self, batch, batch_idx):
        images, labels = self.parts(batch)
        return F.cross_entropy(self.net(images), labels)

    def test_step(self, batch, batch_idx):
        images, labels = self.parts(batch)
        self.log("test_acc", (self.net(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def predict_step(self, batch, batch_idx):
        return self.net(self.parts(batch)[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class NamedClassifier(Classifier):
    """A user's module of its own kind: batches are dicts."""

    def parts(self, batch):
        return batch["image"], batch["label"]


def _fit(name, regime="joint", lr=0.05, **settings):
    """Train a network with exits on three classes and then two, and return exits, Trainer and module."""
    build, shape, layers = KINDS[name]
    named = name == "nested"
    exits = EarlyExits([f"net.{layer}" for layer in layers], regime, threshold=0.5, print_table=False)
    trainer, module = fit_stream(
        [Replay(6), exits],
        lambda: (NamedClassifier if named else Classifier)(build(), lr),
        ImageData(shape, named),
        stream={"num_tasks": None, "first_task_classes": 3, "classes_per_task": 2},
        **{"max_epochs": 1 if regime == "joint" else 2, "limit_val_batches": 1.0, **settings},
    )
    return exits, trainer, module


def _logits_of_all_exits(exits, trainer, module, images):
    """What each exit says of each sample when nobody leaves, ``(batch, exits, classes)``."""
    hooks = exits.network.attach(module.eval())
    with torch.no_grad(), hooks.collecting(), trainer.precision_plugin.forward_context():
        module.net(images)
        logits = torch.stack(hooks.logits, dim=1)
    exits.network.detach()
    module.train()
    return logits


def _between(confidences):
    """A threshold in the widest gap of the middle half of some confidences."""
    middle = confidences.float().sort().values[len(confidences) // 4 : -(len(confidences) // 4)]
    widest = int(middle.diff().argmax())
    return float(middle[widest : widest + 2].mean())


def _expected(name, exits, trainer, module):
    """Set a threshold that some samples leave by, and return what the rule makes of what all exits say."""
    images, _ = _images("test", KINDS[name][1])
    logits = _logits_of_all_exits(exits, trainer, module, images.to(module.dtype))
    confidences = confidence_of(logits)
    exits.threshold = _between(confidences[:, 0])
    taken = first_confident(confidences, exits.threshold)
    assert len(taken.unique()) > 1
    return (2 if name == "nested" else 1) * logits[torch.arange(len(taken)), taken]


def _check_answers(name, exits, trainer, module, tolerance=1e-4):
    """Compare the Trainer's predictions and figures with what is expected."""
    expected = _expected(name, exits, trainer, module)
    answers = predictions(trainer, module)
    atol = tolerance * float(expected.abs().max())
    torch.testing.assert_close(answers, expected, rtol=tolerance, atol=atol)
    (figures,) = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    right = expected.argmax(1) == _images("test", KINDS[name][1])[1]
    assert figures["test_acc"] == pytest.approx(float(right.float().mean()), abs=1e-5)
    exits.threshold = None
    assert not torch.allclose(predictions(trainer, module), answers, atol=10 * atol)


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_trained_with_exits_answers_as_the_rule_says(name):
    exits, trainer, module = _fit(name)
    assert exits.network.mixing_layer is None
    assert exits.record.accuracies[-1].isfinite().all()
    _check_answers(name, exits, trainer, module)


@pytest.mark.parametrize(("name", "regime"), [("convnet", "mixed"), ("vit", "disjoint"), ("nested", "mixed")])
def test_a_network_that_is_trained_in_phases_answers_as_the_rule_says(name, regime):
    _check_answers(name, *_fit(name, regime))


@pytest.mark.slow
def test_a_large_vision_transformer_answers_as_the_rule_says():
    _check_answers("vit_b_16", *_fit("vit_b_16", lr=0.001))


# ------------------------------------------------------------------ settings of the Trainer


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_exits_train_and_answer_at_any_precision(name, precision):
    exits, trainer, module = _fit(name, precision=precision)
    kinds = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert {parameter.dtype for parameter in exits.heads.parameters()} == {kinds[precision]}
    _check_answers(name, exits, trainer, module, tolerance=1e-9 if precision == "64-true" else 2e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_checkpoint_of_any_precision_answers_as_its_run_did(precision, tmp_path):
    exits, trainer, module = _fit("mlp", precision=precision)
    expected = _expected("mlp", exits, trainer, module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = EarlyExits(exits.layers, "joint", threshold=exits.threshold)
    untrained = Classifier(KINDS["mlp"][0](), lr=0.05)
    answers = quiet_trainer(callbacks=[fresh], precision=precision).predict(
        untrained, datamodule=trainer.datamodule, ckpt_path=tmp_path / "last.ckpt"
    )
    tolerance = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(torch.cat(answers), expected, **tolerance)
    loaded = lightning_cl.load(tmp_path / "last.ckpt", Classifier, network=KINDS["mlp"][0](), lr=0.05)
    with torch.no_grad():
        answers = loaded.net(_images("test", KINDS["mlp"][1])[0])
    torch.testing.assert_close(answers, expected.float(), **tolerance)


class Smooth(Plain):
    """Neither batch norm, dropout nor momentum, so that gradients are sums over samples."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def _weights(exits, module):
    return {**dict(module.state_dict()), **exits.heads.state_dict()}


@pytest.mark.parametrize("regime", ["joint", "mixed", "disjoint"])
def test_two_accumulated_halves_of_a_batch_train_as_the_whole(regime):
    ends = []
    for batch_size, halves in ((16, 1), (8, 2)):

        class Batches(DigitsData):
            def loader(self, split, batch_size=batch_size, **settings):
                return DataLoader(self.sets[split], batch_size=batch_size, **settings)

        exits = EarlyExits(["net.0"], regime, print_table=False)
        settings = {"max_epochs": 2, "accumulate_grad_batches": halves}
        trainer, module = fit_stream([exits], Smooth, Batches(), **settings)
        assert trainer.global_step == 18
        ends.append(_weights(exits, module))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-5, rtol=1e-4)


class Steps(Callback):
    """Keeps network and heads before the first step of an epoch and after it."""

    def __init__(self):
        self.before, self.lengths = {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = copy.deepcopy(dict(pl_module.named_parameters()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moved = {name: (after - self.before[name]).detach() for name, after in pl_module.named_parameters()}
        heads = {name for name in moved if name.startswith("early_exits")}
        parts = [[moved[name].norm() for name in names] for names in (moved.keys() - heads, heads)]
        self.lengths.append([float(torch.stack(part).norm()) for part in parts])


@pytest.mark.parametrize("regime", ["joint", "mixed", "disjoint"])
def test_gradients_of_what_a_phase_trains_are_clipped_together(regime):
    steps, length = Steps(), 0.001
    exits = EarlyExits(["net.0"], regime, print_table=False)
    fit_stream([exits, steps], Smooth, DigitsData(), max_epochs=2, gradient_clip_val=length)
    moves = {"joint": [(1, 1), (1, 1)], "mixed": [(1, 0), (1, 1)], "disjoint": [(1, 0), (0, 1)]}[regime]
    for step, (network, heads) in enumerate(steps.lengths):
        assert math.hypot(network, heads) == pytest.approx(length, rel=1e-2)
        assert (network > 0, heads > 0) == moves[step // 3 % 2]
