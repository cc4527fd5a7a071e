"""A task is a transaction: kept whole, or undone whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.tasks import ContinualCallback, Task
from tests.tasks.undone_tasks import Judge, Net, fit, same


@pytest.mark.parametrize("reset_optimizer", [True, False])
def test_a_refused_task_leaves_no_trace(reset_optimizer: bool) -> None:
    judge = Judge(task=1)
    fit(judge, reset_optimizer=reset_optimizer)
    assert same(judge.at_start, judge.after_undo)


def test_a_refused_task_is_skipped_and_the_stream_goes_on() -> None:
    judge = Judge(task=1)
    trainer, _ = fit(judge)
    assert judge.heard == [
        ("start", 0, 0),
        ("end", 0, 0),
        ("start", 1, 0),
        ("rejected", 1, 0),
        ("start", 2, 0),
        ("end", 2, 0),
    ]
    assert trainer.current_epoch == 6


def test_a_task_that_is_repeated_and_then_kept_ends_as_if_it_had_been_trained_once() -> None:
    _, plain = fit(Judge(task=1, repeats=[]))
    judge = Judge(task=1, repeats=[1, 2, 0])
    _, repeated = fit(judge)
    assert [attempt for hook, task, attempt in judge.heard if hook == "start" and task == 1] == [0, 1, 2, 0]
    assert same(plain.state_dict(), repeated.state_dict())


def test_attempts_of_a_task_train_in_different_orders() -> None:
    first = Judge(task=1, repeats=[0])
    fit(first)
    other = Judge(task=1, repeats=[7])
    _, net = fit(other)
    _, again = fit(Judge(task=1, repeats=[0]))
    assert not same(net.state_dict(), again.state_dict())


def test_a_skipped_task_is_measured_with_the_model_of_before() -> None:
    metrics = ContinualMetrics(print_table=False)
    fit(Judge(task=1), metrics)
    assert metrics.matrix[1, 0] == metrics.matrix[0, 0]
    assert metrics.matrix[1, 1] < 0.5 < metrics.matrix[2, 2]


def test_a_veto_without_a_copy_to_go_back_to_is_an_error() -> None:
    class Veto(ContinualCallback):
        @override
        def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
            return False

    with pytest.raises(MisconfigurationException, match=r"`wants_rollback`"):
        fit(Veto())


def test_the_module_may_refuse_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "accept_task", lambda self, task: task.index != 2, raising=False)
    judge = Judge(task=99)
    fit(judge)
    assert ("rejected", 2, 0) in judge.heard


def test_files_of_checkpoint_callbacks_are_not_undone(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(Judge(task=1), checkpoint, directory=tmp_path)
    assert Path(checkpoint.best_model_path).exists()
    assert len(list(tmp_path.glob("*.ckpt"))) == 6


@pytest.mark.parametrize(
    ("epoch", "repeats_left"),
    [
        pytest.param(2, [1, 0], id="in the first attempt"),
        pytest.param(3, [0], id="after the first undoing"),
        pytest.param(4, [0], id="in the second attempt"),
        pytest.param(5, [], id="after the second undoing"),
        pytest.param(6, [], id="in the attempt that is kept"),
    ],
)
def test_a_run_resumed_among_repeated_attempts_ends_the_same(
    tmp_path: Path, epoch: int, repeats_left: list[int]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    _, through = fit(Judge(task=1, repeats=[1, 0]), checkpoint, directory=tmp_path)
    _, resumed = fit(Judge(task=1, repeats=repeats_left), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
    assert same(through.state_dict(), resumed.state_dict())


def test_state_of_a_run_that_can_be_undone_loads_as_plain_data(tmp_path: Path) -> None:
    fit(Judge(task=1), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), directory=tmp_path)
    in_task_one = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert in_task_one["lightning_cl"]["copy"] is not None
    assert torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["lightning_cl"]["copy"] is None


def test_state_of_any_plain_kind_is_undone() -> None:
    class Remember(ContinualCallback):
        seen: set[int]

        def __init__(self) -> None:
            self.seen = set()
            self.nested: dict[str, Any] = {"steps": [0, {1}]}

        @override
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.seen.add(trainer.global_step)
            self.nested["steps"][1].add(trainer.global_step)

        @override
        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen, "nested": self.nested}

        @override
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seen, self.nested = state_dict["seen"], state_dict["nested"]

    remember = Remember()
    judge = Judge(task=2)
    trainer, _ = fit(remember, judge)
    assert 0 < max(remember.seen) < trainer.global_step
    assert remember.nested["steps"][1] == remember.seen | {1}
