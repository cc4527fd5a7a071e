"""`storage="copy"`: exemplars outlive the data that they were copied from."""

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import IMAGES, LABELS, DataOf, Judge, Numbered, Watch, fit_stream, same
from torch.utils.data import default_collate
from vanishing_data import (
    REPLAYS,
    Steps,
    Vanishing,
    VanishingArrays,
    VanishingMany,
    files_in,
    run_copied,
)

from lightning_cl.callbacks import Replay
from lightning_cl.datamodules import DomainIncremental, TaskList
from lightning_cl.datamodules.array_dataset import ArrayDataset, collate

SETS = {
    "samples": (Vanishing, {}),
    "many": (VanishingMany, {}),
    "arrays": (VanishingArrays, {"collate_fn": collate}),
    "worker": (Vanishing, {"num_workers": 1}),
}


def _gone_data_fails(replay, tmp_path):
    with pytest.raises(FileNotFoundError, match="past data is gone"):
        run_copied(tmp_path, replay)


def test_without_a_copy_the_past_data_is_needed(tmp_path):
    _gone_data_fails(Replay(20), tmp_path)


@pytest.mark.parametrize("replay", REPLAYS.values(), ids=REPLAYS)
def test_training_goes_on_without_the_past_data_as_it_does_with_it(replay, tmp_path):
    copied = run_copied(tmp_path / "copy", replay("copy"))
    referred = run_copied(tmp_path / "reference", replay("reference"), Numbered())
    assert same(copied, referred)


@pytest.mark.parametrize(("dataset", "settings"), SETS.values(), ids=SETS)
def test_any_data_set_can_be_copied(dataset, settings, tmp_path):
    copied = run_copied(tmp_path / "copy", Replay(20, storage="copy"), dataset(), dataloader=settings)
    referred = run_copied(tmp_path / "ref", Replay(20), dataset(), dataloader=settings, clears=False)
    assert same(copied, referred)


def _dict(image, label, number):
    return {"image": image.numpy(), "label": int(label), "more": [np.float32(number), {"name": f"digit {number}"}]}


def _batches(watch):
    return [batch for _, batch, _ in watch.steps]


@pytest.mark.parametrize("form", [_dict, lambda image, label, number: (image, int(label), str(number), number * 0.5)])
def test_copied_samples_make_the_same_batches_whatever_their_structure(form, tmp_path):
    watches = []
    for storage in ("copy", "reference"):
        watch = Watch()
        dataset = Vanishing(form) if storage == "copy" else Numbered(form)
        run_copied(tmp_path / storage, Replay(20, storage=storage), dataset, others=[watch])
        watches.append(_batches(watch))
    assert same(*watches)
    kinds = [type(part) for part in (watches[0][-1].values() if isinstance(watches[0][-1], dict) else watches[0][-1])]
    assert kinds == [type(part) for part in (watches[1][-1].values() if form is _dict else watches[1][-1])]


def _pad(samples):
    tokens = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(tokens) for _, _, tokens in samples], batch_first=True)
    return [*default_collate([sample[:2] for sample in samples]), tokens]


@pytest.mark.parametrize("kind", [torch.tensor, list], ids=["tensors", "lists"])
def test_samples_of_different_lengths_can_be_copied(kind, tmp_path):
    watches = []
    for storage in ("copy", "reference"):
        watch = Watch()
        dataset = Numbered(lambda image, label, number: (image, label, kind(list(range(1 + number % 5)))))
        run_copied(
            tmp_path / storage, Replay(20, storage=storage), dataset, others=[watch], dataloader={"collate_fn": _pad}
        )
        watches.append(_batches(watch))
    assert same(*watches)


Sample = namedtuple("Sample", ["image", "label"])


def test_named_tuples_are_refused_before_training(tmp_path):
    steps = Steps()
    dataset = Numbered(lambda image, label, number: Sample(image, label))
    with pytest.raises(MisconfigurationException, match=r"can be copied.*Sample"):
        run_copied(tmp_path, Replay(20, storage="copy"), dataset, others=[steps])
    assert steps.count == 0


class Opaque:
    """Something that only its own collate function understands."""

    def __init__(self, image):
        self.image = image


def test_samples_that_cannot_be_copied_are_refused_before_training(tmp_path):
    def collate_opaque(samples):
        return default_collate([(opaque.image, label) for opaque, label in samples])

    steps = Steps()
    dataset = Numbered(lambda image, label, number: (Opaque(image), label))
    with pytest.raises((TypeError, MisconfigurationException), match=r"can be copied.*Opaque"):
        run_copied(
            tmp_path, Replay(20, storage="copy"), dataset, others=[steps], dataloader={"collate_fn": collate_opaque}
        )
    assert steps.count == 0


class Augmented(Numbered):
    """Training images have noise; evaluation sees them without."""

    def __init__(self, noise=1.0):
        super().__init__()
        self.noise = noise

    def __getitem__(self, number):
        noise = self.noise * (torch.rand(()).item() + np.random.rand() + random.random())
        return IMAGES[number] + noise, LABELS[number], number

    def evaluation_view(self):
        return Augmented(0.0)


def test_copies_are_made_as_an_evaluation_sees_the_samples(tmp_path):
    watch = Watch()
    run_copied(tmp_path, Replay(20, storage="copy"), Augmented(), others=[watch])
    for (images, _, numbers), rows in watch.of_task(2):
        assert torch.equal(images[rows], IMAGES[numbers[rows]])
        assert not torch.equal(images[~rows], IMAGES[numbers[~rows]])


def test_copying_draws_nothing_from_the_global_generators(tmp_path):
    runs = [run_copied(tmp_path / s, Replay(20, storage=s, weight=None), Noisy()) for s in ("copy", "reference")]
    assert runs[0][1]["indices"].equal(runs[1][1]["indices"])
    states = []
    for storage in ("copy", "reference"):
        keeper = KeepsRandomStates()
        run_copied(tmp_path / f"{storage}-2", Replay(20, storage=storage), Noisy(), others=[keeper])
        states.append(keeper.seen)
    assert same(*states)


class Noisy(Numbered):
    __getitem__ = Augmented.__getitem__
    noise = 1.0


class KeepsRandomStates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, *args):
        self.seen.append([torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()])


def test_each_tasks_own_transform_is_in_its_copies(tmp_path):
    watch = Watch()
    sequence = DomainIncremental(DataOf(), [None, torch.Tensor.neg, None])
    checkpoint = ModelCheckpoint(tmp_path)
    fit_stream([Replay(60, "random", storage="copy"), watch, checkpoint], sequence=sequence, enable_checkpointing=True)
    signs = {float(image.sum().sign()) for (images, _, _), rows in watch.of_task(2) for image in images[rows]}
    assert signs == {1.0, -1.0}
    for (images, labels, numbers), _ in watch.of_task(2):
        assert torch.equal(images.abs(), IMAGES[numbers])
        assert torch.equal(labels, LABELS[numbers])


def test_tasks_of_different_data_sets_can_be_copied(tmp_path):
    watch, checkpoint = Watch(), ModelCheckpoint(tmp_path)
    arrays = DataOf(ArrayDataset(IMAGES, LABELS), collate_fn=collate)
    sequence = TaskList([DataOf(Numbered(lambda image, label, number: (image, label))), arrays])
    fit_stream([Replay(60, storage="copy"), watch, checkpoint], sequence=sequence, enable_checkpointing=True)
    for (images, labels), rows in watch.of_task(1):
        assert rows.sum() == 16
        assert ((images[:, None] == IMAGES[None]).all(2) & (labels[:, None] == LABELS)).any(1).all()


# ------------------------------------------------------------------ files


def test_each_task_is_one_file_of_what_was_kept_of_it(tmp_path):
    run_copied(tmp_path, Replay(20, storage="copy"))
    files = sorted((tmp_path / "exemplars").iterdir())
    assert [file.name[:7] for file in files] == ["task_0-", "task_1-", "task_2-"]
    counts = [len(torch.load(file, weights_only=True)["indices"]) for file in files]
    assert counts == [20, 10, 6]  # as many as the task had when it was over


def test_files_are_not_written_for_a_memory_by_reference(tmp_path):
    run_copied(tmp_path, Replay(20), Numbered())
    assert not (tmp_path / "exemplars").exists()


def test_a_refused_task_leaves_no_file(tmp_path):
    run_copied(tmp_path, Replay(20, storage="copy"), others=[Judge(1)])
    names = sorted(path.name[:6] for path in (tmp_path / "exemplars").iterdir())
    assert names == ["task_0", "task_2"]


def test_a_repeated_task_has_the_file_of_one_trained_once(tmp_path):
    for name, attempts in (("once", []), ("twice", [1, 0])):
        run_copied(tmp_path / name, Replay(20, storage="copy"), others=[Judge(1, attempts)])
    assert files_in(tmp_path / "once" / "exemplars") == files_in(tmp_path / "twice" / "exemplars")


def test_a_quick_trial_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_stream([Replay(20, storage="copy")], fast_dev_run=2, default_root_dir=tmp_path)
    assert files_in(tmp_path) == {}


def test_without_a_checkpoint_callback_files_lie_in_the_log_directory(tmp_path):
    fit_stream([Replay(20, storage="copy")], default_root_dir=tmp_path)
    assert len(list((tmp_path / "checkpoints" / "exemplars").iterdir())) == 3


def test_a_second_fit_into_the_same_folder(tmp_path):
    dataset = Numbered()
    first = run_copied(tmp_path, Replay(20, storage="copy"), dataset)
    files = files_in(tmp_path / "exemplars")
    assert same(run_copied(tmp_path, Replay(20, storage="copy"), dataset), first)
    assert files_in(tmp_path / "exemplars") == files
