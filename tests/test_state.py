"""What a run saves is plain: tensors and plain Python, which load without running any code."""

import random

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_cl.callbacks import ContinualMetrics, TaskEarlyStopping
from lightning_cl.datamodules import ClassIncremental, Digits, DomainIncremental, Joint, Permute, TaskList
from lightning_cl.tasks import ContinualCallback
from tests.modules import DigitsData, PerTask, Plain, quiet_trainer

_PLAIN = (type(None), bool, int, float, str, bytes)


def _odd_parts(value, path="state"):
    """Name everything in nested containers that is neither a tensor with a storage of its own nor plain Python."""
    if isinstance(value, torch.Tensor):
        own = value.numel() * value.element_size()
        return [] if value.untyped_storage().nbytes() == own else [f"{path}: a slice of a larger tensor"]
    if type(value) in _PLAIN:
        return []
    if isinstance(value, dict) and type(value).__name__ in ("dict", "OrderedDict"):
        items = [(f"{path}[{key!r}]", part) for key, part in value.items()]
        odd_keys = [f"{path}: key {key!r}" for key in value if type(key) not in _PLAIN]
    elif type(value) in (list, tuple, set):
        items, odd_keys = [(f"{path}[{index}]", part) for index, part in enumerate(value)], []
    else:
        return [f"{path}: {type(value).__name__}"]
    return odd_keys + [odd for place, part in items for odd in _odd_parts(part, place)]


class _Copies(ContinualCallback):
    """Makes the run keep a copy to go back to, which is part of its checkpoints."""

    wants_rollback = True


def _train(tmp_path, sequence, module=None, metrics=None, steps=None):
    """Train a stream, and return its Trainer and the path of the last checkpoint, written inside an epoch if asked."""
    metrics = metrics or ContinualMetrics(tasks="all", print_table=False)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=steps, save_top_k=0 if steps else 1)
    stopping = TaskEarlyStopping("train_end", patience=9, check_on_train_epoch_end=True, strict=False)
    trainer = quiet_trainer(
        callbacks=[metrics, checkpoint, stopping, _Copies()], enable_checkpointing=True, max_epochs=1
    )
    trainer.fit(module or Plain(), datamodule=sequence)
    return trainer, tmp_path / "last.ckpt"


def _tasks():
    return ClassIncremental(DigitsData(), num_tasks=3)


@pytest.mark.parametrize("steps", [None, 4])
def test_a_checkpoint_of_a_stream_loads_without_running_code(tmp_path, steps):
    _, path = _train(tmp_path, _tasks(), steps=steps)
    state = torch.load(path, weights_only=True)
    assert _odd_parts(state) == []
    assert {"lightning_cl", "callbacks", "state_dict"} < set(state)


def test_the_state_of_every_callback_is_plain(tmp_path):
    trainer, _ = _train(tmp_path, _tasks())
    states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}
    assert _odd_parts(states) == []
    torch.save(states, tmp_path / "states.pt")
    assert set(torch.load(tmp_path / "states.pt", weights_only=True)) == set(states)


@pytest.mark.parametrize(
    "sequence",
    [
        _tasks,
        lambda: DomainIncremental(Digits(), transforms=[None, Permute(1)]),
        lambda: TaskList([DigitsData(), DigitsData()]),
        lambda: Joint(DigitsData()),
        lambda: ClassIncremental(DigitsData(), num_tasks=2, class_order=torch.randperm(6).tolist()),
    ],
)
def test_the_state_of_every_sequence_is_plain(sequence, tmp_path):
    data = sequence()
    data.setup("fit")
    assert _odd_parts(data.state_dict()) == []
    torch.save(data.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == data.state_dict()


def test_the_state_of_the_base_travels_with_the_sequence(tmp_path):
    class Remembers(DigitsData):
        seen = 0

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    base = Remembers()
    base.seen = 7
    _, path = _train(tmp_path, ClassIncremental(base, num_tasks=2))
    again = Remembers()
    sequence = ClassIncremental(again, num_tasks=2)
    assert isinstance(sequence, LightningDataModule)
    quiet_trainer(max_epochs=1).validate(Plain(), datamodule=sequence, verbose=False)
    sequence.load_state_dict(torch.load(path, weights_only=True)["ClassIncremental"])
    assert again.seen == 7


def test_a_monitored_matrix_is_plain_too(tmp_path):
    metrics = ContinualMetrics(monitor="val_acc", print_table=False)
    sequence = ClassIncremental(DigitsData(), num_tasks=3, eval_loaders="per_task")
    _, path = _train(tmp_path, sequence, PerTask(), metrics)
    state = torch.load(path, weights_only=True)["callbacks"][metrics.state_key]
    assert state["matrix"].isnan().sum() == 3
    assert _odd_parts(state) == []


def test_a_saved_state_is_not_moved_by_the_run_that_goes_on():
    metrics = ContinualMetrics(print_table=False)
    trainer = quiet_trainer(callbacks=[metrics], max_epochs=1)
    trainer.fit(Plain(), datamodule=_tasks())
    state = metrics.state_dict()
    metrics.matrix.zero_()
    assert state["matrix"].isnan().any()


def test_the_random_states_in_a_checkpoint_are_those_of_the_run(tmp_path):
    class KeepsStates(ContinualCallback):
        def on_task_end(self, trainer, pl_module, task):
            self.torch, self.python = torch.get_rng_state(), random.getstate()

    keeper = KeepsStates()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = quiet_trainer(callbacks=[keeper, checkpoint], enable_checkpointing=True, max_epochs=1)
    trainer.fit(Plain(dropout=0.5), datamodule=_tasks())
    (saved,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_cl"]["random"]
    assert torch.equal(saved["torch"], keeper.torch)
    assert saved["python"] == keeper.python


def test_a_stream_with_a_plain_early_stopping_saves_plain_state(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = quiet_trainer(callbacks=[EarlyStopping("val_acc"), checkpoint], enable_checkpointing=True, max_epochs=1)
    with pytest.warns(UserWarning, match="ends the task here"):
        trainer.fit(Plain(), datamodule=_tasks())
    assert _odd_parts(torch.load(tmp_path / "last.ckpt", weights_only=True)) == []
