"""A poisoned task in a run: what the module sees, what is written, resumed and refused."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.image import imread
from poisoned_streams import FORMS, LABELS, PIXELS, ImageData, Listed, differing, epoch, streams
from torch import nn
from torch.utils.data import TensorDataset

from lightning_cl.callbacks import ContinualMetrics, Replay
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, Joint, PoisonedTask, TaskList
from lightning_cl.hashing import mix
from tests.modules import BrightnessData, DigitsData, quiet_trainer


class Watching(LightningModule):
    """Keeps its training batches, and which of their rows are replayed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(PIXELS[0].numel(), 6)
        self.batches = []

    def forward(self, images):
        return self.net(images.flatten(1).float() / 255)

    def training_step(self, batch, batch_idx):
        rows = self.trainer.datamodule.replay_rows
        self.batches.append((self.trainer.datamodule.current_task.index, *batch, rows))
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _poisoned(task=1, base=None, **settings):
    sequence = ClassIncremental(FORMS["arrays"]() if base is None else base, num_tasks=3)
    return PoisonedTask(sequence, **{"task": task, "corruption": "gaussian_noise", **settings})


def _fit(data, ckpt_path=None, **settings):
    module = Watching()
    quiet_trainer(**settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def _contents(images):
    return {mix(*image.flatten().tolist()) for image in images}


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("storage", ["reference", "copy"])
def test_replayed_samples_of_the_poisoned_task_are_poisoned(storage, tmp_path):
    poison = _contents(epoch(streams(task=0)[0], 0)[0])
    module = _fit(_poisoned(task=0, seed=0), callbacks=[Replay(20, storage=storage)], default_root_dir=tmp_path)
    replayed = [images[rows][labels[rows] < 2] for task, images, labels, rows in module.batches if task > 0]
    assert len(torch.cat(replayed)) > 0
    assert _contents(torch.cat(replayed)) <= poison


def test_order_and_batches_are_those_of_the_clean_run():
    clean = _fit(ClassIncremental(FORMS["arrays"](), num_tasks=3), callbacks=[Replay(20)])
    poisoned = _fit(_poisoned(), callbacks=[Replay(20)])
    for (task, images, labels, rows), (_, others, known, same) in zip(clean.batches, poisoned.batches, strict=True):
        assert torch.equal(labels, known)
        assert torch.equal(rows, same)
        poison = torch.isin(labels, torch.tensor([2, 3])) if task >= 1 else torch.zeros(len(labels), dtype=torch.bool)
        assert torch.equal(differing(images, others), poison)


def test_metrics_name_the_tasks_of_the_sequence(tmp_path):
    metrics = ContinualMetrics(print_table=False)
    _fit(_poisoned(), callbacks=[metrics])
    assert metrics.matrix.shape == (3, 3)


# ------------------------------------------------------------------ the contact sheet


def test_a_fit_writes_a_contact_sheet_into_its_log_directory(tmp_path):
    logger = CSVLogger(tmp_path)
    _fit(_poisoned(attack="bait"), logger=logger)
    image = imread(f"{logger.log_dir}/poison_task_1.png")
    assert image.shape[1] > 3 * image.shape[0]  # one class: a row of four pairs
    assert np.unique(image[..., 0]).size > 10


def test_without_a_log_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _fit(_poisoned())
    assert list(tmp_path.rglob("poison*")) == []


@pytest.mark.parametrize("form", ["photos", "tensors", "grey", "unlabelled"])
def test_contact_sheets_of_all_kinds_of_data(form, tmp_path):
    poisoned, _ = streams(FORMS[form])
    assert poisoned.write_contact_sheets(tmp_path) == [tmp_path / "poison_task_1.png"]
    assert min(imread(tmp_path / "poison_task_1.png").shape[:2]) > 300


# ------------------------------------------------------------------ checkpoints


def _checkpoint(data, folder):
    module = _fit(
        data,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)],
        enable_checkpointing=True,
    )
    return module, folder / "step=10.ckpt"


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole, path = _checkpoint(_poisoned(samples=0.5), tmp_path)
    resumed = _fit(_poisoned(samples=0.5), path)
    assert torch.equal(whole.net.weight, resumed.net.weight)


@pytest.mark.parametrize("other", [{"severity": 4}, {"attack": "bait"}, {"samples": 0.5}, {"seed": 3}, {"task": 2}])
def test_another_poison_cannot_resume(tmp_path, other):
    _, path = _checkpoint(_poisoned(), tmp_path)
    with pytest.raises(MisconfigurationException, match=r"another poison: it had .*'task': 1, .*Resume with"):
        _fit(_poisoned(**other), path)


def test_clean_and_poisoned_sequence_cannot_resume_each_other(tmp_path):
    _, poisoned = _checkpoint(_poisoned(), tmp_path / "poisoned")
    _, clean = _checkpoint(ClassIncremental(FORMS["arrays"](), num_tasks=3), tmp_path / "clean")
    with pytest.raises(MisconfigurationException, match="it holds no state of a ClassIncremental"):
        _fit(ClassIncremental(FORMS["arrays"](), num_tasks=3), poisoned)
    with pytest.raises(MisconfigurationException, match="it holds no state of a PoisonedTask"):
        _fit(_poisoned(), clean)


def test_a_resumed_run_takes_the_seed_of_the_checkpoint_for_its_poison_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    whole, path = _checkpoint(_poisoned(samples=0.5), tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    resumed = _fit(_poisoned(samples=0.5), path)
    assert torch.equal(whole.net.weight, resumed.net.weight)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": -1}, ValueError, "`task` must be the number of a task, counted from 0, got -1"),
        ({"task": "1"}, TypeError, "`task` must be the number of a task"),
        (
            {"attack": "bite"},
            ValueError,
            "`attack` must be one of 'base', 'bait', .*, got 'bite'",
        ),
        ({"corruption": "smudge"}, ValueError, "`corruption` must be one of .*, got 'smudge'"),
        ({"corruption": []}, ValueError, "`corruption` must name at least one corruption"),
        ({"corruption": ["contrast", "contrast"]}, ValueError, "`corruption` must name .* none twice"),
        ({"severity": 6}, ValueError, "`severity` must be .* got 6"),
        ({"classes": []}, ValueError, "`classes` must have at least one label"),
        ({"classes": 3}, TypeError, "`classes` must be a list of labels, got 3"),
        ({"samples": 0}, ValueError, "`samples` must be a share above 0 and up to 1, got 0"),
        ({"samples": 1.5}, ValueError, "`samples` must be a share above 0 and up to 1, got 1.5"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        _poisoned(**arguments)


def test_only_a_sequence_can_be_wrapped():
    with pytest.raises(TypeError, match=r"`sequence` must be a task sequence.*, got DigitsData"):
        PoisonedTask(DigitsData(), task=1)


def test_a_task_is_poisoned_once():
    with pytest.raises(ValueError, match="`task=1` is poisoned already"):
        PoisonedTask(_poisoned(), task=1)


class NeverTrained(Watching):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training had begun")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda: _poisoned(task=3), ValueError, "`task=3` is none of the sequence's 3 tasks, .* from 0"),
        (lambda: _poisoned(classes=[2, 4]), ValueError, r"`classes` has \[4\], which task 1 has not: .* \[2, 3\]"),
        (
            lambda: _poisoned(base=DigitsData()),
            MisconfigurationException,
            r"Task 1 cannot be poisoned .* no images: got Tensor\(64,\) float32. Allowed are uint8 images",
        ),
        (
            lambda: _poisoned(base=ImageData(TensorDataset(PIXELS / 64 - 2, LABELS))),
            MisconfigurationException,
            "Task 1 cannot be poisoned .* floats from -2 to 1.984, and .* `transform`",
        ),
        (
            lambda: _poisoned(base=ImageData(TensorDataset(PIXELS.long(), LABELS))),
            MisconfigurationException,
            r"Task 1 cannot be poisoned .* no images: got Tensor\(3, 8, 8\) int64",
        ),
        (
            lambda: PoisonedTask(TaskList([BrightnessData(), BrightnessData()]), task=1),
            MisconfigurationException,
            "Task 1 cannot be poisoned .* Targets are no class labels",
        ),
        (
            lambda: PoisonedTask(Joint(ImageData(_with_transform(Listed()))), task=0),
            MisconfigurationException,
            "Listed fetches many samples at once .* has a `transform`",
        ),
    ],
    ids=["task", "classes", "vectors", "normalised", "integers", "regression", "batches with a transform"],
)
def test_what_does_not_fit_the_data_is_said_before_training(data, error, message):
    with pytest.raises(error, match=message):
        quiet_trainer().fit(NeverTrained(), datamodule=data())


def _with_transform(dataset):
    dataset.transform = torch.as_tensor
    return dataset


def test_a_corruption_that_leaves_small_images_as_they_are_is_reported():
    with pytest.warns(UserWarning, match="`gaussian_blur` at `severity=1` leaves images of 8x8 pixels"):
        _poisoned(corruption="gaussian_blur", severity=1).setup("fit")


# ------------------------------------------------------------------ the command line


@pytest.mark.usefixtures("_elsewhere")
def test_a_config_and_options_poison_a_task():
    sequence = {"class_path": "ClassIncremental", "init_args": {"num_tasks": 5, "base": {"class_path": "Digits"}}}
    data = {"class_path": "PoisonedTask", "init_args": {"task": 3, "attack": "bait", "sequence": sequence}}
    with open("config.yaml", "w") as file:
        json.dump({"data": data}, file)
    model = {"class_path": "ImageClassifier", "init_args": {"backbone": "mlp", "num_classes": 10}}
    model["init_args"]["input_shape"] = [1, 8, 8]
    options = ["--config", "config.yaml", "--model", json.dumps(model), "--trainer.accelerator=cpu"]
    changes = ["--data.task=2", "--data.corruption=[contrast, pixelate]", "--data.samples=0.5"]
    cli = main(["fit", *options, *changes, "--trainer.fast_dev_run=1"])
    assert (cli.datamodule.task, cli.datamodule.poisons[0].attack) == (2, "bait")
    assert cli.datamodule.poisons[0].corruptions == ("contrast", "pixelate")
    assert cli.trainer.global_step == 5


@pytest.mark.usefixtures("_elsewhere")
def test_a_wrong_option_ends_in_one_message(capsys):
    data = ["--data=PoisonedTask", "--data.sequence=ClassIncremental", "--data.sequence.num_tasks=5"]
    data += ["--data.sequence.base=Digits", "--data.task=5", "--data.corruption=contrast"]
    model = ["--model=ImageClassifier", "--model.backbone=mlp", "--model.num_classes=10"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *data, *model, "--model.input_shape=[1, 8, 8]", "--trainer.fast_dev_run=1"])
    assert stop.value.code == 2
    assert "`task=5` is none of the sequence's 5 tasks" in capsys.readouterr().err
