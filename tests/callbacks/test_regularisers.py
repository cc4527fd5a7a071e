"""What holds for every callback that keeps a network to its past without exemplars."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import IMAGES, LABELS, DataOf, Judge, Watch, fit_stream, same, same_weights
from regularised_streams import REGULARISERS, Notes, manual_for, network_for
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_cl.callbacks import (
    ContinualMetrics,
    ElasticWeightConsolidation,
    LearningWithoutForgetting,
    LearningWithoutMemorizing,
    ProjectedDistillation,
    Replay,
    StabilityGapTracker,
)
from lightning_cl.datamodules import ClassIncremental, Joint, TaskList
from lightning_cl.tasks import TaskClock, added_loss
from tests.modules import BrightnessData, DigitsData, Plain, Regression, quiet_trainer

pytestmark = pytest.mark.parametrize("kind", [*REGULARISERS, ProjectedDistillation])


def _plain(kind, **settings):
    return lambda: network_for(kind, **settings)


def _noisy(kind):
    return _plain(kind, lr=0.05, dropout=0.3, batch_norm=True)


TERMS = {
    LearningWithoutForgetting: "learning_without_forgetting",
    ElasticWeightConsolidation: "elastic_weight_consolidation",
    LearningWithoutMemorizing: "learning_without_memorizing",
    ProjectedDistillation: "projected_distillation",
}
# of the terms that a regulariser adds, none
NOTHING = {"weight": 0, "task_classes_only": False}
NO_TERMS = {LearningWithoutMemorizing: {**NOTHING, "gamma": 0}}


def _end(callback, module):
    return dict(module.state_dict()), callback.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8])
def test_a_resumed_run_ends_the_same(kind, step, tmp_path):
    runs, path = [], tmp_path / f"step={step}.ckpt"
    for resumed in (None, path):
        callback = kind()
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        _, module = fit_stream(
            [callback, checkpoint], _noisy(kind), DigitsData(), enable_checkpointing=True, ckpt_path=resumed
        )
        runs.append(_end(callback, module))
    assert same(*runs)


def test_a_run_resumed_at_a_tasks_end_ends_the_same(kind, tmp_path):
    runs, path = [], tmp_path / "epoch=0.ckpt"
    for resumed in (None, path):
        callback, checkpoint = kind(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        _, module = fit_stream(
            [callback, checkpoint], _noisy(kind), DigitsData(), enable_checkpointing=True, ckpt_path=resumed
        )
        runs.append(_end(callback, module))
    assert same(*runs)


def test_a_run_that_goes_on_from_a_checkpoint_without_a_past_is_told_so(kind, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit_stream([checkpoint], _plain(kind), DigitsData(), enable_checkpointing=True)
    with pytest.warns(UserWarning, match=f"{kind.__name__} begins at task 1 .* without a past"):
        fit_stream([kind()], _plain(kind), DigitsData(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_test_with_a_checkpoint_leaves_what_the_fit_learnt(kind, tmp_path):
    callback, checkpoint = kind(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer, module = fit_stream([callback, checkpoint], _plain(kind), DigitsData(), enable_checkpointing=True)
    before = callback.state_dict()
    path = tmp_path / "epoch=1.ckpt"
    trainer.test(module, datamodule=trainer.datamodule, ckpt_path=path, verbose=False)
    assert same(callback.state_dict(), before)


def _odd_parts(value):
    """What in a state is neither a tensor with a storage of its own nor plain Python."""
    if isinstance(value, torch.Tensor):
        return [] if value.untyped_storage().nbytes() == value.numel() * value.element_size() else [value]
    if isinstance(value, (dict, list)):
        return [odd for part in (value.values() if isinstance(value, dict) else value) for odd in _odd_parts(part)]
    return [] if value is None or type(value) in (int, float, str) else [value]


def test_the_state_is_plain(kind, tmp_path):
    callback = kind()
    fit_stream(
        [callback, ModelCheckpoint(tmp_path, save_last=True)], _plain(kind), DigitsData(), enable_checkpointing=True
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert same(saved, callback.state_dict())
    assert saved["classes"] == list(range(6))


def test_the_state_has_no_part_of_a_larger_tensor(kind):
    class Looks(Notes):
        def on_train_batch_end(self, *args):
            odd.extend(_odd_parts(callback.state_dict()))

    callback, odd = kind(), []
    fit_stream([callback, Looks()], _plain(kind), DigitsData())
    assert odd == []


def test_a_task_that_is_repeated_ends_as_if_it_had_been_trained_once(kind):
    runs = []
    for attempts in ([], [1, 0]):
        callback = kind()
        _, module = fit_stream([callback, Judge(1, attempts)], _noisy(kind), DigitsData())
        runs.append(_end(callback, module)[:2])
    assert same(*runs)


class Breaks(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.datamodule.current_task.index == 1:
            raise RuntimeError("broken")


@pytest.mark.parametrize("others", [[], [Breaks()]], ids=["fit", "exception"])
def test_nothing_is_left_on_the_module(kind, others):
    def traces():
        return {
            name: (sorted(vars(layer)), len(layer._forward_hooks), len(layer._forward_pre_hooks), layer.training)
            for name, layer in module.named_modules()
        }

    module, sequence = network_for(kind), ClassIncremental(DigitsData(), num_tasks=3)
    trainer = quiet_trainer(callbacks=[kind(), *others], max_epochs=1, limit_val_batches=0)
    trainer.validate(module, datamodule=sequence, verbose=False)
    module.train()
    before, parameters = traces(), [id(parameter) for parameter in module.parameters()]
    with pytest.raises(RuntimeError, match="broken") if others else nullcontext():
        trainer.fit(module, datamodule=sequence)
    assert traces() == before
    assert [id(parameter) for parameter in module.parameters()] == parameters
    assert "training_step" not in vars(module)


def test_a_second_fit_begins_anew(kind):
    callback = kind()
    trainer, module = fit_stream([callback], _plain(kind), DigitsData())

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(callback.state_dict())

    seen = []
    trainer.callbacks.append(Looks())
    trainer.fit(module, datamodule=trainer.datamodule)
    drawn = {"projector": None}  # begins with the first task
    assert same({**seen[0], **drawn}, {**kind().state_dict(), **drawn})


def test_observers_early_stopping_and_metrics_go_with_it_in_any_order(kind):
    runs = []
    for turn in (1, -1):
        callback, metrics = kind(), ContinualMetrics(print_table=False)
        others = [EarlyStopping("val_acc", mode="max", patience=1), StabilityGapTracker(probe_size=10), Replay(20)]
        callbacks = [metrics, callback, *others][::turn]
        _, module = fit_stream(callbacks, _noisy(kind), DigitsData(), limit_val_batches=1.0, max_epochs=3)
        runs.append((*_end(callback, module), metrics.matrix))
    assert same(*runs)


def test_observers_do_not_disturb_it(kind):
    runs = []
    for observers in ([], [StabilityGapTracker(probe_size=10), ContinualMetrics(print_table=False)]):
        callback = kind()
        _, module = fit_stream([callback, *observers], _noisy(kind), DigitsData(), limit_val_batches=1.0)
        runs.append(_end(callback, module))
    assert same(*runs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_loss_of_an_unchanged_network_is_known_in_any_precision(kind, precision):
    notes = Notes(TERMS[kind])
    fit_stream([kind(), notes], _plain(kind, lr=0.0), DigitsData(), precision=precision)
    if kind is ProjectedDistillation:  # a projector begins with random weights, and here they stay
        assert min(notes.terms[3:]) > 0
    else:
        assert notes.terms[3:] == [0.0] * 6


def test_a_stream_of_one_task_adds_nothing(kind):
    runs = []
    for callbacks in ([], [kind()]):
        _, module = fit_stream(callbacks, _plain(kind), sequence=Joint(DigitsData()))
        runs.append(module)
    assert same_weights(*runs)


def test_with_weight_zero_and_all_classes_the_run_is_that_without_it(kind):
    runs = []
    for callbacks in ([], [kind(**NO_TERMS.get(kind, NOTHING))]):
        _, module = fit_stream(callbacks, _noisy(kind), DigitsData())
        runs.append((dict(module.state_dict()), torch.get_rng_state()))
    assert same(*runs)


def test_the_term_is_divided_under_gradient_accumulation(kind):
    """Three batches of a step have the gradient of their mean."""
    ends, digits = [], TensorDataset(IMAGES, LABELS)
    for data, settings in (
        (DataOf(digits, batch_size=48), {}),
        (DataOf(digits, batch_size=16), {"accumulate_grad_batches": 3}),
    ):
        notes = Notes()
        fit_stream([kind(), notes], _plain(kind), data, max_epochs=2, **settings)
        ends.append(dict(notes.networks[-1].state_dict()))
    for name, weights in ends[0].items():
        torch.testing.assert_close(ends[1][name], weights, rtol=1e-3, atol=1e-5)


def test_manual_optimisation_with_added_loss_equals_the_automatic_one(kind):
    makes = (_plain(kind), lambda: manual_for(kind, extra_loss=added_loss))
    runs = [fit_stream([kind()], make, DigitsData())[1] for make in makes]
    assert same_weights(*runs)


def test_a_batch_in_training_is_let_go_of_after_it(kind):
    class Looks(Notes):
        def on_train_batch_end(self, *args):
            assert callback._tap is None
            assert not [value for value in vars(callback).values() if isinstance(value, torch.Tensor)]

    callback = kind()
    fit_stream([callback, Looks(), Watch()], _plain(kind), DigitsData())


class Streamed(DigitsData):
    def train_dataloader(self):
        class Rows(IterableDataset):
            def __iter__(self):
                return iter([])

        return DataLoader(Rows(), batch_size=4)


@pytest.mark.parametrize(
    ("bases", "module", "message"),
    [
        ((DigitsData, Streamed), Plain, "needs data sets that can be indexed"),
        ((BrightnessData, BrightnessData), Regression, "needs class labels"),
    ],
    ids=["iterable", "regression"],
)
def test_what_does_not_go_is_refused_before_training(kind, bases, module, message):
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} {message}"):
        fit_stream([kind()], module, sequence=TaskList([base() for base in bases]))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_cuts_the_weights_is_refused(kind, strategy):
    # neither runs on a CPU: `setup` gets what it looks at
    trainer, stream = quiet_trainer(), ClassIncremental(DigitsData(), num_tasks=3)
    TaskClock.install(trainer, stream=stream)
    sharded = SimpleNamespace(callbacks=trainer.callbacks, strategy=object.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} keeps a whole.*{strategy.__name__}"):
        kind().setup(sharded, Plain(), "fit")


def test_two_of_a_kind_are_refused(kind):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit_stream([kind(), kind()], _plain(kind), DigitsData())


def test_a_step_costs_at_most_one_forward_more(kind):
    class Counts(Callback):
        """Counts the calls of the first layer by training step."""

        def __init__(self):
            self.calls, self.steps = 0, []

        def on_train_batch_start(self, trainer, pl_module, *args):
            self.calls = 0

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.steps.append((trainer.datamodule.current_task.index, self.calls))

        def count(self, *args):
            self.calls += 1

    counts, module = Counts(), network_for(kind, lr=0.05)
    module.net[0].register_forward_hook(lambda *args: counts.count())
    fit_stream([kind(), counts], module, DigitsData())
    assert {calls for task, calls in counts.steps if task == 0} == {1}
    expected = 1 if kind is ElasticWeightConsolidation else 2
    assert {calls for task, calls in counts.steps if task > 0} == {expected}
