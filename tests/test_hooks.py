"""The life of a task: which hook comes when, added losses, and Lightning's own callbacks on a stream."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_cl.callbacks import ContinualMetrics, TaskEarlyStopping
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import DigitsData, Plain, Scheduled, quiet_trainer


class Behaves(ContinualCallback):
    """Writes down what it hears."""

    def __init__(self, heard, name="behaviour"):
        self.heard, self.name = heard, name

    def on_task_start(self, trainer, pl_module, task):
        self.heard.append((self.name, "start", task.index))

    def accept_task(self, trainer, pl_module, task):
        self.heard.append((self.name, "accept", task.index))
        return True

    def on_task_end(self, trainer, pl_module, task):
        self.heard.append((self.name, "end", task.index))


class AObserves(Behaves):
    """First by its name, and last by its nature."""

    observer = True


class Hears(Plain):
    """A module with task hooks of its own."""

    def __init__(self, heard):
        super().__init__()
        self.heard = heard

    def on_task_start(self, task):
        self.heard.append(("module", "start", task.index))

    def on_task_end(self, task):
        self.heard.append(("module", "end", task.index))

    def on_train_epoch_start(self):
        self.heard.append(("module", "epoch", self.trainer.current_epoch))


class HearsCheckpoints(ModelCheckpoint):
    def __init__(self, heard, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.heard = heard

    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        self.heard.append(("checkpoint", "written", trainer.current_epoch))


def _fit(module, callbacks, num_tasks=2, stream=None, **settings):
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=ClassIncremental(DigitsData(), num_tasks=num_tasks, **(stream or {})))
    return trainer


def test_the_hooks_of_a_task_come_in_their_order(tmp_path):
    heard = []
    checkpoint = HearsCheckpoints(heard, tmp_path, every_n_epochs=1)
    callbacks = [checkpoint, AObserves(heard, "observer"), Behaves(heard)]
    _fit(Hears(heard), callbacks, enable_checkpointing=True, max_epochs=2)
    expected = []
    for task, epoch in ((0, 0), (1, 2)):
        expected += [
            ("behaviour", "start", task),
            ("observer", "start", task),
            ("module", "start", task),
            ("module", "epoch", epoch),
            ("checkpoint", "written", epoch),
            ("module", "epoch", epoch + 1),
            ("behaviour", "accept", task),
            ("observer", "accept", task),
            ("behaviour", "end", task),
            ("module", "end", task),
            ("observer", "end", task),
            ("checkpoint", "written", epoch + 1),
        ]
    assert heard == expected


def test_an_ordinary_fit_is_one_task():
    heard = []
    trainer = quiet_trainer(callbacks=[Behaves(heard)], max_epochs=3)
    trainer.fit(Plain(), datamodule=DigitsData())
    assert heard == [("behaviour", "start", 0), ("behaviour", "accept", 0), ("behaviour", "end", 0)]
    assert trainer.current_epoch == 3


def test_an_ordinary_fit_with_loaders_instead_of_a_datamodule_is_one_task():
    heard, data = [], DigitsData()
    data.setup("fit")
    metrics = ContinualMetrics(print_table=False)
    trainer = quiet_trainer(callbacks=[Behaves(heard), metrics], max_epochs=1)
    trainer.fit(Plain(), data.train_dataloader(), data.val_dataloader())
    assert [event[1] for event in heard] == ["start", "accept", "end"]
    assert float(metrics.matrix) == pytest.approx(float(trainer.callback_metrics["val_acc"]))


@pytest.mark.parametrize("stopping", [EarlyStopping, TaskEarlyStopping])
def test_an_ordinary_fit_that_stops_early_ends_its_task(stopping):
    heard = []
    callbacks = [stopping("val_acc", patience=1, mode="min", min_delta=2), Behaves(heard)]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=9)
    trainer.fit(Plain(), datamodule=DigitsData())
    assert trainer.current_epoch == 2
    assert heard[-1] == ("behaviour", "end", 0)
    assert len(heard) == 3


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.fit_loop.total_batch_idx + 1 >= self.batches


def test_an_ordinary_fit_that_is_told_to_stop_ends_its_task():
    heard, metrics = [], ContinualMetrics(print_table=False)
    trainer = quiet_trainer(callbacks=[Behaves(heard), metrics, StopAfter(2)], max_epochs=9)
    trainer.fit(Plain(), datamodule=DigitsData())
    assert trainer.current_epoch == 1
    assert heard[-1] == ("behaviour", "end", 0)
    assert not metrics.matrix.isnan().any()


def test_a_second_ordinary_fit_goes_on_to_its_raised_limit():
    heard, metrics = [], ContinualMetrics(print_table=False)
    trainer, module, data = quiet_trainer(callbacks=[Behaves(heard), metrics], max_epochs=1), Plain(), DigitsData()
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=data)
    assert trainer.current_epoch == 3
    assert [event[1] for event in heard] == ["start", "accept", "end"] * 2


def test_task_early_stopping_is_an_ordinary_one_in_a_fit_after_a_stream():
    stopping = TaskEarlyStopping("val_acc", patience=1, mode="min", min_delta=2)
    quiet_trainer(callbacks=[stopping], max_epochs=9).fit(Plain(), datamodule=ClassIncremental(DigitsData(), 2))
    trainer = quiet_trainer(callbacks=[stopping], max_epochs=9)
    trainer.fit(Plain(), datamodule=DigitsData())
    assert trainer.current_epoch < 9


class Decay(ContinualCallback):
    def __init__(self, rate=0.01):
        self.rate = rate

    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        return self.rate * pl_module.net[0].weight.square().sum()


class ConfidencePenalty(ContinualCallback):
    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        return None if batch_idx == 1 else 0.1 * pl_module(batch[0]).logsumexp(1).mean()


class Jitter(ContinualCallback):
    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        weight = pl_module.net[0].weight
        return (torch.rand_like(weight) * weight).mean()


class AddsItself(Plain):
    """Adds in its own code the terms that callbacks add, in the same order of sums."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        added = torch.zeros(())
        if batch_idx != 1:
            added = added + 0.1 * self(batch[0]).logsumexp(1).mean()
        added = added + 0.01 * self.net[0].weight.square().sum()
        return loss + added


class ReturnsDict(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "seen": batch_idx}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("module", [Plain, ReturnsDict])
def test_an_added_loss_equals_one_that_the_module_adds_itself(module, accumulate):
    weights = []
    for make, callbacks in ((module, [Decay(), ConfidencePenalty()]), (AddsItself, [])):
        seed_everything(0, verbose=False)
        weights.append(make())
        _fit(weights[-1], callbacks, accumulate_grad_batches=accumulate)
    for added, own in zip(*(model.parameters() for model in weights), strict=True):
        assert torch.equal(added, own)


def test_added_losses_are_logged_by_the_callbacks_name():
    trainer = _fit(Plain(), [Decay(), ConfidencePenalty()])
    weight = trainer.lightning_module.net[0].weight
    logged = trainer.callback_metrics
    assert {"loss/decay", "loss/confidence_penalty"} <= set(logged)
    assert float(logged["loss/decay"]) == pytest.approx(0.01 * weight.square().sum().item(), rel=0.05)


def test_an_added_loss_works_in_an_ordinary_fit():
    weights = []
    for make, callbacks in ((Plain, [Decay(), ConfidencePenalty()]), (AddsItself, [])):
        seed_everything(0, verbose=False)
        weights.append(make())
        quiet_trainer(callbacks=callbacks, max_epochs=1).fit(weights[-1], datamodule=DigitsData())
    for added, own in zip(*(model.parameters() for model in weights), strict=True):
        assert torch.equal(added, own)


def test_a_skipped_step_stays_skipped():
    class SkipsSteps(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    trainer = _fit(SkipsSteps(), [Decay()], max_epochs=1)
    assert trainer.lightning_module.net[0].weight.isfinite().all()


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (1, 0, 3, 2, 4), (2, 4, 0, 3, 1)])
def test_the_order_of_callbacks_does_not_change_the_run(order):
    def run(order):
        metrics = ContinualMetrics(tasks="all", print_table=False)
        stopping = TaskEarlyStopping("val_acc", mode="max", patience=1)
        callbacks = [Decay(), ConfidencePenalty(), metrics, stopping, Jitter()]
        seed_everything(0, verbose=False)
        module = Plain(dropout=0.2)
        trainer = _fit(module, [callbacks[position] for position in order])
        return [torch.tensor(trainer.global_step), *module.parameters(), metrics.matrix.nan_to_num()]

    for one, other in zip(run(order), run(range(5)), strict=True):
        assert torch.equal(one, other)


class _Score(Callback):
    """Logs a made-up score: the next of a list after each epoch."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", float(next(self.scores)))


def _epochs_of_each_task(stopping, scores, max_epochs=5, num_tasks=2):
    counts = {}

    class Counts(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            task = trainer.datamodule.current_task.index
            counts[task] = counts.get(task, 0) + 1

    _fit(Plain(), [_Score(scores), stopping, Counts()], max_epochs=max_epochs, num_tasks=num_tasks)
    return list(counts.values())


def test_early_stopping_ends_a_task_and_counts_afresh_in_the_next():
    stopping = TaskEarlyStopping("score", mode="max", patience=2)
    # the first task improves once, and stops two epochs later; the second starts lower and is given its own patience
    scores = [5, 6, 1, 1, 2, 3, 1, 4, 1]
    assert _epochs_of_each_task(stopping, scores) == [4, 5]


def test_early_stopping_in_the_last_task_ends_the_fit():
    stopping = TaskEarlyStopping("score", mode="max", patience=1)
    assert _epochs_of_each_task(stopping, [1, 2, 3, 4, 5, 9, 8]) == [5, 2]


def test_a_plain_early_stopping_ends_the_task_with_one_warning_and_is_put_back():
    stopping = EarlyStopping("score", mode="max", patience=1)
    heard = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = _fit(Plain(), [_Score([2, 1, 2, 1, 2, 1]), Behaves(heard), stopping], max_epochs=5, num_tasks=3)
    assert len([w for w in caught if "TaskEarlyStopping" in str(w.message)]) == 1
    assert trainer.current_epoch == 6
    assert [event for event in heard if event[1] == "end"] == [("behaviour", "end", task) for task in range(3)]
    assert trainer.callbacks[-1] is stopping


def test_early_stopping_respects_min_epochs_in_each_task():
    class Falls(_Score):
        def __init__(self):
            super().__init__(range(20, 0, -1))

    trainer = _fit(Plain(), [Falls(), TaskEarlyStopping("score", mode="max", patience=1)], min_epochs=3, max_epochs=5)
    assert trainer.current_epoch == 6


def test_early_stopping_and_the_checkpoint_of_its_task(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=1, filename="{epoch}")
    stopping = TaskEarlyStopping("score", mode="max", patience=1)
    _fit(Plain(), [_Score([2, 1, 3, 1]), stopping, checkpoint], enable_checkpointing=True, max_epochs=5)
    assert checkpoint.best_model_path.endswith("epoch=2.ckpt")
    assert float(checkpoint.best_model_score) == 3


def test_max_steps_count_for_each_task():
    heard = []
    trainer = _fit(Plain(), [Behaves(heard)], max_steps=7, max_epochs=-1, num_tasks=3)
    assert trainer.global_step == 21
    assert [event[2] for event in heard if event[1] == "end"] == [0, 1, 2]


def test_the_smaller_of_epochs_and_steps_ends_a_task():
    trainer = _fit(Plain(), [], max_steps=7, stream={"epochs_per_task": [1, 4]})
    assert trainer.global_step == 5 + 7  # 72 images of three digits are 5 batches


class _KeepsMetrics(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


def test_a_learning_rate_monitor_sees_each_task_start_afresh():
    logger = _KeepsMetrics()
    _fit(Scheduled("cosine"), [LearningRateMonitor("step")], logger=logger, log_every_n_steps=1, max_epochs=1)
    rates = [float(row["lr-SGD"]) for row in logger.rows if "lr-SGD" in row]
    cosine = [0.05 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert rates == pytest.approx(cosine * 2)


def test_checkpoints_of_each_epoch_hold_whole_tasks(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    _fit(Plain(), [checkpoint, ContinualMetrics(print_table=False)], enable_checkpointing=True, max_epochs=2)
    committed, measured = [], []
    for epoch in range(4):
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        committed.append(state["lightning_cl"]["progress"]["committed"])
        (matrix,) = [saved["matrix"] for name, saved in state["callbacks"].items() if "ContinualMetrics" in name]
        measured.append(int((~matrix.isnan()).sum()))
    assert committed == [False, True, False, True]
    assert measured == [0, 1, 1, 3]


def test_what_continual_metrics_logs_can_be_monitored(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="acc/task_0", mode="max", save_top_k=1, filename="{epoch}")
    _fit(Plain(), [checkpoint, ContinualMetrics(print_table=False)], enable_checkpointing=True, max_epochs=1)
    assert checkpoint.best_model_path.endswith("epoch=0.ckpt")


def test_averaged_weights_go_on_over_the_stream():
    averaging, module = WeightAveraging(), Plain()

    class Mean(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights.append(pl_module.net[0].weight.detach().clone())

    mean = Mean()
    _fit(module, [mean, averaging], max_epochs=1)
    assert len(mean.weights) == 10
    torch.testing.assert_close(module.net[0].weight.detach(), torch.stack(mean.weights).mean(0), rtol=1e-3, atol=1e-4)
