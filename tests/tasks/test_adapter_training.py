"""The adapter learns how features moved, from the features alone."""

import random

import numpy as np
import pytest
import torch

from lightning_cl.tasks.adapter_training import AdapterTraining
from tests.modules import quiet_trainer

TRAINER = quiet_trainer()
QUICK = AdapterTraining(epochs=4, batch_size=64, expansion=2)


def _drift(rows=512, width=4):
    """Features, and the same rotated and shifted."""
    generator = torch.Generator().manual_seed(5)
    before = torch.randn(rows, width, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return before, before @ rotation + torch.linspace(-2, 2, width)


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("anti_collapse", [0.0, 1.0])
def test_it_learns_a_rotation_and_a_shift(anti_collapse):
    before, after = _drift()
    training = AdapterTraining(epochs=60, batch_size=64, expansion=8, anti_collapse=anti_collapse)
    adapter = training.run(TRAINER, before[:400], after[:400], 0, 1)
    error = (adapter(before[400:]) - after[400:]).square().mean()
    assert error < 0.05 * (before - after).square().mean()


def test_it_draws_no_random_numbers_and_depends_on_none():
    before, after = _drift()
    adapters = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        adapters.append(QUICK.run(TRAINER, before, after, 0, 1))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert _same(*adapters)


@pytest.mark.parametrize("other", [(1, 1), (0, 2)], ids=["seed", "task"])
def test_adapters_of_other_seeds_and_tasks_are_others(other):
    before, after = _drift()
    assert not _same(QUICK.run(TRAINER, before, after, 0, 1), QUICK.run(TRAINER, before, after, *other))


def test_it_learns_inside_no_grad_and_has_no_gradients_itself():
    before, after = _drift()
    with torch.no_grad():
        adapter = QUICK.run(TRAINER, before, after, 0, 1)
    assert _same(adapter, QUICK.run(TRAINER, before, after, 0, 1))
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    assert not adapter.training


@pytest.mark.parametrize("rows", [1, 3, 64, 95, 96, 97])
def test_it_takes_any_number_of_samples(rows):
    before, after = _drift(rows)
    training = AdapterTraining(epochs=2, batch_size=64, expansion=2)
    assert training.run(TRAINER, before, after, 0, 1)(before).isfinite().all()


def test_features_that_stand_still_do_not_break_it():
    before, after = _drift()
    before[:, 0] = after[:, 1] = 0.0
    adapter = AdapterTraining(epochs=5, batch_size=64, expansion=4).run(TRAINER, before, after, 0, 1)
    assert adapter(before).isfinite().all()


@pytest.fixture
def rates(monkeypatch):
    """Return a list that gets the learning rate of each step."""
    rates = []
    usual = torch.optim.SGD.step

    def step(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return usual(optimizer, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    return rates


def test_the_learning_rate_falls_at_the_milestones(rates):
    before, after = _drift(64)
    AdapterTraining(epochs=10, lr=0.1, milestones=(0.3, 0.6), batch_size=64).run(TRAINER, before, after, 0, 1)
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 4)


def test_progress_walks_through_the_epochs():
    seen = []

    def walk(epochs):
        for epoch in epochs:
            seen.append(epoch)
            yield epoch

    AdapterTraining(epochs=3, batch_size=64).run(TRAINER, *_drift(64), 0, 1, walk)
    assert seen == [0, 1, 2]


def test_the_first_epoch_has_the_whole_learning_rate(rates):
    for epochs in (1, 2, 3):
        AdapterTraining(epochs=epochs, lr=0.1, batch_size=64).run(TRAINER, *_drift(64), 0, 1)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.1, 0.1, 0.01])
