"""What is wrong with a replay is said before training starts: the argument, what was got, what is allowed."""

from pathlib import Path

import pytest
import torch
from command_line import OPTIONS, error_of, options_for
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import IMAGES, LABELS, AnyBatch, DataOf, fit_stream
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_cl.callbacks import DarkExperienceReplay, Replay
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, TaskList
from tests.modules import BrightnessData, DictDigits, DictModule, DigitsData, Plain, Regression, TwoHeads, quiet_trainer

BOTH = pytest.mark.parametrize("callback", [Replay, DarkExperienceReplay])


class NeverTrained(AnyBatch):
    """Fails the test if a single batch is trained on: errors come before."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training had begun")


def _refused(replay, match, sequence=None, module=NeverTrained, error=MisconfigurationException, **settings):
    with pytest.raises(error, match=match) as caught:
        fit_stream([replay], module, sequence=sequence, **settings)
    return str(caught.value)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"size": -3}, "`size` must be at least 1, got -3"),
        ({"per_class": 0}, "`per_class` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": -1}, "`batch_size` must be at least 1, got -1"),
        ({"selection": "newest"}, "`selection` must be one of 'class_balanced', .*'herding', got 'newest'"),
        ({"storage": "disk"}, "`storage` must be one of 'reference', 'copy', got 'disk'"),
        ({"start": "now"}, "`start` must be one of 'next_task', 'online', got 'now'"),
        ({"per_class": 2, "selection": "reservoir"}, "`per_class` is for .*got 2 with 'reservoir'"),
        ({"selection": "herding", "start": "online"}, "`selection='herding'` compares .*`start='online'` does not go"),
    ],
    ids=str,
)
@BOTH
def test_an_argument_out_of_range(callback, arguments, message):
    with pytest.raises(ValueError, match=message):
        callback(**{"size": 20, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mix": "shuffle"}, "`mix` must be one of 'append', 'joint', got 'shuffle'"),
        ({"weight": 1.5}, "`weight` must be from 0 to 1, got 1.5"),
        ({"weight": -0.1}, "`weight` must be from 0 to 1, got -0.1"),
        ({"mix": "joint", "start": "online"}, "`mix='joint'` .*`start='online'` does not go with it"),
        ({"mix": "joint", "batch_size": 5}, "`mix='joint'` .*`batch_size=5` does not go with it"),
    ],
    ids=str,
)
def test_an_argument_of_replay_alone_that_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Replay(**{"size": 20, **arguments})


@pytest.mark.parametrize(
    "arguments", [{"size": 0}, {"batch_size": 0}, {"selection": "newest"}, {"mix": "shuffle"}, {"storage": "disk"}]
)
def test_wrong_arguments_are_refused_even_where_replay_is_off(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        Replay(**arguments)


@pytest.mark.parametrize(
    ("argument", "value"), [("size", "20"), ("size", 2.5), ("batch_size", 2.5), ("per_class", "3")]
)
@BOTH
def test_counts_are_whole_numbers(callback, argument, value):
    with pytest.raises((TypeError, ValueError), match=f"`{argument}` must .*{value!r}"):
        callback(**{"size": 20, argument: value})


# ------------------------------------------------------------------ the stream


@BOTH
def test_a_memory_smaller_than_one_slot_for_each_class(callback):
    message = r"`size=5` of \w+ is less than one slot for each of the 6 classes.*at least 6"
    _refused(callback(5, selection="class_balanced"), message)
    fit_stream([callback(6, selection="class_balanced")])


def test_a_memory_smaller_than_one_slot_for_each_task_that_shares_it():
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg, torch.Tensor.abs])

    class Untrained(Regression):
        training_step = NeverTrained.training_step

    _refused(Replay(2, "random"), r"`size=2` .*3 tasks", sequence, Untrained)


def test_a_memory_smaller_than_classes_that_only_show_when_samples_are_read():
    class Unknown(DictDigits):
        def dataset(self, first, count):
            data = super().dataset(first, count)
            data.truth = data.targets
            del data.targets
            data.__class__ = _Unlabelled
            return data

    sequence = TaskList([Unknown(), Unknown()])
    with pytest.raises(ValueError, match="`size` must be at least one slot for each of the 6 classes"):
        fit_stream([Replay(5)], DictModule, sequence=sequence)


class _Unlabelled(torch.utils.data.Dataset):
    def __len__(self):
        return len(self.truth)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.truth[index]}


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(IMAGES[0], LABELS[0])] * 4)


class IterableTraining(DataOf):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


@BOTH
@pytest.mark.parametrize("place", [0, 1])
def test_iterable_data(callback, place):
    bases = [DataOf(), DataOf()]
    bases[place] = IterableTraining()
    message = (
        rf"{callback.__name__} needs data sets that can be indexed, and the data of task {place} .*only be iterated"
    )
    _refused(callback(20), message, TaskList(bases))


@BOTH
def test_a_fit_without_tasks(callback):
    with pytest.raises(MisconfigurationException, match=r"this fit has no tasks.*`ClassIncremental\("):
        quiet_trainer(callbacks=[callback(20)]).fit(NeverTrained(), datamodule=DataOf())


@pytest.mark.parametrize("selection", ["class_balanced", "herding"])
def test_shares_for_classes_where_there_are_no_classes(selection):
    class Untrained(Regression):
        training_step = NeverTrained.training_step

    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])
    message = rf"`selection='{selection}'` needs class labels.*no class labels.*`selection='reservoir'`"
    _refused(Replay(20, selection), message, sequence, Untrained)


def test_the_reservoir_works_where_there_are_no_classes():
    replay = Replay(20, "reservoir")
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])
    fit_stream([replay], Regression, sequence=sequence)
    assert len(replay.memory) == 20


def test_shares_for_classes_where_one_task_has_none():
    sequence = TaskList([DataOf(), DataOf(TensorDataset(IMAGES, LABELS / 2))])
    _refused(Replay(20), "`selection='class_balanced'`.*no class labels", sequence)


# ------------------------------------------------------------------ the head


def test_herding_without_a_head_that_can_be_told():
    class Untrained(TwoHeads):
        training_step = NeverTrained.training_step

    error = _refused(
        Replay(20, "herding"), r"`selection='herding'`.*`head=", ClassIncremental(DigitsData(), num_tasks=3), Untrained
    )
    assert "'main'" in error
    assert "'auxiliary'" in error


def test_herding_with_a_head_that_is_not_there():
    message = r"`selection='herding'` compares features: `head='fc'` names no layer.*'net.4'"
    _refused(Replay(20, "herding", head="fc"), message)


def test_herding_with_the_head_named():
    replay = Replay(20, "herding", head="main")
    fit_stream([replay], TwoHeads, DigitsData())
    assert len(replay.memory) == 20


def test_herding_on_a_layer_that_is_no_head():
    """Any layer through which a batch goes once has features: the name settles it."""
    replay = Replay(20, "herding", head="net.4")
    fit_stream([replay], Plain, DigitsData())
    assert len(replay.memory) == 20


# ------------------------------------------------------------------ resuming


def _first_run(tmp_path, replay):
    fit_stream([replay, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], enable_checkpointing=True)
    return tmp_path / "epoch=0.ckpt"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 30}, r"`size` is 20 in the saved memory and 30 in this one.*`size=20`"),
        ({"selection": "reservoir"}, r"`selection` is 'class_balanced' in the saved memory and 'reservoir'"),
        ({"per_class": 3}, r"`per_class` is None in the saved memory and 3"),
        ({"seed": 4}, r"`seed=3`.*`seed=4`"),
    ],
    ids=str,
)
def test_resuming_with_another_memory(arguments, named, tmp_path):
    path = _first_run(tmp_path, Replay(20, seed=3))
    _refused(Replay(**{"size": 20, "seed": 3, **arguments}), named, ckpt_path=path)


def test_resuming_takes_the_seed_of_the_checkpoint_unless_one_is_given(tmp_path):
    path = _first_run(tmp_path, Replay(20, seed=3))
    replay = Replay(20)
    fit_stream([replay], ckpt_path=path)
    assert replay.memory.seed == 3


def test_resuming_inside_an_epoch_with_another_mix(tmp_path):
    """As with another batch size of the loader: samples would be seen twice or not at all."""
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit_stream([Replay(20), checkpoint], enable_checkpointing=True)
    _refused(Replay(20, mix="joint"), "`mix", ckpt_path=tmp_path / "step=5.ckpt")


# ------------------------------------------------------------------ the command line

FIT = [*OPTIONS, "--trainer.limit_train_batches=2"]


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"size": 9}, "`size=9` of Replay is less than one slot for each of the 10 classes"),
        ({"size": 20, "batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"size": 20, "weight": 2}, "`weight` must be from 0 to 1, got 2"),
        ({"size": 20, "selection": "herding", "start": "online"}, "`selection='herding'` compares"),
        ({"size": 20, "mix": "joint", "start": "online"}, "`mix='joint'` shuffles"),
        ({"size": 20, "selection": "herding", "head": "fc"}, "`selection='herding'` compares features: `head='fc'`"),
    ],
    ids=str,
)
def test_a_wrong_replay_is_one_message(arguments, message, capsys):
    error = error_of(capsys, *FIT, *options_for("Replay", **arguments))
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("option", ["selection=newest", "storage=disk", "mix=shuffle", "start=now", "size=many"])
def test_a_choice_that_there_is_not_is_answered_by_the_parser(option, capsys):
    name = option.partition("=")[0]
    error = error_of(capsys, *FIT, *options_for("Replay"), f"--trainer.callbacks.{option}")
    assert name in error
    assert option.partition("=")[2] in error


@pytest.mark.usefixtures("_elsewhere")
def test_two_memories_are_one_message(capsys):
    error = error_of(capsys, *FIT, *options_for("Replay", size=20), *options_for("DarkExperienceReplay", size=20))
    assert error == "error: One run has one replay memory, got Replay and DarkExperienceReplay. Take one out.\n"


@pytest.mark.usefixtures("_elsewhere")
def test_two_memories_of_one_kind_are_one_message(capsys):
    error = error_of(capsys, *FIT, *options_for("Replay", size=20), *options_for("Replay", size=30))
    assert error.startswith("error: `trainer.callbacks` has more than one Replay. Take one out")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
def test_a_folder_that_cannot_be_written_to_is_one_message(capsys):
    Path("file").write_text("")
    checkpoint = options_for("ModelCheckpoint", dirpath="file/run")
    error = error_of(capsys, *FIT, *options_for("Replay", size=20, storage="copy"), *checkpoint)
    assert error.startswith("error: `storage='copy'` cannot write to ")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_elsewhere")
def test_a_copied_run_is_resumed_from_another_folder_and_a_lost_file_is_one_message(capsys, tmp_path, monkeypatch):
    checkpoint = options_for("ModelCheckpoint", dirpath="run", save_last="true", save_top_k=-1, filename="{epoch}")
    copies = options_for("Replay", size=20, storage="copy")
    main(["fit", *FIT, *copies, *checkpoint])
    resume = f"--ckpt_path={tmp_path / 'run' / 'epoch=2.ckpt'}"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli = main(["fit", *FIT, *copies, *checkpoint, resume])
    assert cli.trainer.current_epoch == 5
    assert len(list(Path("run", "exemplars").iterdir())) == 5
    next((tmp_path / "run" / "exemplars").glob("task_1-*")).unlink()
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    capsys.readouterr()
    error = error_of(capsys, *FIT, *copies, *checkpoint, resume)
    assert error.startswith("error: The copied exemplars 'task_1-")
    assert error.count("\n") == 1
