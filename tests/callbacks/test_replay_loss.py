"""The share of past samples in the loss."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from numbered_streams import (
    AnyBatch,
    DataOf,
    PerSample,
    Watch,
    fit_stream,
    same_weights,
)

from lightning_cl.callbacks import Replay
from lightning_cl.tasks import ContinualCallback
from tests.modules import (
    DigitsData,
    Manual,
)


def _train_by_hand(module, watch, loss_of):
    """Plain PyTorch on the batches that were noted; an optimizer for each task, as the stream has it."""
    task = None
    for now, batch, rows in watch.steps:
        if now != task:
            task, optimizer = now, module.configure_optimizers()
        loss = loss_of(module.losses(batch, "none"), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def _weighted(weight):
    def loss_of(losses, rows):
        if not rows.any():
            return losses.mean()
        return (1 - weight) * losses[~rows].mean() + weight * losses[rows].mean()

    return loss_of


class PerSampleInDict(PerSample):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": 3}


@pytest.mark.parametrize("module", [PerSample, PerSampleInDict])
@pytest.mark.parametrize(
    ("weight", "loss_of"),
    [(0.25, _weighted(0.25)), (1.0, _weighted(1.0)), (0.0, _weighted(0.0)), (None, lambda losses, _: losses.mean())],
)
def test_weight_is_the_share_of_past_samples_in_the_loss(module, weight, loss_of):
    seed_everything(1, verbose=False)
    by_hand, watch = module(), Watch()
    _, trained = fit_stream([watch, Replay(40, batch_size=6, weight=weight)], copy.deepcopy(by_hand))
    _train_by_hand(by_hand, watch, loss_of)
    for expected, got in zip(by_hand.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_weight_zero_is_training_without_past_samples():
    _, weightless = fit_stream([Replay(20, weight=0.0)], PerSample)
    _, without = fit_stream([])
    for expected, got in zip(without.parameters(), weightless.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_joint_batches_without_old_or_new_samples_are_plain_means():
    seed_everything(1, verbose=False)
    by_hand, watch = PerSample(lr=0.01), Watch()
    replay = Replay(40, mix="joint", weight=0.5)
    _, trained = fit_stream([watch, replay], copy.deepcopy(by_hand), DataOf(batch_size=2))
    _train_by_hand(by_hand, watch, lambda losses, rows: losses.mean() if rows.all() else _weighted(0.5)(losses, rows))
    for expected, got in zip(by_hand.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_other_entries_of_what_training_step_returns_are_kept():
    class Hears(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            heard.append(outputs["extra"])

    heard = []
    fit_stream([Replay(20, weight=0.5), Hears()], PerSampleInDict)
    assert heard == [3] * 9


def _replay_warnings(module, data=None, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trained = fit_stream([Replay(20, **arguments)], module, data)
    return [str(warning.message) for warning in caught if "`weight=" in str(warning.message)], trained


def test_weight_without_a_loss_per_sample_is_said_once_and_the_mean_is_kept():
    said, trained = _replay_warnings(AnyBatch, weight=0.3)
    assert len(said) == 1
    assert "reduction='none'" in said[0]
    assert same_weights(trained, _replay_warnings(AnyBatch)[1])


def test_without_weight_nothing_is_said():
    assert _replay_warnings(AnyBatch)[0] == []
    assert _replay_warnings(PerSample, weight=0.5)[0] == []


def test_weight_is_said_to_be_without_effect_in_manual_optimisation():
    said, _ = _replay_warnings(Manual, data=DigitsData(), weight=0.3)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("shape", "shown"), [(lambda losses: losses[:-1], "15"), (lambda losses: losses[:, None], "16, 1")]
)
def test_losses_that_do_not_fit_the_rows_are_an_error_that_shows_their_shape(shape, shown):
    class Shaped(PerSample):
        def training_step(self, batch, batch_idx):
            return shape(super().training_step(batch, batch_idx))

    with pytest.raises(ValueError, match=rf"shape \({shown},?\) for a batch of 16 rows.*one loss per row"):
        fit_stream([Replay(20)], Shaped)


def test_a_loss_with_one_entry_is_one_number_as_it_is_without_replay():
    class OneEntry(AnyBatch):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).view(1)

    _, trained = fit_stream([Replay(20)], OneEntry)
    assert same_weights(trained, fit_stream([Replay(20)], AnyBatch)[1])


def test_a_step_that_returns_nothing_is_left_out_as_it_is_without_replay():
    class Skips(AnyBatch):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    trainer, _ = fit_stream([Replay(20, weight=0.5)], Skips)
    assert trainer.global_step == 9  # as Lightning counts them


class _Decay(ContinualCallback):
    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        return 0.01 * sum(weight.square().sum() for weight in pl_module.parameters())


def test_other_losses_are_added_to_the_mean_over_all_rows():
    seed_everything(1, verbose=False)
    by_hand, watch = PerSample(), Watch()
    _, trained = fit_stream([_Decay(), watch, Replay(20, weight=0.5)], copy.deepcopy(by_hand))
    _train_by_hand(
        by_hand,
        watch,
        lambda losses, rows: _weighted(0.5)(losses, rows) + 0.01 * sum(w.square().sum() for w in by_hand.parameters()),
    )
    for expected, got in zip(by_hand.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
