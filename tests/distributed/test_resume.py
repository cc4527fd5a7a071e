"""A stream that is killed and resumed ends as if nothing had happened, bit for bit."""

import pytest

from benchmarks.resume import Kill, Setting, differences, kill_and_resume, uninterrupted

END = {}


def _differences(setting: Setting, kill: Kill, expected_checkpoint: str) -> list[str]:
    if setting not in END:
        END[setting] = uninterrupted(setting)
    end, checkpoint = kill_and_resume(setting, kill)
    assert checkpoint == expected_checkpoint
    return differences(END[setting], end)


# A task has 3 epochs of 22 steps (the last one of 21), 327 in all; checkpoints every 7 steps and at every epoch's end.
@pytest.mark.parametrize(
    ("kill", "checkpoint"),
    [
        pytest.param(Kill(17), "step-step=14.ckpt", id="in the very first epoch"),
        pytest.param(Kill(23), "epoch-epoch=0.ckpt", id="at an epoch's end"),
        pytest.param(Kill(67), "epoch-epoch=2.ckpt", id="at a task's end"),
        pytest.param(Kill(66, "on_train_epoch_end"), "step-step=63.ckpt", id="just before a task's end"),
        pytest.param(Kill(154, "on_validation_start"), "step-step=154.ckpt", id="after an epoch's last batch"),
        pytest.param(Kill(320), "step-step=315.ckpt", id="in the last task"),
    ],
)
@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_resume_after_kill_gives_the_same_end(schedule: str, kill: Kill, checkpoint: str) -> None:
    assert _differences(Setting(schedule), kill, checkpoint) == []


def test_resume_is_exact_with_gradient_accumulation_and_validation_inside_epochs() -> None:
    setting = Setting("onecycle", accumulate=2, validate_every=0.5)
    # batch 154 of 330 is the fourteenth optimizer step of an epoch, and the last one
    assert _differences(setting, Kill(155), "epoch-epoch=6.ckpt") == []
    assert _differences(setting, Kill(33), "step-step=14.ckpt") == []


@pytest.mark.parametrize("kill", [Kill(17), Kill(154, "on_validation_start")], ids=["first epoch", "last batch"])
def test_resume_is_exact_on_two_processes(kill: Kill) -> None:
    checkpoint = "step-step=14.ckpt" if kill.batches == 17 else "step-step=154.ckpt"
    assert _differences(Setting("onecycle", ranks=2), kill, checkpoint) == []


@pytest.mark.slow
def test_resume_is_exact_with_loader_workers() -> None:
    assert _differences(Setting("onecycle", workers=2), Kill(17), "step-step=14.ckpt") == []


@pytest.mark.slow
def test_resume_is_exact_with_loader_workers_on_two_processes() -> None:
    assert _differences(Setting("cosine", workers=2, ranks=2), Kill(100), "step-step=98.ckpt") == []
