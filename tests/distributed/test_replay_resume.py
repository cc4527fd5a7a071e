"""A stream with replay that is killed and resumed ends as if nothing had happened, memory and all."""

from typing import Any

import pytest

from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted
from tests.distributed.replay_runs import Replaying, dark_replay, replay

ENDS: dict[Setting, dict[str, Any]] = {}


REPLAYING = {
    "class_balanced": replay(size=100),
    "reservoir, copy": replay(size=100, selection="reservoir", storage="copy"),
    "random, joint": replay(size=100, selection="random", mix="joint"),
    "herding, copy, joint": replay(size=100, selection="herding", storage="copy", mix="joint"),
    "class_balanced, online, copy": replay(size=100, start="online", storage="copy"),
    "reservoir, online": replay(size=100, selection="reservoir", start="online"),
    "der": dark_replay(size=100, beta=0.0),
    "der++, online": dark_replay(size=100, start="online"),
}

# Of one epoch each, the five tasks have 22 steps (the last one 21; 30 and more where the memory is joined from the
# second task on); checkpoints every 7 steps and at each epoch's end.
IN_AN_EPOCH = (Kill(52), "step-step=49.ckpt")
AT_A_TASKS_END = (Kill(23), "epoch-epoch=0.ckpt")
LATE = (Kill(103), "step-step=98.ckpt")


def _setting(replaying: Replaying, ranks: int = 1, workers: int = 0, epochs: int = 1) -> Setting:
    return Setting("onecycle", workers, ranks, epochs=epochs, callbacks=replaying, seeded_once=True)


def _end(setting: Setting) -> dict[str, Any]:
    if setting not in ENDS:
        ENDS[setting] = _without_folder(uninterrupted(setting))
    return ENDS[setting]


def _resumed(setting: Setting, kill: Kill, expected_checkpoint: str) -> dict[str, Any]:
    end, checkpoint = kill_and_resume(setting, kill)
    assert checkpoint == expected_checkpoint
    return _without_folder(end)


def _without_folder(end: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the copies lie: every run has a temporary folder of its own."""
    for state in end["callbacks"]:
        del state["store"]["folder"]
    return end


def _differences(setting: Setting, kill: Kill, expected_checkpoint: str) -> list[str]:
    end = _resumed(setting, kill, expected_checkpoint)
    [state] = end["callbacks"]
    assert len(state["memory"]["tasks"]) == state["memory"]["size"]
    assert sorted(state["memory"]["tasks"].unique().tolist()) == [0, 1, 2, 3, 4]
    return differences(_end(setting), end)


def _tasks_of_slots(end: dict[str, Any]) -> list[int]:
    tasks: list[int] = end["callbacks"][0]["memory"]["tasks"].bincount().tolist()
    return tasks


@pytest.mark.parametrize("replaying", REPLAYING.values(), ids=REPLAYING)
def test_resume_in_an_epoch_gives_the_same_end_and_memory(replaying: Replaying) -> None:
    assert _differences(_setting(replaying), *IN_AN_EPOCH) == []


@pytest.mark.parametrize("name", ["herding, copy, joint", "der++, online"])
def test_resume_at_a_tasks_end_gives_the_same_end_and_memory(name: str) -> None:
    assert _differences(_setting(REPLAYING[name]), *AT_A_TASKS_END) == []


def test_resume_at_an_epochs_end_inside_a_task_gives_the_same_end_and_memory() -> None:
    setting = _setting(REPLAYING["class_balanced, online, copy"], epochs=2)
    assert _differences(setting, Kill(67), "epoch-epoch=2.ckpt") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["herding, copy, joint", "der++, online"])
def test_resume_gives_the_same_end_and_memory_on_two_processes(name: str) -> None:
    assert _differences(_setting(REPLAYING[name], ranks=2), *IN_AN_EPOCH) == []


@pytest.mark.parametrize("name", ["reservoir, online", "der++, online"])
def test_the_memory_keeps_its_share_of_old_tasks_after_a_resume_in_the_last_one(name: str) -> None:
    # In Mammoth, whose reservoir forgets how many samples it has seen, 5.5 % of the slots held old tasks after a
    # resume, where 67.6 % belong.
    setting = _setting(REPLAYING[name])
    slots = _tasks_of_slots(_resumed(setting, *LATE))
    assert slots == _tasks_of_slots(_end(setting))
    assert sum(slots[:-1]) / sum(slots) > 0.6


def test_a_checkpoint_of_a_tasks_last_batch_resumes_with_the_tasks_end_and_its_memory() -> None:
    # with so many slots the second task has 27 steps, of which the last is step 49
    setting = _setting(replay(size=60, selection="herding", mix="joint"))
    assert _differences(setting, Kill(49, "on_validation_start"), "step-step=49.ckpt") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class_balanced", "reservoir, online", "der++, online"])
def test_a_checkpoint_of_an_epochs_last_batch_resumes_with_the_epochs_end(name: str) -> None:
    setting = _setting(REPLAYING[name], epochs=2)
    assert _differences(setting, Kill(154, "on_validation_start"), "step-step=154.ckpt") == []


@pytest.mark.slow
def test_resume_in_a_later_epoch_gives_the_same_end_and_a_memory_that_grows_with_the_classes() -> None:
    setting = _setting(replay(per_class=8, selection="herding", mix="joint"), epochs=2)
    end = _resumed(setting, Kill(80), "step-step=77.ckpt")
    assert _tasks_of_slots(end) == [16] * 5
    assert differences(_end(setting), end) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["class_balanced", "reservoir, copy", "random, joint", "class_balanced, online, copy", "reservoir, online", "der"],
)
def test_every_policy_resumes_exactly_on_two_processes(name: str) -> None:
    assert _differences(_setting(REPLAYING[name], ranks=2), *IN_AN_EPOCH) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random, joint", "class_balanced, online, copy", "der++, online"])
def test_resume_with_loader_workers_gives_the_end_and_memory_of_a_run_without(name: str) -> None:
    end = _resumed(_setting(REPLAYING[name], workers=2), *IN_AN_EPOCH)
    assert differences(_end(_setting(REPLAYING[name])), end) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["herding, copy, joint", "der++, online"])
def test_resume_with_loader_workers_on_two_processes_gives_the_end_and_memory_of_a_run_without(name: str) -> None:
    end = _resumed(_setting(REPLAYING[name], ranks=2, workers=2), *IN_AN_EPOCH)
    assert differences(_end(_setting(REPLAYING[name], ranks=2)), end) == []
