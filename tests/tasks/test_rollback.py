"""A task is a transaction: kept whole, or undone whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, Digits
from lightning_cl.tasks import ContinualCallback, Task, TaskClock
from lightning_cl.tasks.random_state import collect_random_state
from lightning_cl.tasks.rollback import Layers


class Net(BoringModel):
    """A net with everything that a task leaves traces in: dropout, batch norm, momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(  # type: ignore[assignment]
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Judge(ContinualCallback):
    """Refuse attempts of a task; keeps a memory of its own, as behaviours do."""

    def __init__(self, task: int, repeats: list[int] | None = None) -> None:
        self.task = task
        self.repeats = repeats
        self.memory = torch.zeros(3)
        self.heard: list[tuple[str, int, int]] = []
        self.at_start: dict[str, Any] = {}
        self.after_undo: dict[str, Any] = {}

    @property
    @override
    def wants_rollback(self) -> bool:
        return True

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._note(trainer, "start", task)
        if task.index == self.task and not self.at_start:
            self.at_start = _traces(trainer, pl_module, self)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.memory += 1

    @override
    def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
        if task.index != self.task:
            return True
        if self.repeats is None:
            return False
        if not self.repeats:
            return True
        clock = TaskClock.of(trainer)
        assert clock is not None
        clock.repeat_task(self.repeats.pop(0))
        return False

    @override
    def on_task_rejected(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._note(trainer, "rejected", task)
        self.after_undo = _traces(trainer, pl_module, self)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._note(trainer, "end", task)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.clone()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.memory = state_dict["memory"].clone()

    def _note(self, trainer: Trainer, hook: str, task: Task) -> None:
        clock = TaskClock.of(trainer)
        assert clock is not None
        self.heard.append((hook, task.index, clock.progress.attempt))


def _traces(trainer: Trainer, pl_module: LightningModule, judge: Judge) -> dict[str, Any]:
    return {
        "module": {name: value.clone() for name, value in pl_module.state_dict().items()},
        "memory": judge.memory.clone(),
        "random": collect_random_state(),
    }


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def _fit(
    *callbacks: Any,
    reset_optimizer: bool = True,
    directory: Path | None = None,
    module: type[Net] = Net,
    **fit: Any,
) -> tuple[Trainer, Net]:
    seed_everything(5, verbose=False)
    net = module()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=directory is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=list(callbacks),
    )
    data = ClassIncremental(Digits(batch_size=64), classes_per_task=[4, 3, 3], reset_optimizer=reset_optimizer)
    trainer.fit(net, datamodule=data, **fit)
    return trainer, net


@pytest.mark.parametrize("reset_optimizer", [True, False])
def test_a_refused_task_leaves_no_trace(reset_optimizer: bool) -> None:
    judge = Judge(task=1)
    _fit(judge, reset_optimizer=reset_optimizer)
    assert _same(judge.at_start, judge.after_undo)


def test_a_refused_task_is_skipped_and_the_stream_goes_on() -> None:
    judge = Judge(task=1)
    trainer, _ = _fit(judge)
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
    _, plain = _fit(Judge(task=1, repeats=[]))
    judge = Judge(task=1, repeats=[1, 2, 0])
    _, repeated = _fit(judge)
    assert [attempt for hook, task, attempt in judge.heard if hook == "start" and task == 1] == [0, 1, 2, 0]
    assert _same(plain.state_dict(), repeated.state_dict())


def test_attempts_of_a_task_train_in_different_orders() -> None:
    first = Judge(task=1, repeats=[0])
    _fit(first)
    other = Judge(task=1, repeats=[7])
    _, net = _fit(other)
    _, same = _fit(Judge(task=1, repeats=[0]))
    assert not _same(net.state_dict(), same.state_dict())


def test_a_skipped_task_is_measured_with_the_model_of_before() -> None:
    metrics = ContinualMetrics(print_table=False)
    _fit(Judge(task=1), metrics)
    assert metrics.matrix[1, 0] == metrics.matrix[0, 0]
    assert metrics.matrix[1, 1] < 0.5 < metrics.matrix[2, 2]


def test_a_veto_without_a_copy_to_go_back_to_is_an_error() -> None:
    class Veto(ContinualCallback):
        @override
        def accept_task(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> bool:
            return False

    with pytest.raises(MisconfigurationException, match=r"`wants_rollback`"):
        _fit(Veto())


def test_the_module_may_refuse_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "accept_task", lambda self, task: task.index != 2, raising=False)
    judge = Judge(task=99)
    _fit(judge)
    assert ("rejected", 2, 0) in judge.heard


def test_files_of_checkpoint_callbacks_are_not_undone(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    _fit(Judge(task=1), checkpoint, directory=tmp_path)
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
    _, through = _fit(Judge(task=1, repeats=[1, 0]), checkpoint, directory=tmp_path)
    _, resumed = _fit(Judge(task=1, repeats=repeats_left), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
    assert _same(through.state_dict(), resumed.state_dict())


def test_state_of_a_run_that_can_be_undone_loads_as_plain_data(tmp_path: Path) -> None:
    _fit(Judge(task=1), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), directory=tmp_path)
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
    trainer, _ = _fit(remember, judge)
    assert 0 < max(remember.seen) < trainer.global_step
    assert remember.nested["steps"][1] == remember.seen | {1}


# ------------------------------------------------------------------ what a module puts into itself while it learns


def _replace(net: nn.Sequential) -> None:
    net[0] = nn.Linear(2, 9)


def _add(net: nn.Sequential) -> None:
    net.append(nn.Linear(3, 3))


def _remove(net: nn.Sequential) -> None:
    del net[1]


def _new_parameter(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.zeros(9, 2))


def _resize(net: nn.Sequential) -> None:
    net[0].weight.data = torch.zeros(9, 2)


def _buffer(net: nn.Sequential) -> None:
    net[1].running_mean = None
    net[0].register_buffer("seen", torch.zeros(4))


@pytest.mark.parametrize("change", [_replace, _add, _remove, _new_parameter, _resize, _buffer])
def test_a_module_consists_of_the_same_layers_again(change: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    parameters = list(net.parameters())
    layers = Layers(net)
    change(net)
    layers.put_back()
    net.load_state_dict(state)
    assert all(own is old for own, old in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(state)


class Growing(Net):
    """Gets a wider head at each task's start, and an optimizer that moves it."""

    def on_task_start(self, task: Task) -> None:
        old = self.layer[5]
        self.layer[5] = nn.Linear(32, 10 + task.index)
        with torch.no_grad():
            self.layer[5].weight[: old.out_features] = old.weight
        self.trainer.strategy.setup_optimizers(self.trainer)


class InPlace(Net):
    """Grows the head's own parameters, and adds a layer to the optimizer that there is."""

    def on_task_start(self, task: Task) -> None:
        if task.index == 0:
            return
        head = self.layer[5]
        head.weight.data = torch.cat([head.weight.data, torch.zeros(1, 32)])
        head.bias.data = torch.cat([head.bias.data, torch.zeros(1)])
        added = nn.Linear(2, 2)
        self.add_module(f"added_{task.index}", added)
        self.trainer.optimizers[0].add_param_group({"params": list(added.parameters())})
        for group in self.trainer.optimizers[0].param_groups:  # whose buffers have the old shape
            for parameter in group["params"]:
                self.trainer.optimizers[0].state.pop(parameter, None)


@pytest.mark.parametrize("reset_optimizer", [True, False])
@pytest.mark.parametrize("module", [Growing, InPlace])
def test_a_refused_task_leaves_no_trace_of_layers_that_grew(module: type[Net], reset_optimizer: bool) -> None:
    judge = Judge(task=1)
    _, net = _fit(judge, reset_optimizer=reset_optimizer, module=module)
    assert _same(judge.at_start["module"].keys() - judge.after_undo["module"].keys(), set())
    assert judge.after_undo["module"]["layer.5.weight"].shape[0] == 10
    assert net.layer[5].weight.shape[0] == (12 if module is Growing else 11)


class Trained(ContinualCallback):
    """Notes whether the last task's optimizer moves what the module consists of."""

    moves: list[bool]

    def __init__(self) -> None:
        self.moves = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        moved = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.moves.append(moved >= {id(parameter) for parameter in pl_module.parameters()})


@pytest.mark.parametrize("reset_optimizer", [True, False])
def test_after_a_refused_task_the_optimizer_moves_the_layers_that_there_are(reset_optimizer: bool) -> None:
    class GrowsOnce(Growing):
        def on_task_start(self, task: Task) -> None:
            if task.index == 1:
                super().on_task_start(task)

    trained = Trained()
    _fit(Judge(task=1), trained, reset_optimizer=reset_optimizer, module=GrowsOnce)
    assert all(trained.moves)


class OtherGroups(Net):
    """Has another optimizer for each task, with other groups of parameters."""

    def configure_optimizers(self) -> Any:
        if self.trainer.datamodule.current_task.index == 0:  # type: ignore[attr-defined]
            return super().configure_optimizers()
        slow, fast = self.layer[1].parameters(), self.layer[5].parameters()
        return torch.optim.Adam([{"params": slow, "lr": 1e-4}, {"params": fast, "lr": 1e-3}])


def test_a_task_with_an_optimizer_of_its_own_can_be_undone() -> None:
    judge = Judge(task=1)
    _fit(judge, module=OtherGroups)
    assert _same(judge.at_start["module"], judge.after_undo["module"])


def test_a_task_with_an_optimizer_of_its_own_can_be_repeated() -> None:
    _, plain = _fit(Judge(task=1, repeats=[]), module=OtherGroups)
    _, repeated = _fit(Judge(task=1, repeats=[1, 0]), module=OtherGroups)
    assert _same(plain.state_dict(), repeated.state_dict())
