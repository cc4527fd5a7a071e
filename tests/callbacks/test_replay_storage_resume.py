"""Copied exemplars are found again by a resumed run, and a damaged copy is never trained on."""

import os
import shutil

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import Numbered, same
from vanishing_data import (
    REPLAYS,
    Steps,
    Vanishing,
    VanishingArrays,
    files_in,
    run_copied,
)

from lightning_cl.callbacks import Replay
from lightning_cl.datamodules.array_dataset import collate


@pytest.mark.parametrize("replay", REPLAYS.values(), ids=REPLAYS)
@pytest.mark.parametrize(("step", "every"), [(3, None), (5, 1)], ids=["at a task's end", "inside a task"])
def test_a_run_without_past_data_is_resumed_from_elsewhere_into_elsewhere(replay, step, every, tmp_path, monkeypatch):
    expected = run_copied(tmp_path / "through", replay("copy"), every=every)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    gone = Vanishing()
    gone.first = 1
    resume = os.path.relpath(tmp_path / "through" / f"step={step}.ckpt")
    assert same(run_copied(tmp_path / "resumed", replay("copy"), gone, resume=resume), expected)


@pytest.mark.parametrize("dataset", [Vanishing, VanishingArrays])
def test_the_new_runs_folder_is_complete_by_itself(dataset, tmp_path):
    settings = {"dataloader": {"collate_fn": collate}} if dataset is VanishingArrays else {}
    expected = run_copied(tmp_path / "first", Replay(20, storage="copy"), dataset(), **settings)
    second = tmp_path / "second"
    run_copied(second, Replay(20, storage="copy"), dataset(), resume=tmp_path / "first" / "step=3.ckpt", **settings)
    assert files_in(second / "exemplars") == files_in(tmp_path / "first" / "exemplars")
    shutil.rmtree(tmp_path / "first")
    gone = dataset()
    gone.first = 2
    again = run_copied(tmp_path / "third", Replay(20, storage="copy"), gone, resume=second / "step=9.ckpt", **settings)
    assert same(again, expected)


def test_an_adopted_file_takes_no_second_place_on_the_disk(tmp_path):
    run_copied(tmp_path / "first", Replay(20, storage="copy"))
    run_copied(tmp_path / "second", Replay(20, storage="copy"), Numbered(), resume=tmp_path / "first" / "step=6.ckpt")
    for name in ("task_0", "task_1"):
        (old,) = (tmp_path / "first" / "exemplars").glob(f"{name}-*")
        assert (tmp_path / "second" / "exemplars" / old.name).samefile(old)


def test_where_links_are_impossible_the_file_is_copied(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no links here")

    run_copied(tmp_path / "first", Replay(20, storage="copy"))
    monkeypatch.setattr(os, "link", refuse)
    run_copied(tmp_path / "second", Replay(20, storage="copy"), Numbered(), resume=tmp_path / "first" / "step=6.ckpt")
    assert files_in(tmp_path / "second" / "exemplars") == files_in(tmp_path / "first" / "exemplars")


def test_the_folder_may_move_together_with_its_checkpoint(tmp_path):
    expected = run_copied(tmp_path / "first", Replay(20, storage="copy"))
    shutil.move(tmp_path / "first", tmp_path / "moved")
    gone = Vanishing()
    gone.first = 1
    resumed = run_copied(tmp_path / "new", Replay(20, storage="copy"), gone, resume=tmp_path / "moved" / "step=3.ckpt")
    assert same(resumed, expected)


def test_a_checkpoint_may_be_taken_elsewhere_while_the_folder_stays(tmp_path):
    expected = run_copied(tmp_path / "first", Replay(20, storage="copy"))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "first" / "step=6.ckpt", tmp_path / "elsewhere" / "mine.ckpt")
    gone = Vanishing()
    gone.first = 2
    resumed = run_copied(
        tmp_path / "new", Replay(20, storage="copy"), gone, resume=tmp_path / "elsewhere" / "mine.ckpt"
    )
    assert same(resumed, expected)


def test_a_run_that_was_resumed_leaves_earlier_checkpoints_valid(tmp_path):
    expected = run_copied(tmp_path, Replay(20, storage="copy"))
    before = files_in(tmp_path)
    again = run_copied(tmp_path, Replay(20, storage="copy"), Numbered(), resume=tmp_path / "step=3.ckpt")
    assert same(again, expected)
    after = files_in(tmp_path)
    assert {name: after[name] for name in before if "exemplars" in name} == {
        name: content for name, content in before.items() if "exemplars" in name
    }


# ------------------------------------------------------------------ damage


def _remove(file):
    file.unlink()


def _alter(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def _empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove, r"copied exemplars '{name}' are missing.*looked for in .*exemplars.*beside the checkpoint"),
        (_alter, r"copied exemplars '.*{name}' are not those.*damaged or was altered"),
        (_truncate, r"copied exemplars '.*{name}' are not those.*damaged or was altered"),
        (_empty, r"copied exemplars '.*{name}' are not those.*damaged or was altered"),
    ],
)
@pytest.mark.parametrize("target", ["same", "new"])
def test_a_damaged_file_is_an_error_before_the_first_step(damage, message, target, tmp_path):
    first = tmp_path / "first"
    run_copied(first, Replay(20, storage="copy"))
    (file,) = (first / "exemplars").glob("task_0-*")
    damage(file)
    before, steps = files_in(first), Steps()
    folder = first if target == "same" else tmp_path / "new"
    with pytest.raises(MisconfigurationException, match=message.format(name=file.name)):
        run_copied(folder, Replay(20, storage="copy"), resume=first / "step=6.ckpt", others=[steps])
    assert steps.count == 0
    assert files_in(first) == before
    assert target == "same" or not folder.exists() or files_in(folder) == {}


def test_a_damaged_file_that_the_memory_no_longer_needs_does_no_harm(tmp_path):
    first = tmp_path / "first"
    replay = Replay(48, "reservoir", storage="copy")
    run_copied(first, replay)
    (file,) = (first / "exemplars").glob("task_2-*")
    _remove(file)
    run_copied(tmp_path / "new", Replay(48, "reservoir", storage="copy"), resume=first / "step=6.ckpt")


@pytest.mark.parametrize("where", ["below a file", "no such device"])
def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(where, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run" if where == "below a file" else "/proc/lightning_cl"
    steps = Steps()
    with pytest.raises(
        MisconfigurationException, match=r"`storage='copy'` cannot write to .*`ModelCheckpoint\(dirpath"
    ):
        run_copied(folder, Replay(20, storage="copy"), others=[steps])
    assert steps.count == 0


def test_a_folder_that_is_not_local_is_an_error_before_training():
    steps = Steps()
    with pytest.raises(MisconfigurationException, match=r"must be a local folder, got 'memory://run'"):
        run_copied("memory://run", Replay(20, storage="copy"), others=[steps])
    assert steps.count == 0
