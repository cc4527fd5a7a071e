"""Copies of a module that is in a fit are modules of their own."""

import copy
import io
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback, Task
from tests.modules import DigitsData, Plain, quiet_trainer


class KeepTeacher(ContinualCallback):
    """Copy the module in the middle of a fit, as distillation does."""

    def __init__(self) -> None:
        self.teacher: LightningModule | None = None
        self.file = io.BytesIO()

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if task.index == 0:
            self.teacher = copy.deepcopy(pl_module)
            torch.save(pl_module, self.file)

    def training_loss(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> torch.Tensor:
        return torch.zeros(())


def test_a_copy_made_during_a_stream_can_be_trained_by_itself() -> None:
    keeper = KeepTeacher()
    quiet_trainer(callbacks=[keeper, ContinualMetrics(print_table=False)]).fit(
        Plain(), datamodule=ClassIncremental(DigitsData(), num_tasks=2)
    )
    assert keeper.teacher is not None
    optimizer = keeper.teacher.configure_optimizers()
    own = {id(parameter) for parameter in keeper.teacher.parameters()}
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} <= own
    quiet_trainer().fit(keeper.teacher, datamodule=DigitsData())


def test_a_module_can_be_pickled_during_a_stream() -> None:
    keeper = KeepTeacher()
    module = Plain()
    quiet_trainer(callbacks=[keeper]).fit(module, datamodule=ClassIncremental(DigitsData(), num_tasks=2))
    keeper.file.seek(0)
    loaded = torch.load(keeper.file, weights_only=False)
    assert loaded.state_dict().keys() == module.state_dict().keys()
