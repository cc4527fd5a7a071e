"""A Trainer call leaves module, Trainer and DataModule as it found them, however it ends."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import DigitsData, Manual, Plain, TwoHeads, quiet_trainer

_HOOKS = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]


class Breaks(ContinualCallback):
    """Raises in one hook, in the second task."""

    def __init__(self, hook=None, error=RuntimeError):
        self.error = error
        if hook is not None:
            usual = getattr(self, hook)
            setattr(self, hook, lambda *args: self._break(*args) or usual(*args))

    def _break(self, trainer, *args):
        if trainer.datamodule.current_task.index == 1:
            raise self.error("broken")

    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        return pl_module.net[0].weight.square().sum() * 1e-3

    @property
    def wants_rollback(self):
        return True


class BreaksItself(Plain):
    def training_step(self, batch, batch_idx):
        if self.trainer.datamodule.current_task.index == 1:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


def _surroundings(breaker, module=None, **settings):
    module = module or Plain()
    sequence = ClassIncremental(DigitsData(), num_tasks=3)
    stopping = EarlyStopping("val_acc", patience=50, mode="max")
    metrics = ContinualMetrics(print_table=False)
    trainer = quiet_trainer(callbacks=[metrics, stopping, breaker], **{"max_epochs": 1, **settings})
    return module, trainer, sequence


def _traces(module, trainer, sequence):
    """Everything that the suite could have changed."""
    return {
        "module": {name: frozenset(vars(layer)) for name, layer in module.named_modules()},
        "module's methods": {k for k, v in vars(module).items() if callable(v) and k not in ("_modules", "_trainer")},
        "layers": {name: type(layer) for name, layer in module.named_modules()},
        "hooks": {name: [len(getattr(layer, hook)) for hook in _HOOKS] for name, layer in module.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in module.named_parameters()},
        "buffers": [name for name, _ in module.named_buffers()],
        "trainer": frozenset(vars(trainer)),
        "callbacks": [id(callback) for callback in trainer.callbacks],
        "limits": (
            trainer.max_epochs,
            trainer.max_steps,
            trainer.min_epochs or 0,  # a fit of Lightning's own turns None into 0
            trainer.min_steps,
            trainer.limit_train_batches,
            trainer.limit_val_batches,
            trainer.num_sanity_val_steps,
            trainer.check_val_every_n_epoch,
            trainer.reload_dataloaders_every_n_epochs,
        ),
        "loops": [frozenset(vars(loop)) for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop)],
        "sequence": {name: _kind(value) for name, value in vars(sequence).items() if callable(value)},
        "base": {name: _kind(value) for name, value in vars(sequence._bases[0].module).items() if callable(value)},
        "early stopping": frozenset(vars(trainer.early_stopping_callback)),
    }


def _kind(value):
    return getattr(value, "__qualname__", type(value).__qualname__)


def _assert_nothing_is_left(objects, before):
    after = _traces(*objects)
    for part in before:
        assert after[part] == before[part], part


def _settled(breaker, module=None, **settings):
    """Module, Trainer and DataModule that know each other already, as after any Trainer call."""
    objects = _surroundings(breaker, module, **settings)
    trainer, sequence = objects[1:]
    trainer.validate(objects[0], datamodule=sequence, verbose=False)
    return objects


@pytest.mark.parametrize("module", [Plain, Manual])
def test_nothing_is_left_after_fit(module):
    breaker = Breaks() if module is Plain else Callback()
    objects = _settled(breaker, module())
    before = _traces(*objects)
    objects[1].fit(objects[0], datamodule=objects[2])
    _assert_nothing_is_left(objects, before)


def test_nothing_is_left_after_an_exception_in_training_step():
    objects = _settled(Breaks(), BreaksItself())
    before = _traces(*objects)
    with pytest.raises(RuntimeError, match="broken"):
        objects[1].fit(objects[0], datamodule=objects[2])
    _assert_nothing_is_left(objects, before)


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_epoch_start",
        "on_train_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_task_start",
        "accept_task",
        "on_task_end",
        "training_loss",
        "on_before_zero_grad",
    ],
)
def test_nothing_is_left_after_an_exception_in_a_hook(hook):
    objects = _settled(Callback())
    objects[1].callbacks[-1:] = [Breaks(hook)]
    before = _traces(*objects)
    with pytest.raises(RuntimeError, match="broken"):
        objects[1].fit(objects[0], datamodule=objects[2])
    _assert_nothing_is_left(objects, before)


def test_nothing_is_left_after_a_keyboard_interrupt():
    objects = _settled(Callback())
    objects[1].callbacks[-1:] = [Breaks("on_train_batch_end", KeyboardInterrupt)]
    before = _traces(*objects)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        objects[1].fit(objects[0], datamodule=objects[2])
    _assert_nothing_is_left(objects, before)


def test_nothing_is_left_after_an_exception_in_on_fit_end():
    objects = _settled(Callback())
    objects[1].callbacks[-1].on_fit_end = _raise
    before = _traces(*objects)
    with pytest.raises(RuntimeError, match="broken"):
        objects[1].fit(objects[0], datamodule=objects[2])
    _assert_nothing_is_left(objects, before)


def _raise(*args):
    raise RuntimeError("broken")


def test_nothing_is_left_when_a_fit_is_refused_in_setup():
    objects = _settled(Callback())
    objects[1].callbacks[-1:] = [ContinualMetrics(monitor="val_acc", print_table=False)]
    before = _traces(*objects)
    with pytest.raises(MisconfigurationException, match="per_task"):
        objects[1].fit(objects[0], datamodule=objects[2])
    _assert_nothing_is_left(objects, before)


def test_nothing_is_left_when_no_head_is_found():
    objects = _settled(Callback(), TwoHeads())
    before = _traces(*objects)
    with pytest.raises(MisconfigurationException, match="head="):
        objects[1].fit(objects[0], datamodule=objects[2])
    _assert_nothing_is_left(objects, before)


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_nothing_is_left_after_an_evaluation(call):
    class PredictsToo(Plain):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    class WithPrediction(DigitsData):
        def predict_dataloader(self):
            return self.loader("test")

    module, trainer, _ = _surroundings(Breaks(), PredictsToo())
    sequence = ClassIncremental(WithPrediction(), num_tasks=3)
    trainer.validate(module, datamodule=sequence, verbose=False)
    before = _traces(module, trainer, sequence)
    getattr(trainer, call)(module, datamodule=sequence, **({} if call == "predict" else {"verbose": False}))
    _assert_nothing_is_left((module, trainer, sequence), before)


def test_nothing_is_left_of_an_ordinary_fit():
    module, trainer = Plain(), quiet_trainer(callbacks=[ContinualMetrics(print_table=False), Breaks()], max_epochs=1)
    data = DigitsData()
    methods = {name for name, value in vars(module).items() if callable(value)}
    callbacks = list(trainer.callbacks)
    trainer.fit(module, datamodule=data)
    assert {name for name, value in vars(module).items() if callable(value) and name != "_trainer"} == methods
    assert trainer.callbacks == callbacks
    assert trainer.max_epochs == 1


def test_an_exception_in_an_ordinary_fit_leaves_nothing():
    module, trainer = Plain(), quiet_trainer(callbacks=[ContinualMetrics(print_table=False), Breaks()], max_epochs=3)
    module.on_train_epoch_end = _raise
    callbacks = list(trainer.callbacks)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, datamodule=DigitsData())
    assert module.on_train_epoch_end is _raise
    assert "training_step" not in vars(module)
    assert trainer.callbacks == callbacks
    assert trainer.max_epochs == 3


def test_the_replaced_early_stopping_keeps_what_it_learnt():
    module, trainer, sequence = _surroundings(Breaks())
    stopping = trainer.early_stopping_callback
    trainer.fit(module, datamodule=sequence)
    assert trainer.early_stopping_callback is stopping
    assert type(stopping) is EarlyStopping
    assert stopping.best_score == pytest.approx(float(trainer.callback_metrics["val_acc"]))


def test_the_same_objects_fit_a_second_time():
    seed_everything(0, verbose=False)
    module, trainer, sequence = _surroundings(Breaks())
    trainer.fit(module, datamodule=sequence)
    first_steps = trainer.global_step
    metrics = trainer.callbacks[0]
    before = metrics.matrix.clone()
    trainer.fit(module, datamodule=sequence)
    assert trainer.global_step == 2 * first_steps
    assert sequence.current_task.index == 2
    assert metrics.matrix.isnan().equal(before.isnan())
    assert not metrics.matrix.nan_to_num().equal(before.nan_to_num())


def test_after_an_exception_the_same_objects_can_be_fitted():
    module, trainer, sequence = _surroundings(Breaks("on_task_end"))
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, datamodule=sequence)
    trainer.callbacks = trainer.callbacks[:-1]
    again = quiet_trainer(callbacks=trainer.callbacks, max_epochs=1)
    again.fit(module, datamodule=sequence)
    assert again.current_epoch == 3
    assert not again.callbacks[0].matrix.diagonal().isnan().any()


def test_a_module_trained_on_a_stream_fits_an_ordinary_trainer_afterwards():
    module, trainer, sequence = _surroundings(Breaks())
    trainer.fit(module, datamodule=sequence)
    plain = quiet_trainer(max_epochs=1)
    plain.fit(module, datamodule=DigitsData())
    assert plain.global_step == 9
