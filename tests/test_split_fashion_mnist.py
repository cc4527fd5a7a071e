"""Real images show what the field knows of training task by task."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, Joint, TorchvisionData
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.models import ImageClassifier

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "FashionMNIST").is_dir(), reason="no FashionMNIST in ../shared/data"),
]


def _matrix(data: TaskSequence) -> Tensor:
    seed_everything(0, verbose=False)
    metrics = ContinualMetrics(split="test", print_table=False)
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[metrics],
    )
    trainer.fit(ImageClassifier("mlp", num_classes=10, input_shape=(1, 28, 28)), datamodule=data)
    return metrics.matrix


def test_naive_training_forgets_all_but_the_last_task() -> None:
    matrix = _matrix(ClassIncremental(TorchvisionData("FashionMNIST", root=str(DATA)), num_tasks=5))
    assert torch.all(matrix.diagonal() > 0.85)
    assert matrix[4, 0] < 0.1
    assert 0.15 <= matrix[4].mean() <= 0.35


def test_joint_training_learns_all_classes() -> None:
    matrix = _matrix(Joint(TorchvisionData("FashionMNIST", root=str(DATA))))
    assert matrix.item() > 0.84
