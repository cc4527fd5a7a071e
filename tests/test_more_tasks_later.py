"""A finished stream goes on with tasks that it did not know."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, Digits, DomainIncremental, Rotate, TaskList
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.tasks import rollback


class Net(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def _classes(count: int) -> TaskSequence:
    return ClassIncremental(Digits(batch_size=32), classes_per_task=[2] * count)


def _domains(count: int) -> TaskSequence:
    transforms = [None, Rotate(90), Rotate(180), Rotate(270), Rotate(45)]
    return DomainIncremental(Digits(batch_size=128), transforms=transforms[:count])


def _list(count: int) -> TaskSequence:
    return TaskList([Digits(batch_size=128, seed=number) for number in range(count)])


def _fit(
    data: TaskSequence, directory: Path, ckpt_path: str | None = None
) -> tuple[Trainer, dict[str, Tensor], Tensor]:
    seed_everything(2 if ckpt_path is None else 77, verbose=False)
    metrics, net = ContinualMetrics(print_table=False), Net()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[metrics, ModelCheckpoint(directory, save_last=True)],
    )
    trainer.fit(net, datamodule=data, ckpt_path=ckpt_path)
    return trainer, {name: value.clone() for name, value in net.state_dict().items()}, metrics.matrix


@pytest.fixture(autouse=True)
def _no_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")


@pytest.mark.parametrize("sequence", [_classes, _domains, _list], ids=["classes", "domains", "list"])
@pytest.mark.parametrize("saved_by", ["ModelCheckpoint", "save_checkpoint after the fit"])
def test_a_stream_continued_with_two_more_tasks_equals_one_that_knew_all(
    sequence: Any, saved_by: str, tmp_path: Path
) -> None:
    _, weights, matrix = _fit(sequence(5), tmp_path / "all")
    trainer, _, _ = _fit(sequence(3), tmp_path / "first")
    path = tmp_path / "first" / "last.ckpt"
    if saved_by != "ModelCheckpoint":
        path = tmp_path / "saved.ckpt"
        trainer.save_checkpoint(path)
    resumed, continued, continued_matrix = _fit(sequence(5), tmp_path / "rest", str(path))
    assert resumed.current_epoch == 10
    assert torch.equal(continued_matrix.nan_to_num(-1), matrix.nan_to_num(-1))
    for name, value in weights.items():
        assert torch.equal(continued[name], value), name


def test_a_finished_stream_that_is_given_nothing_more_trains_nothing(tmp_path: Path) -> None:
    _, weights, _ = _fit(_classes(2), tmp_path / "first")
    trainer, again, _ = _fit(_classes(2), tmp_path / "again", str(tmp_path / "first" / "last.ckpt"))
    assert trainer.current_epoch == 4
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_ranks_meet_when_a_checkpoint_is_written_and_not_at_the_end_of_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[dict[str, Any]] = []
    monkeypatch.setattr(rollback, "gather_random_states", lambda state: met.append(state) or [state])
    trainer, _, _ = _fit(_classes(2), tmp_path)
    end = trainer.fit_loop.epoch_progress.current.completed
    met_in_fit = len(met)
    torch.rand(3)  # the run goes on from where the fit ended, whatever is drawn until it is saved
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert end == 4
    assert len(met) == met_in_fit + 1
    assert torch.equal(met[-1]["torch"], met[-2]["torch"])
