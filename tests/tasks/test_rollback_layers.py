"""Undone is also what a task puts into the module and its optimizers: layers, parameters, groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from typing_extensions import override

from lightning_cl.tasks import ContinualCallback, Task
from lightning_cl.tasks.rollback import Layers
from tests.tasks.undone_tasks import Judge, Net, fit, same

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
    _, net = fit(judge, reset_optimizer=reset_optimizer, module=module)
    assert same(judge.at_start["module"].keys() - judge.after_undo["module"].keys(), set())
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
    fit(Judge(task=1), trained, reset_optimizer=reset_optimizer, module=GrowsOnce)
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
    fit(judge, module=OtherGroups)
    assert same(judge.at_start["module"], judge.after_undo["module"])


def test_a_task_with_an_optimizer_of_its_own_can_be_repeated() -> None:
    _, plain = fit(Judge(task=1, repeats=[]), module=OtherGroups)
    _, repeated = fit(Judge(task=1, repeats=[1, 0]), module=OtherGroups)
    assert same(plain.state_dict(), repeated.state_dict())


def test_a_task_with_an_optimizer_of_its_own_can_be_undone_after_a_resume(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    _, through = fit(Judge(task=1), checkpoint, directory=tmp_path, module=OtherGroups)
    _, resumed = fit(Judge(task=1), ckpt_path=str(tmp_path / "epoch=2.ckpt"), module=OtherGroups)
    assert same(through.state_dict(), resumed.state_dict())


class MoreGroups(Net):
    """Trains one more layer from task 1 on, in a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Linear(2, 2)

    def on_task_start(self, task: Task) -> None:
        if task.index == 1:
            self.trainer.optimizers[0].add_param_group({"params": list(self.added.parameters())})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.05, momentum=0.9)
        if self.trainer.datamodule.current_task.index > 0:  # type: ignore[attr-defined]
            optimizer.add_param_group({"params": list(self.added.parameters())})
        return optimizer


def test_momentum_that_cannot_be_undone_after_a_resume_is_warned_of(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(Judge(task=1), checkpoint, directory=tmp_path, module=MoreGroups, reset_optimizer=False)
    path = str(tmp_path / "epoch=2.ckpt")
    with pytest.warns(UserWarning, match=r"undone after a resume, but not .* momentum\).*`reset_optimizer=True`"):
        fit(Judge(task=1), ckpt_path=path, module=MoreGroups, reset_optimizer=False)


class Scripted(Net):
    """Has layers that TorchScript runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer[1] = torch.jit.script(self.layer[1])


def test_a_task_of_a_module_with_scripted_layers_can_be_undone() -> None:
    judge = Judge(task=1)
    fit(judge, module=Scripted)
    assert same(judge.at_start["module"], judge.after_undo["module"])


def test_averaged_weights_are_undone_too() -> None:
    judge = Judge(task=1)
    averaging = EMAWeightAveraging(decay=0.5)
    fit(judge, averaging)
    assert same(judge.at_start["module"], judge.after_undo["module"])
