"""One optimizer for all tasks of a stream, which sees the whole stream's horizon."""

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cl.datamodules import ClassIncremental
from tests.modules import DigitsData, Plain, quiet_trainer


def _fit(callbacks=(), ckpt_path=None):
    seed_everything(1, verbose=False)
    module, sequence = Plain(), ClassIncremental(DigitsData(), num_tasks=3, reset_optimizer=False)
    trainer = quiet_trainer(callbacks=list(callbacks), max_epochs=2, enable_checkpointing=bool(callbacks))
    trainer.fit(module, datamodule=sequence, ckpt_path=ckpt_path)
    return trainer.global_step, module.net[0].weight.detach()


@pytest.mark.parametrize("step", [5, 8, 9, 12])
def test_a_run_is_resumed_to_the_same_end_wherever_it_was_cut_off(step, tmp_path):
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    steps, weights = _fit([saved])
    resumed = _fit(ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed[0] == steps
    assert torch.equal(resumed[1], weights)
