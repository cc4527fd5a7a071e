"""Several measurements of one run, their names and files, and what is refused before training."""

import csv
import json

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, Joint, TaskList
from tests.modules import (
    BrightnessData,
    DigitsData,
    PerTask,
    Plain,
    Regression,
    TrainingDigits,
    WithoutValidation,
    quiet_trainer,
)

FILES = {"results.json", "accuracy_matrix.csv", "accuracy_matrix.png", "accuracy_per_task.png"}


def _tasks(**options):
    return ClassIncremental(DigitsData(), **{"num_tasks": 3, **options})


def _fit(callbacks, data=None, module=None, **settings):
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(callbacks=callbacks, **settings)
    trainer.fit(module or Plain(), datamodule=data or _tasks())
    return trainer


def _metrics(*args, **options):
    return ContinualMetrics(*args, print_table=False, **options)


# ------------------------------------------------------------------ several of them


def test_two_splits_in_one_run_log_and_write_their_own_figures(tmp_path):
    seed_everything(0, verbose=False)
    both = [_metrics(), _metrics(split="test")]
    trainer = _fit(both, module=Plain(lr=0.05), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert not torch.equal(both[0].matrix[2], both[1].matrix[2])  # else the test would show nothing
    folder = tmp_path / "lightning_logs" / "version_0"
    for metrics, prefix, name in zip(both, ("acc", "test_acc"), (".", "test"), strict=True):
        logged = [float(trainer.callback_metrics[f"{prefix}/task_{task}"]) for task in range(3)]
        assert logged == pytest.approx(metrics.matrix[2].tolist())
        assert float(trainer.callback_metrics[f"{prefix}/forgetting"]) == pytest.approx(metrics.averages["forgetting"])
        assert {path.name for path in (folder / name).iterdir()} >= FILES
        results = json.loads((folder / name / "results.json").read_text())
        assert results["accuracy_matrix"][2] == pytest.approx(metrics.matrix[2].tolist())
        with (folder / name / "accuracy_matrix.csv").open() as file:
            assert [float(x) for x in list(csv.reader(file))[3][1:]] == pytest.approx(metrics.matrix[2].tolist())


class _Derived(ContinualMetrics):
    """Another class, so that Lightning itself sees no conflict of states."""


@pytest.mark.parametrize("other", [lambda: _Derived(tasks="all"), lambda: _metrics(monitor="acc")], ids=["same", "acc"])
def test_two_that_would_write_the_same_are_refused(other):
    with pytest.raises(MisconfigurationException, match=r"Two ContinualMetrics would both log 'acc/\.\.\.'"):
        _fit([_metrics(), other()], _tasks(eval_loaders="per_task"))


def test_two_with_one_state_key_are_refused_where_lightning_does_not_look():
    trainer = quiet_trainer(callbacks=[_metrics()])
    trainer.callbacks.append(_metrics(tasks="all"))
    with pytest.raises(MisconfigurationException, match="Two ContinualMetrics would"):
        trainer.fit(Plain(), datamodule=_tasks())


def test_a_monitored_metric_is_of_validation():
    with pytest.raises(ValueError, match=r"`split` must be 'val' with `monitor='val_acc'`.* got 'test'"):
        ContinualMetrics(monitor="val_acc", split="test")


# ------------------------------------------------------------------ callbacks that follow the figures


def _checkpoint(folder, monitor="acc/average_accuracy", **options):
    return ModelCheckpoint(folder, monitor=monitor, mode="max", save_top_k=-1, filename="{epoch}", **options)


@pytest.mark.parametrize(
    ("options", "stream", "settings", "advice"),
    [
        ({}, {}, {}, r"every_n_epochs=2\)"),
        ({"every_n_epochs": 3}, {}, {}, r"every_n_epochs=2\)"),
        ({"every_n_train_steps": 3}, {}, {}, r"every_n_epochs=2\)"),
        ({}, {"epochs_per_task": [1, 2, 1]}, {}, r"every_n_epochs=3\)"),
        (
            {"every_n_epochs": 2},
            {},
            {"check_val_every_n_epoch": 2},
            r"every_n_epochs=2, save_on_train_epoch_end=True\)",
        ),
    ],
    ids=["each epoch", "other epochs", "steps", "tasks of different length", "after validation"],
)
def test_a_checkpoint_that_asks_too_early_is_told_when_to_ask(tmp_path, options, stream, settings, advice):
    with pytest.raises(MisconfigurationException, match=advice):
        _fit([_metrics(), _checkpoint(tmp_path, **options)], _tasks(**stream), enable_checkpointing=True, **settings)


@pytest.mark.parametrize(
    ("options", "stream", "settings", "epochs"),
    [
        ({"every_n_epochs": 2}, {}, {}, [1, 3, 5]),
        ({"every_n_epochs": 3}, {"epochs_per_task": [1, 2, 1]}, {}, [2]),
        ({"every_n_epochs": 2, "save_on_train_epoch_end": True}, {}, {"check_val_every_n_epoch": 2}, [1, 3, 5]),
    ],
    ids=["tasks of one length", "tasks of different length", "after validation"],
)
def test_a_checkpoint_at_the_ends_of_tasks_follows_the_figures(tmp_path, options, stream, settings, epochs):
    checkpoint, metrics = _checkpoint(tmp_path, "acc/task_0", **options), _metrics()
    _fit([metrics, checkpoint], _tasks(**stream), enable_checkpointing=True, **settings)
    paths = [str(tmp_path / f"epoch={epoch}.ckpt") for epoch in epochs]
    assert list(checkpoint.best_k_models) == paths
    rows = [1] if len(epochs) == 1 else [0, 1, 2]
    scores = [float(score) for score in checkpoint.best_k_models.values()]
    assert scores == pytest.approx(metrics.matrix[rows, 0].tolist())


def test_the_advised_checkpoint_works_in_a_second_fit_too(tmp_path):
    metrics = _metrics()
    trainer = _fit([metrics, _checkpoint(tmp_path, every_n_epochs=2)], enable_checkpointing=True)
    trainer.fit(Plain(), datamodule=_tasks())
    assert len(list(tmp_path.glob("*.ckpt"))) == 6


@pytest.mark.parametrize("key", ["val_acc/dataloader_idx_0", "val_acc"])
def test_a_checkpoint_may_follow_the_metric_that_fills_the_matrix(tmp_path, key):
    module = Plain() if key == "val_acc" else PerTask()
    data = Joint(DigitsData()) if key == "val_acc" else _tasks(eval_loaders="per_task", eval_tasks="all")
    checkpoint = _checkpoint(tmp_path, key)
    _fit([_metrics(monitor="val_acc"), checkpoint], data, module, enable_checkpointing=True)
    assert len(checkpoint.best_k_models) == (2 if key == "val_acc" else 6)


def test_early_stopping_cannot_wait_for_what_comes_after_the_task():
    with pytest.raises(MisconfigurationException, match="Early stopping cannot follow `monitor='acc/task_0'`"):
        _fit([_metrics(), EarlyStopping("acc/task_0")])


# ------------------------------------------------------------------ monitor


def test_a_monitored_metric_names_log_files_and_averages(tmp_path, capsys):
    metrics = ContinualMetrics(monitor="val_mae", mode="min")
    data = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg], eval_loaders="per_task")
    trainer = _fit([_metrics(monitor="val_loss"), metrics], data, _LogsLoss(), logger=CSVLogger(tmp_path))
    assert metrics.matrix[1].tolist() == pytest.approx(
        [float(trainer.callback_metrics[f"val_mae/task_{task}"]) for task in range(2)]
    )
    names = {"average", "average_incremental", "forgetting", "backward_transfer"}
    assert set(metrics.averages) == names
    assert {key for key in trainer.callback_metrics if key.startswith("val_mae/")} == {
        *(f"val_mae/{name}" for name in (*names, "task_0", "task_1", "dataloader_idx_0", "dataloader_idx_1"))
    }
    folder = tmp_path / "lightning_logs" / "version_0"
    assert {path.name for path in (folder / "val_mae").iterdir()} == FILES
    assert json.loads((folder / "val_loss" / "results.json").read_text())["metric"] == "val_loss"
    printed = capsys.readouterr().out
    assert "val_mae after each task" in printed
    assert "accuracy " not in printed


class _LogsLoss(Regression):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.log("val_loss", torch.nn.functional.mse_loss(self(batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("metrics", "label"), [({}, "accuracy"), ({"split": "test"}, "test accuracy"), ({"monitor": "val_acc"}, "val_acc")]
)
def test_the_plots_say_what_they_show(tmp_path, monkeypatch, metrics, label):
    seen = []

    def write_plots(directory, matrix, names, label="accuracy"):
        seen.append(label)
        return []

    monkeypatch.setattr("lightning_cl.callbacks.continual_metrics.write_plots", write_plots)
    _fit([_metrics(**metrics)], Joint(DigitsData()), logger=CSVLogger(tmp_path))
    assert seen == [label]


def test_a_monitored_metric_needs_no_loaders_apart_where_there_is_one_task():
    metrics = _metrics(monitor="val_acc")
    trainer = _fit([metrics], Joint(DigitsData()))
    assert float(metrics.matrix) == float(trainer.callback_metrics["val_acc"])


@pytest.mark.parametrize("without", [0, 1])
def test_tasks_without_validation_data_stay_blank(without):
    bases = [DigitsData(), DigitsData(), DigitsData()]
    bases[without] = TrainingDigits()
    metrics = _metrics(monitor="val_acc")
    _fit([metrics], TaskList(bases, eval_loaders="per_task"), PerTask())
    measured = [[task <= trained and task != without for task in range(3)] for trained in range(3)]
    assert (~metrics.matrix.isnan()).tolist() == measured


def test_a_task_without_data_has_no_place_among_the_loaders():
    sequence = TaskList([DigitsData(), TrainingDigits(), DigitsData()], eval_loaders="per_task")
    quiet_trainer().validate(PerTask(), datamodule=sequence, verbose=False)
    assert sequence.served_tasks("val") == [0, 2]
    assert len(sequence.val_dataloader()) == 2


def test_a_monitored_metric_without_any_validation_data_is_refused():
    with pytest.raises(MisconfigurationException, match=r"`monitor='val_acc'` .*no task has validation data"):
        _fit([_metrics(monitor="val_acc")], TaskList([TrainingDigits()] * 2, eval_loaders="per_task"), PerTask())


# ------------------------------------------------------------------ limits and missing data


class _KeepsSizes(Plain):
    def __init__(self):
        super().__init__()
        self.sizes = set()

    def forward(self, images):
        if not self.training:
            self.sizes.add(len(images))
        return super().forward(images)


@pytest.mark.parametrize(
    ("split", "limits", "whole"),
    [
        ("val", {"limit_val_batches": 1, "limit_test_batches": 1.0}, False),
        ("test", {"limit_val_batches": 0, "limit_test_batches": 1}, False),
        ("test", {"limit_val_batches": 0, "limit_test_batches": 1.0}, True),
        ("val", {"limit_val_batches": 0, "limit_test_batches": 1}, True),  # switched off is not limited
    ],
)
def test_each_split_has_the_limit_of_its_own(split, limits, whole):
    module = _KeepsSizes()
    _fit([_metrics(split=split)], _tasks(eval_tasks="current"), module, max_epochs=1, **limits)
    assert 16 in module.sizes
    assert (4 in module.sizes) == whole  # 20 images of each task, in batches of 16


class _TwoLoaders(DigitsData):
    def val_dataloader(self):
        return [self.loader("val"), self.loader("val")]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (TrainingDigits, {}, "this fit has no validation loader"),
        (_TwoLoaders, {}, "measures one validation loader, and this fit has 2"),
        (DigitsData, {"split": "test"}, "`split='test'` needs a task sequence"),
    ],
    ids=["none", "several", "test"],
)
def test_an_ordinary_fit_is_told_what_it_lacks(data, options, message):
    module = WithoutValidation() if data is TrainingDigits else PerTask()
    with pytest.raises(MisconfigurationException, match=message) as error:
        _fit([_metrics(**options)], data(), module)
    assert "val_fraction" not in str(error.value)


def test_a_sequence_without_test_data_is_not_sent_to_them():
    with pytest.raises(MisconfigurationException, match=r"no test data for task 0.*`split='val'`"):
        _fit([_metrics(split="test")], ClassIncremental(TrainingDigits(), num_tasks=2, val_fraction=0.2), PerTask())
