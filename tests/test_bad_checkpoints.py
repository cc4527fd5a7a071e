"""A checkpoint that does not fit is refused before training starts, and a damaged one harms nothing."""

import hashlib
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import DigitsData, Plain, quiet_trainer
from torch.utils.data import DataLoader, Subset

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, TaskList


class NeverTrained(Plain):
    """Fails the test if a single batch is trained on: errors come before."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training had begun")


def _three_tasks(**arguments):
    return ClassIncremental(DigitsData(), **{"num_tasks": 3, **arguments})


def _refused(match, sequence, ckpt_path):
    with pytest.raises(MisconfigurationException, match=match):
        quiet_trainer().fit(NeverTrained(), datamodule=sequence, ckpt_path=ckpt_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a run with three tasks, in the second one."""
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = quiet_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saving])
    trainer.fit(Plain(), datamodule=_three_tasks(seed=1))
    return str(folder / "epoch=2.ckpt")


def test_another_global_batch_inside_an_epoch(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(enable_checkpointing=True, callbacks=[saving])
    trainer.fit(Plain(), datamodule=_three_tasks())

    class SmallerBatches(DigitsData):
        def train_dataloader(self):
            return DataLoader(self.sets["train"], batch_size=4)

    message = r"inside an epoch with a global batch of \d+, now it is 4.*`batch_size`"
    _refused(message, ClassIncremental(SmallerBatches(), num_tasks=3), str(tmp_path / "step=1.ckpt"))


class FewerImages(DigitsData):
    def train_dataloader(self):
        return DataLoader(Subset(self.sets["train"], range(0, 140)), batch_size=16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _three_tasks(num_tasks=2, seed=1),
            r"from a sequence of 3 tasks, this one has 2\. A stream can be continued with more tasks, not with fewer",
        ),
        (
            lambda: _three_tasks(num_tasks=None, classes_per_task=[1, 2, 3], seed=1),
            r"from another sequence: task 0 had the classes \[0, 1\], here it has \[0\].*`class_order`",
        ),
        (
            lambda: _three_tasks(class_order=[5, 4, 3, 2, 1, 0], seed=1),
            r"from another sequence: task 0 had the classes \[0, 1\], here it has \[5, 4\].*`class_order`",
        ),
        (
            lambda: _three_tasks(class_order=[1, 0, 2, 3, 4, 5], seed=1),
            r"task 0 had the classes \[0, 1\], here it has \[1, 0\]",
        ),
        (lambda: _three_tasks(seed=2), "from a sequence with `seed=1`, this one has `seed=2`"),
        (
            lambda: ClassIncremental(FewerImages(), num_tasks=3, seed=1),
            "from other data: task 2 had 48 training samples, here it has 44",
        ),
        (
            lambda: DomainIncremental(DigitsData(), [None, None, None], seed=1),
            "from another sequence.*DomainIncremental",
        ),
        (lambda: TaskList([DigitsData()] * 3, seed=1), "from another sequence: it holds no state of a TaskList"),
    ],
    ids=["fewer-tasks", "other-sizes", "other-order", "order-inside-a-task", "seed", "data-size", "domain", "list"],
)
def test_a_checkpoint_from_another_sequence(checkpoint, make, message):
    _refused(message, make(), checkpoint)


def test_the_checkpoint_of_this_sequence_is_taken(checkpoint):
    trainer = quiet_trainer()
    trainer.fit(Plain(), datamodule=_three_tasks(seed=1), ckpt_path=checkpoint)
    assert trainer.current_epoch == 6


def test_a_checkpoint_without_a_stream(tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Plain(), datamodule=DigitsData())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    message = "holds no progress of a stream.*load them into the module before `fit`"
    _refused(message, _three_tasks(), tmp_path / "plain.ckpt")


def test_a_checkpoint_of_weights_only(tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Plain(), datamodule=_three_tasks())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="save_weights_only"):
        quiet_trainer(max_epochs=9).fit(NeverTrained(), datamodule=_three_tasks(), ckpt_path=tmp_path / "weights.ckpt")


def _contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: data[:500] + bytes(1500) + data[2000:], lambda data: b""],
    ids=["truncated", "corrupt", "empty"],
)
def test_a_damaged_checkpoint_leaves_the_run_directory_as_it_was(tmp_path, damage):
    def trainer():
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        logger = CSVLogger(tmp_path, name="runs")
        return Trainer(max_epochs=1, accelerator="cpu", logger=logger, callbacks=[ContinualMetrics()], **quiet)

    trainer().fit(Plain(), datamodule=_three_tasks())
    path = next(Path(tmp_path).rglob("*.ckpt"))
    path.write_bytes(damage(path.read_bytes()))
    before = _contents(tmp_path)
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says of such a file
        trainer().fit(NeverTrained(), datamodule=_three_tasks(), ckpt_path=path)
    assert len(before) > 4  # results, matrix, plots and checkpoint of the first run
    assert _contents(tmp_path) == before
