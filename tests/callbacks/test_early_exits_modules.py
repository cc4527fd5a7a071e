"""Exits in modules of all kinds: what their training steps do, and what is left of exits without a Trainer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exit_streams import LAYERS, Deep, Weights
from exit_streams import fit_exits as _fit
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nearest_means import TEST_IMAGES, predictions
from numbered_streams import same, same_weights
from torch import nn

import lightning_cl
from lightning_cl.callbacks import EarlyExits, Replay
from tests.modules import Plain

# ------------------------------------------------------------------ what training steps do


class Measures(Deep):
    """Logs its accuracy from a second call."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.log("accuracy", (self.net.eval()(batch[0]).argmax(1) == batch[1]).float().mean())
        self.net.train()
        return loss


@pytest.mark.parametrize("regime", ["joint", "mixed"])
def test_a_call_without_gradients_does_not_take_the_place_of_the_one_that_is_trained_on(regime):
    exits, _, module = _fit(regime, Measures)
    plain, _, expected = _fit(regime)
    assert same_weights(module, expected)
    assert same(exits.state_dict(), plain.state_dict())


@pytest.mark.parametrize("calls", [0, 2])
def test_a_step_that_does_not_call_the_network_once_is_an_error(calls):
    class Odd(Deep):
        def training_step(self, batch, batch_idx):
            logits = [self(batch[0]) for _ in range(calls)] or [
                self.net[6].weight.sum() + torch.zeros(len(batch[0]), 6)
            ]
            return sum(F.cross_entropy(rows, batch[1]) for rows in logits)

    with pytest.raises(ValueError, match=f"rows in {calls} calls .*must call the network once with gradients"):
        _fit("joint", Odd)


def test_a_step_may_be_skipped():
    class Skips(Deep):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)

    exits, _, _ = _fit("joint", Skips)
    assert exits.figures


def test_the_network_stands_still_although_the_module_sets_itself_to_train():
    class Trains(Deep):
        def on_train_epoch_start(self):
            self.train()

    weights = Weights()
    _fit("disjoint", Trains, others=[weights])
    assert same(weights.network[0], weights.network[1])


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_exits_go_on_no_module_that_they_were_not_found_in(call):
    _, trainer, _ = _fit()
    other = Plain()
    with pytest.raises(MisconfigurationException, match="EarlyExits: The exits are of another module: Plain has no"):
        getattr(trainer, call)(other, datamodule=trainer.datamodule)
    assert not hasattr(other, "early_exits")


def test_the_module_can_be_copied_between_two_steps():
    copies = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copies.append(copy.deepcopy(pl_module))

    _fit(others=[Copies()], exits=EarlyExits(LAYERS, "joint", threshold=0.0, ensemble="cascade"))
    assert not same_weights(copies[0].net, copies[-1].net)
    assert torch.equal(copies[-1].eval()(TEST_IMAGES), copies[-1].net(TEST_IMAGES))
    heard = copies[-1].early_exits.hooks.logits
    copies[-1].train()(TEST_IMAGES)
    assert copies[-1].early_exits.hooks.logits is heard


class NamesItsInput(Deep):
    """Calls its classification layer by keyword."""

    def forward(self, images):
        return self.net[6](input=self.net[:6](images))


@pytest.mark.parametrize("options", [{"threshold": 0.3}, {"exit_classifier": "nearest_mean"}], ids=str)
def test_a_classification_layer_may_be_called_by_keyword(options):
    _, trainer, module = _fit(exits=EarlyExits(LAYERS, "joint", **options), module=NamesItsInput)
    _, other, expected = _fit(exits=EarlyExits(LAYERS, "joint", **options))
    torch.testing.assert_close(predictions(trainer, module), predictions(other, expected))


def test_a_loaded_module_is_not_fitted_again(tmp_path):
    _, trainer, _ = _fit()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"This Deep has exits already, from `lightning_cl.load`"):
        _fit(module=lightning_cl.load(tmp_path / "last.ckpt", Deep))


# ------------------------------------------------------------------ without a Trainer


@pytest.mark.parametrize("when", ["in the fit", "after it"])
def test_a_loaded_module_answers_as_its_run_did_and_lets_samples_leave(when, tmp_path):
    keeper = ModelCheckpoint(tmp_path, "in the fit", every_n_epochs=6)
    exits = EarlyExits(LAYERS, "joint", threshold=0.25)
    _, trainer, module = _fit(exits=exits, others=[Replay(30), keeper], enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after it.ckpt")
    expected = predictions(trainer, module)
    loaded = lightning_cl.load(tmp_path / f"{when}.ckpt", Deep)
    rows = []
    handle = loaded.net[6].register_forward_pre_hook(lambda layer, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        torch.testing.assert_close(loaded(TEST_IMAGES), expected)
    handle.remove()
    assert 0 < rows[0] < len(TEST_IMAGES)
    assert len(loaded.early_exits.heads) == 2


def test_a_module_that_was_made_double_is_loaded_as_its_class_makes_it(tmp_path):
    _, trainer, module = _fit(exits=EarlyExits(LAYERS, "joint", threshold=0.25), module=DoubleDeep)
    expected = predictions(trainer, module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with torch.no_grad():
        answers = lightning_cl.load(tmp_path / "last.ckpt", Deep)(TEST_IMAGES)
    torch.testing.assert_close(answers.double(), expected, atol=1e-4, rtol=1e-4)


class DoubleDeep(Deep):
    def __init__(self):
        super().__init__()
        self.double()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].double(), *batch[1:]


def test_heads_of_ones_own_cannot_be_loaded_without_their_class(tmp_path):
    exits = EarlyExits(LAYERS, "joint", head=nn.LazyLinear(6))
    _, trainer, _ = _fit(exits=exits)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="exit heads of the user's own class"):
        lightning_cl.load(tmp_path / "own.ckpt", Deep)
