"""Observers measure a run, and do not change a bit of it."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from lightning_cl.callbacks import ContinualMetrics, TaskProgressBar
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from lightning_cl.tasks.evaluation import evaluating
from tests.modules import DigitsData, Plain, ShiftingDigits, quiet_trainer


class Noisy(Plain):
    """Draws from every generator while it trains, has buffers that training moves, and a layer kept in eval mode."""

    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True)
        self.frozen = torch.nn.Dropout(0.9)
        self.frozen.eval()

    def forward(self, images):
        return super().forward(images + 0.01 * torch.randn_like(images))  # in evaluation too

    def training_step(self, batch, batch_idx):
        images, labels = batch
        images = self.frozen(images) * (1 + 0.01 * np.random.rand()) + 0.01 * random.random()
        return super().training_step((images, labels), batch_idx)


class _KeepsTheRun(Callback):
    """Photographs the run after each step and at the end."""

    def __init__(self):
        self.random_states, self.modes = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._photograph(pl_module)

    def on_train_end(self, trainer, pl_module):
        self._photograph(pl_module)
        self.optimizer = trainer.optimizers[0].state_dict()
        self.gradients = [p.grad is None or p.grad.clone() for p in pl_module.parameters()]

    def _photograph(self, pl_module):
        name, keys, *rest = np.random.get_state()
        numpy_state = [name, keys.tolist(), *rest]
        self.random_states.append([torch.get_rng_state().tolist(), numpy_state, random.getstate()])
        self.modes.append({name: layer.training for name, layer in pl_module.named_modules()})


class _Draws(ContinualCallback):
    """An observer that uses up random numbers."""

    observer = True

    def on_task_start(self, trainer, pl_module, task):
        torch.rand(3), np.random.rand(3), random.random()

    on_task_end = on_task_start


def _run(callbacks, base=DigitsData, **settings):
    seed_everything(1, verbose=False)
    module, keeper = Noisy(), _KeepsTheRun()
    trainer = quiet_trainer(callbacks=[keeper, *callbacks], **settings)
    trainer.fit(module, datamodule=ClassIncremental(base(), num_tasks=3))
    return module, keeper


def _equal(first, second):
    """Compare nested containers of tensors and plain values."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first == second


def _assert_same_run(with_observers, without):
    (module, keeper), (other, other_keeper) = with_observers, without
    assert _equal(module.state_dict(), other.state_dict())  # the buffers of batch norm among them
    assert _equal(keeper.optimizer, other_keeper.optimizer)
    assert _equal(keeper.gradients, other_keeper.gradients)
    assert keeper.random_states == other_keeper.random_states
    assert keeper.modes == other_keeper.modes


OBSERVERS = {
    "matrix": lambda: [ContinualMetrics(tasks="all", print_table=False)],
    "test matrix": lambda: [ContinualMetrics(split="test", print_table=False)],
    "two": lambda: [ContinualMetrics(print_table=False), ContinualMetrics(split="test", print_table=False)],
    "progress bar": lambda: [TaskProgressBar()],
    "random": lambda: [_Draws()],
}


@pytest.mark.parametrize("observers", list(OBSERVERS))
def test_an_observer_leaves_the_run_as_it_is(observers):
    shown = {"enable_progress_bar": True} if observers == "progress bar" else {}
    _assert_same_run(_run(OBSERVERS[observers](), **shown), _run([]))


def test_observers_leave_a_base_with_random_augmentation_as_it_is():
    _assert_same_run(_run(OBSERVERS["matrix"](), ShiftingDigits), _run([], ShiftingDigits))


def test_observers_leave_the_run_as_it_is_when_validation_is_off():
    observers = [ContinualMetrics(tasks="all", split="test", print_table=False)]
    _assert_same_run(_run(observers, limit_val_batches=0), _run([], limit_val_batches=0))


@pytest.mark.slow
def test_observers_leave_the_run_as_it_is_with_loader_workers():
    def base():
        return DigitsData(num_workers=2)

    observers = [ContinualMetrics(tasks="all", print_table=False)]
    _assert_same_run(_run(observers, base, max_epochs=1), _run([], base, max_epochs=1))


def test_loader_workers_do_not_change_the_run():
    with_workers = _run([], lambda: DigitsData(num_workers=1), max_epochs=1)
    _assert_same_run(with_workers, _run([], max_epochs=1))


def test_modes_and_stage_are_put_back_when_a_measurement_fails():
    class Fails(ContinualCallback):
        observer = True

        def on_task_end(self, trainer, pl_module, task):
            with evaluating(trainer, pl_module):
                self.inside = (pl_module.net.training, torch.is_grad_enabled(), trainer.validating)
                raise RuntimeError("no result")

    class KeepsModes(Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.modes = {name: layer.training for name, layer in pl_module.named_modules() if name}
            self.validating = trainer.validating

    fails, keeper, module = Fails(), KeepsModes(), Noisy()
    with pytest.raises(RuntimeError, match="no result"):
        quiet_trainer(callbacks=[fails, keeper]).fit(module, datamodule=ClassIncremental(DigitsData(), num_tasks=2))
    assert fails.inside == (False, False, True)
    assert keeper.modes == {name: name != "frozen" for name in keeper.modes}
    assert not keeper.validating


class CountsCalls(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


def test_a_buffer_that_every_forward_pass_changes_is_left_as_training_made_it():
    modules = []
    for observers in ([], [ContinualMetrics(tasks="all", print_table=False)]):
        module = CountsCalls()
        trainer = quiet_trainer(callbacks=observers, limit_val_batches=0)
        trainer.fit(module, datamodule=ClassIncremental(DigitsData(), num_tasks=2))
        modules.append(module)
    assert modules[0].calls == modules[1].calls
