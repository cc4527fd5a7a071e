import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.model_helpers import is_overridden
from plain_bases import (
    LABELS,
    Coloured,
    FullData,
    IterableData,
    PlainData,
    digits,
    ready,
    samples_in,
)
from torch.utils.data import (
    DataLoader,
)

from lightning_cl.datamodules import ClassIncremental, Digits, DomainIncremental, Joint, TaskList
from lightning_cl.tasks import TaskLoader

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def _split(base=None, **arguments):
    return ClassIncremental(FullData() if base is None else base, num_tasks=5, **arguments)


def _offers(sequence, hook):
    return is_overridden(hook, sequence, LightningDataModule)


def _trainer(**arguments):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **quiet, **arguments)


class Module(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch[1]


class Transferring(FullData):
    """All three transfer hooks, which note who called them and in which stage."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("before")
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.calls.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("after training" if self.trainer.training else "after validating")
        return batch


# ------------------------------------------------------------------ the base stays itself


def test_every_hook_of_the_base_is_called_by_a_fit():
    base = Transferring()
    _trainer(limit_train_batches=1, limit_val_batches=1).fit(Module(), datamodule=_split(base))
    train, val = ["before", "transfer", "after training"], ["before", "transfer", "after validating"]
    assert base.calls == ["prepare_data", "setup fit", *(train + val) * 5, "teardown fit"]


def test_an_exception_reaches_the_base():
    class Told(FullData):
        def on_exception(self, exception):
            self.told = exception

    class Broken(Module):
        def training_step(self, batch, batch_idx):
            raise KeyError("broken")

    base = Told()
    with pytest.raises(KeyError, match="broken"):
        _trainer().fit(Broken(), datamodule=_split(base))
    assert isinstance(base.told, KeyError)


def test_the_base_is_set_up_for_each_stage_once():
    base = FullData()
    trainer, sequence = _trainer(limit_train_batches=1), _split(base)
    trainer.fit(Module(), datamodule=sequence)
    trainer.test(Module(), datamodule=sequence, verbose=False)
    assert base.calls.count("setup fit") == 2  # the tasks of a test are those of the training data
    assert base.calls.count("setup test") == 1


def test_the_base_has_the_trainer():
    bases = [PlainData(), PlainData()]
    sequence, trainer = TaskList(bases), _trainer()
    assert bases[0].trainer is None
    sequence.trainer = trainer
    assert [base.trainer for base in bases] == [trainer, trainer]


def test_the_state_of_the_base_is_saved_and_put_back(tmp_path):
    class Counting(FullData):
        count = 0

        def state_dict(self):
            return {"count": self.count, "table": torch.arange(3)}

        def load_state_dict(self, state_dict):
            self.count = state_dict["count"]

    base, resumed = Counting(), Counting()
    base.count = 5
    torch.save(ready(_split(base)).state_dict(), tmp_path / "state.ckpt")
    ready(_split(resumed)).load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert resumed.count == 5


def test_a_base_without_state_is_not_asked_to_load_any():
    class Refusing(FullData):
        def load_state_dict(self, state_dict):
            raise AssertionError("asked")

    ready(_split(Refusing())).load_state_dict(ready(_split()).state_dict())


def test_unknown_attributes_are_those_of_the_base():
    sequence = _split(Digits(batch_size=7))
    assert sequence.batch_size == 7
    assert sequence.mean == Digits.mean
    assert sequence.input_shape == (1, 8, 8)


def test_hyperparameters_are_those_of_the_base():
    class Saving(PlainData):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()

    assert _split(Saving()).hparams.width == 3


def test_attributes_that_neither_has_are_an_attribute_error():
    sequence = _split()
    assert not hasattr(sequence, "colour")
    with pytest.raises(AttributeError, match="'FullData' object has no attribute 'colour'"):
        _ = sequence.colour


@pytest.mark.parametrize(
    ("make", "offered"),
    [
        (lambda: _split(PlainData()), []),
        (lambda: _split(PlainData(), val_fraction=0.2), ["val_dataloader"]),
        (lambda: _split(FullData()), ["val_dataloader", "test_dataloader"]),
        (lambda: _split(Digits()), ["val_dataloader", "test_dataloader", "predict_dataloader", HOOKS[2]]),
        (lambda: _split(Transferring()), ["val_dataloader", "test_dataloader", *HOOKS]),
        (lambda: TaskList([PlainData(), FullData()]), ["val_dataloader", "test_dataloader"]),
        (
            lambda: TaskList([PlainData(), Digits()]),
            ["val_dataloader", "test_dataloader", "predict_dataloader", HOOKS[2]],
        ),
    ],
    ids=["train", "carved", "full", "digits", "hooks", "list", "list-hooks"],
)
def test_lightning_finds_only_those_hooks_overridden_that_a_base_overrides(make, offered):
    every = ("val_dataloader", "test_dataloader", "predict_dataloader", *HOOKS)
    for sequence in (make(), copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
        assert [hook for hook in every if _offers(sequence, hook)] == offered


def test_a_fit_without_validation_data_does_not_validate():
    class Strict(Module):
        def validation_step(self, batch, batch_idx):
            raise AssertionError("validated")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step`")
        _trainer(limit_train_batches=1).fit(Strict(), datamodule=_split(PlainData()))


def test_prediction_is_the_bases_own():
    class Predicting(PlainData):
        def predict_dataloader(self):
            return DataLoader(digits(0, 10), batch_size=5)

    predictions = _trainer().predict(Module(), datamodule=_split(Predicting()))
    assert torch.cat(predictions).tolist() == LABELS[:10].tolist()


# ------------------------------------------------------------------ the sequence itself


def test_tasks_are_known_without_a_fit():
    sequence = _split()
    assert (sequence.num_tasks, sequence.num_classes) == (5, 10)
    assert sequence.current_task.classes == (0, 1)
    assert (sequence.task_epoch, sequence.task_epochs) == (0, -1)


def test_after_a_fit_every_task_is_tested():
    trainer, sequence = _trainer(limit_train_batches=1, limit_val_batches=0), _split()
    trainer.fit(Module(), datamodule=sequence)
    sequence.setup("test")
    assert len(samples_in(sequence.test_dataloader())[1]) == 300


def test_the_current_task_stays_known_after_the_fit():
    sequence = _split()
    _trainer(limit_train_batches=1, limit_val_batches=0).fit(Module(), datamodule=sequence)
    assert sequence.current_task.index == 4


@pytest.mark.parametrize(
    "prepare", [lambda sequence: sequence, ready, lambda s: ready(s, "test")], ids=["new", "fit", "test"]
)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_a_sequence_can_be_copied_and_sent_to_another_process(duplicate, prepare):
    sequence = prepare(_split(FullData(digits(0, 200)), class_order=3, val_fraction=0.2, seed=2))
    twin = ready(duplicate(sequence))
    ready(sequence)
    assert twin.tasks == sequence.tasks
    assert torch.equal(samples_in(twin.train_dataloader())[0], samples_in(sequence.train_dataloader())[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
@pytest.mark.parametrize("make", [lambda base: _split(base), lambda base: TaskList([base])], ids=["one", "list"])
def test_a_copys_hooks_are_those_of_its_own_base(duplicate, make):
    base = Transferring()
    twin = duplicate(make(base))
    twin.on_before_batch_transfer([], 0)
    assert base.calls == []
    assert twin.calls == ["before"]


@pytest.mark.parametrize(
    "sequence",
    [
        lambda: Joint(Digits()),
        lambda: DomainIncremental(Digits(), transforms=[None]),
        lambda: TaskList([Digits(), IterableData()]),
        lambda: _split(Digits(), target_key=None, eval_loaders="per_task"),
    ],
    ids=["Joint", "DomainIncremental", "TaskList", "ClassIncremental"],
)
def test_every_sequence_hands_out_loaders_that_can_be_resumed_where_there_are_indices(sequence):
    assert isinstance(ready(sequence()).train_dataloader(), TaskLoader)


def test_the_base_can_be_used_without_the_sequence_afterwards():
    base = FullData()
    _trainer(limit_train_batches=1, limit_val_batches=0).fit(Module(), datamodule=_split(base))
    assert len(samples_in(base.train_dataloader())[1]) == 600
    _trainer(limit_train_batches=1).fit(Module(), datamodule=base)


def test_loading_a_batch_draws_nothing_from_the_global_generator():
    sequence = ready(_split(PlainData(Coloured(0, 100, transform=lambda pixels: pixels + torch.rand(())))))
    before = torch.get_rng_state()
    next(iter(sequence.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)
