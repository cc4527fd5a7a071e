"""What a checkpoint holds of a replay memory, and when it is read."""

import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import DataOf, Watch, fit_stream, same, same_weights

from lightning_cl.callbacks import DarkExperienceReplay, Replay
from lightning_cl.datamodules import ClassIncremental, TaskList
from tests.modules import DigitsData, Plain, quiet_trainer

BOTH = pytest.mark.parametrize("callback", [Replay, DarkExperienceReplay])


class SaveAfterStep(Callback):
    """Saves in the hook in which Lightning's own `ModelCheckpoint` does, but from any place in the list."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@BOTH
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_checkpoint_has_the_batch_of_its_step_wherever_the_saving_callback_stands(callback, first, tmp_path):
    path = tmp_path / "step=4.ckpt"
    callbacks = [SaveAfterStep(4, path), callback(20, start="online")]
    uninterrupted, module = fit_stream(callbacks if first else callbacks[::-1])
    memory = next(c for c in uninterrupted.callbacks if isinstance(c, callback)).memory
    again = callback(20, start="online")
    _, resumed = fit_stream([again], ckpt_path=path)
    assert same(again.memory.state_dict(), memory.state_dict())
    assert same_weights(resumed, module)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of task 1, and the arguments that its memory was made with."""
    path = tmp_path / "step=4.ckpt"
    fit_stream([SaveAfterStep(4, path), Replay(20, seed=3)])
    return path


def test_resuming_with_another_start_is_refused(saved):
    with pytest.raises(MisconfigurationException, match=r"`start='next_task'`, this one has `start='online'`"):
        fit_stream([Replay(20, seed=3, start="online")], ckpt_path=saved)


def test_a_test_with_a_checkpoint_leaves_the_memory_of_the_fit(saved):
    replay = Replay(20)
    trainer, module = fit_stream([replay], Plain, DigitsData())
    before = replay.memory.state_dict()
    trainer.test(module, datamodule=trainer.datamodule, ckpt_path=saved, verbose=False)
    assert same(replay.memory.state_dict(), before)


def test_a_test_with_a_checkpoint_does_not_compare_memories(saved):
    trainer = quiet_trainer(callbacks=[Replay(30, "reservoir", seed=9)])
    trainer.test(Plain(), datamodule=ClassIncremental(DigitsData(), num_tasks=3), ckpt_path=saved, verbose=False)


def test_a_checkpoint_without_a_memory_warns_that_nothing_of_the_past_is_replayed(tmp_path):
    path = tmp_path / "step=4.ckpt"
    fit_stream([SaveAfterStep(4, path)])
    with pytest.warns(UserWarning, match=r"Replay begins at task 1 .*with an empty memory"):
        fit_stream([Replay(20)], ckpt_path=path)


def test_sequence_and_callback_can_be_pickled_after_a_fit():
    replay = Replay(20)
    trainer, _ = fit_stream([replay], Plain, DigitsData())
    again = pickle.loads(pickle.dumps(replay))
    assert same(again.memory.state_dict(), replay.memory.state_dict())
    sequence = trainer.datamodule
    sequence.trainer = None
    assert pickle.loads(pickle.dumps(sequence)).classes_per_task == sequence.classes_per_task


class Unlabelled(torch.utils.data.Dataset):
    """Samples whose labels are only known once they are read; counts the reading."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.reads += 1
        return self.dataset[index]


def test_labels_that_have_to_be_read_are_read_once():
    data = [Unlabelled(DataOf().dataset) for _ in range(2)]
    watch = Watch()
    fit_stream([Replay(20, start="online"), watch], sequence=TaskList([DataOf(dataset) for dataset in data]))
    replayed = sum(0 if rows is None else int(rows.sum()) for _, _, rows in watch.steps)
    for_training = 2 * 144 + replayed
    to_see_their_structure = 2
    assert sum(dataset.reads for dataset in data) == for_training + 2 * 144 + to_see_their_structure
