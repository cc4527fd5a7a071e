"""Modules and DataModules as people write them train over a stream, unchanged."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import WarningCache

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from lightning_cl.tasks import ContinualCallback, added_loss
from tests.modules import (
    CLASSIFIERS,
    BrightnessData,
    DigitsData,
    Manual,
    OwnTransfer,
    PerTask,
    Plain,
    PredictsLabels,
    Regression,
    Scheduled,
    ShiftingDigits,
    TorchvisionModule,
    TrainingDigits,
    TwoHeads,
    WithoutValidation,
    quiet_trainer,
)


def _fit(module, base=None, metrics=None, callbacks=(), num_tasks=3, stream=None, **settings):
    metrics = metrics or ContinualMetrics(print_table=False)
    trainer = quiet_trainer(callbacks=[metrics, *callbacks], **settings)
    sequence = ClassIncremental(base or DigitsData(), num_tasks=num_tasks, **(stream or {}))
    trainer.fit(module, datamodule=sequence)
    return metrics, trainer


def _assert_a_stream_was_learnt(matrix, num_tasks=3):
    """Each task was measured after itself and all later ones, and was known right after its training."""
    assert matrix.shape == (num_tasks, num_tasks)
    assert torch.equal(matrix.isnan(), torch.ones(num_tasks, num_tasks).triu(1).bool())
    assert matrix.diagonal().min() > 0.8  # by chance 1 of 6


@pytest.mark.parametrize(
    ("module", "base"),
    [*CLASSIFIERS, (Manual, DigitsData), (PredictsLabels, DigitsData)],
)
def test_an_unchanged_module_trains_over_a_stream_in_one_fit(module, base):
    seed_everything(0, verbose=False)
    metrics, trainer = _fit(module(), base(), max_epochs=8)
    _assert_a_stream_was_learnt(metrics.matrix)
    assert trainer.current_epoch == 24


def test_a_torchvision_classifier_trains_over_a_stream():
    seed_everything(0, verbose=False)
    metrics, _ = _fit(TorchvisionModule(), num_tasks=2, max_epochs=1)
    assert metrics.matrix.isnan().tolist() == [[False, True], [False, False]]


def test_a_stream_without_memory_forgets_the_first_task():
    seed_everything(0, verbose=False)
    metrics, _ = _fit(Plain(), max_epochs=8)
    assert metrics.matrix[2, 0] < 0.2
    assert metrics.task_aware_matrix[2, 0] > metrics.matrix[2, 0]  # told the task, it chooses between two classes


def test_the_matrix_agrees_with_what_the_module_logs_about_each_task():
    seed_everything(0, verbose=False)
    metrics, trainer = _fit(PerTask(), stream={"eval_loaders": "per_task"})
    logged = [float(trainer.callback_metrics[f"val_acc/dataloader_idx_{task}"]) for task in range(3)]
    assert metrics.matrix[2].tolist() == pytest.approx(logged)


class _KeepsValAcc(Callback):
    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        self.values.append(float(trainer.callback_metrics["val_acc"]))


def test_checkpoints_follow_the_val_acc_of_an_unchanged_module(tmp_path):
    seed_everything(0, verbose=False)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=2, filename="{epoch}")
    seen = _KeepsValAcc()
    _fit(Plain(), callbacks=[checkpoint, seen], enable_checkpointing=True)
    assert len(seen.values) == 6
    kept = sorted(float(score) for score in checkpoint.best_k_models.values())
    assert kept == pytest.approx(sorted(seen.values)[-2:])
    assert sorted(str(path) for path in tmp_path.glob("*.ckpt")) == sorted(checkpoint.best_k_models)


def test_a_base_without_validation_data_is_measured_on_training_data_held_out():
    seed_everything(0, verbose=False)
    metrics, _ = _fit(WithoutValidation(), TrainingDigits(), stream={"val_fraction": 0.25}, max_epochs=8)
    _assert_a_stream_was_learnt(metrics.matrix)


def test_hooks_of_the_base_work_on_training_and_evaluation_batches():
    base = ShiftingDigits()
    _fit(Plain(), base, max_epochs=1)
    steps = 9  # three tasks of 48 images, in batches of 16
    validation = 2 + 3 + 4  # 20, 40 and 60 images of one, two and three tasks, each task's by itself
    assert base.transferred["train"] == steps
    assert base.transferred["eval"] >= validation


@pytest.mark.parametrize(("module", "base"), [(OwnTransfer, DigitsData), (Plain, ShiftingDigits), (Plain, DigitsData)])
def test_lightning_says_of_batch_hooks_what_it_says_in_an_ordinary_fit(module, base, monkeypatch):
    def said(data):
        monkeypatch.setattr(data_connector, "warning_cache", WarningCache())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(max_epochs=1).fit(module(), datamodule=data)
        return {str(warning.message) for warning in caught if "batch_transfer" in str(warning.message)}

    assert said(ClassIncremental(base(), num_tasks=2)) == said(base())


def test_regression_fills_the_matrix_from_a_metric_of_the_module():
    seed_everything(0, verbose=False)
    metrics = ContinualMetrics(monitor="val_mae", mode="min", print_table=False)
    trainer = quiet_trainer(callbacks=[metrics], max_epochs=8)
    transforms = [None, torch.Tensor.neg]
    trainer.fit(Regression(), datamodule=DomainIncremental(BrightnessData(), transforms, eval_loaders="per_task"))
    matrix = metrics.matrix
    assert matrix.isnan().tolist() == [[False, True], [False, False]]
    assert matrix[0, 0] < 0.25
    assert matrix[1, 0] > matrix[0, 0]
    assert metrics.averages["forgetting"] == pytest.approx(float(matrix[1, 0] - matrix[0, 0]))


def test_two_layers_that_could_be_the_head_are_an_error_that_names_both():
    with pytest.raises(MisconfigurationException, match=r"'main'.*'auxiliary'.*`head=") as error:
        _fit(TwoHeads())
    assert "'net.0'" in str(error.value)  # the layers that there are, so that one can be typed


def test_head_says_which_layer_gives_the_scores():
    seed_everything(0, verbose=False)
    metrics, _ = _fit(TwoHeads(), metrics=ContinualMetrics(head="main", print_table=False), max_epochs=8)
    _assert_a_stream_was_learnt(metrics.matrix)


def test_gradient_accumulation_steps_as_often_as_it_says():
    seed_everything(0, verbose=False)
    metrics, trainer = _fit(Plain(), accumulate_grad_batches=2, max_epochs=10)
    assert trainer.global_step == 3 * 10 * 2  # 3 batches an epoch are 2 steps
    _assert_a_stream_was_learnt(metrics.matrix)


class _KeepsTheRate(ContinualCallback):
    """Keeps the learning rate of each task's last step, and how far its schedule is when the task ends."""

    def __init__(self):
        self.rates, self.counts = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_task_end(self, trainer, pl_module, task):
        self.rates.append(self.rate)
        self.counts.append((pl_module.schedulers[-1].last_epoch, pl_module.horizons[-1][-1]))


def _last_rate(schedule, steps):
    """The rate of the last of so many steps, by the papers' formulas, from at most 0.1."""
    return 0.05 * (1 + math.cos(math.pi * (steps - 1) / steps)) if schedule == "cosine" else 0.1 / 25 / 1e4


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_schedule_per_step_ends_exactly_with_each_task(schedule, accumulate):
    keeper, module = _KeepsTheRate(), Scheduled(schedule)
    _, trainer = _fit(
        module, callbacks=[keeper], stream={"epochs_per_task": [1, 2, 1]}, accumulate_grad_batches=accumulate
    )
    steps = 3 if accumulate == 1 else 2
    assert module.horizons == [(1, -1, steps), (2, -1, 2 * steps), (1, -1, steps)]
    assert keeper.counts == [(steps, steps), (2 * steps, 2 * steps), (steps, steps)]
    assert keeper.rates[1] == pytest.approx(_last_rate(schedule, 2 * steps))
    assert trainer.global_step == 4 * steps


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_without_reset_a_schedule_spans_the_whole_stream(schedule):
    keeper, module = _KeepsTheRate(), Scheduled(schedule)
    trainer = quiet_trainer(callbacks=[ContinualMetrics(print_table=False), keeper])
    sequence = ClassIncremental(
        DigitsData(), classes_per_task=[3, 2, 1], epochs_per_task=[1, 2, 1], reset_optimizer=False
    )
    trainer.fit(module, datamodule=sequence)
    total = 5 + 2 * 3 + 2  # 72, 48 and 24 images in batches of 16
    ((max_epochs, _, steps),) = module.horizons
    assert (max_epochs, steps) == (4, total)
    assert keeper.counts == [(5, total), (11, total), (13, total)]
    assert keeper.rates[2] == pytest.approx(_last_rate(schedule, total))
    assert trainer.global_step == total


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_max_steps_are_the_horizon_of_each_task(schedule):
    keeper, module = _KeepsTheRate(), Scheduled(schedule)
    _, trainer = _fit(module, callbacks=[keeper], max_epochs=-1, max_steps=4)
    assert module.horizons == [(-1, 4, 4)] * 3
    assert keeper.counts == [(4, 4)] * 3
    assert trainer.global_step == 12


class _Decay(ContinualCallback):
    """A term that pulls the weights to zero."""

    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        return 0.01 * sum(weight.square().sum() for weight in pl_module.parameters())


def test_manual_optimisation_that_leaves_out_a_loss_is_told_what_to_call():
    with pytest.raises(MisconfigurationException, match=r"_Decay adds a loss.*lightning_cl\.tasks\.added_loss\(self"):
        _fit(Manual(), callbacks=[_Decay()])


def test_manual_optimisation_with_added_loss_equals_the_automatic_one():
    modules = []
    for make in (Plain, lambda: Manual(extra_loss=added_loss)):
        seed_everything(0, verbose=False)
        modules.append(make())
        _fit(modules[-1], callbacks=[_Decay()])
    for automatic, manual in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(automatic, manual)


def test_added_loss_is_zero_where_no_callback_has_one():
    modules = []
    for extra in (None, added_loss):
        seed_everything(0, verbose=False)
        modules.append(Manual(extra_loss=extra))
        _fit(modules[-1])
    for without, asked in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(without, asked)


class Masked(Plain):
    """Answers with its layer's scores after a mask of its own."""

    def forward(self, images):
        scores = super().forward(images)
        return scores.masked_fill(torch.arange(scores.shape[1]) < 4, -1e9)


def test_what_the_module_answers_counts_and_not_what_its_layer_put_out():
    metrics = ContinualMetrics(print_table=False)
    trainer = quiet_trainer(callbacks=[metrics], max_epochs=3)
    trainer.fit(Masked(), datamodule=ClassIncremental(DigitsData(), num_tasks=3))
    assert metrics.matrix[0, 0] == metrics.matrix[1, 1] == 0
    assert metrics.matrix[2, 2] > 0.4
