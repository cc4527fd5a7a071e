"""Exits that use what those before them said."""

import pytest
import torch
from torch import nn

from lightning_cl.exits import ExitHeads
from lightning_cl.heads.exit_ensemble import CascadedHead, GeometricEnsemble


def _logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_answer_by_hand():
    ensemble = GeometricEnsemble(exits=3, num_classes=2)
    with torch.no_grad():
        ensemble.weights[1] = torch.tensor([0.0, 1.0, 5.0])
        ensemble.bias[1] = torch.tensor([0.5, 0.0])
    said = [_logits(4, 2), -_logits(4, 2)]
    first, second = (logits.log_softmax(1) for logits in said)
    expected = (first + torch.e * second) / 2 + torch.tensor([0.5, 0.0])
    torch.testing.assert_close(ensemble(said), expected)


def test_of_one_exit_it_predicts_what_the_exit_does():
    logits = _logits(50, 5)
    assert torch.equal(GeometricEnsemble(1, 5)([logits]).argmax(1), logits.argmax(1))


def test_of_exits_that_agree_it_predicts_what_they_do():
    logits = _logits(50, 5)
    assert torch.equal(GeometricEnsemble(3, 5)([logits] * 3).argmax(1), logits.argmax(1))


def test_only_its_own_weights_have_a_gradient():
    ensemble, said = GeometricEnsemble(2, 3), [_logits(4, 3).requires_grad_(), _logits(4, 3).requires_grad_()]
    ensemble(said).logsumexp(1).sum().backward()
    assert all(logits.grad is None for logits in said)
    assert ensemble.bias.grad[1].abs().sum() > 0
    assert ensemble.bias.grad[0].abs().sum() == 0
    assert (ensemble.weights.grad[1] != 0).all()


def test_a_class_that_is_ruled_out_stays_so_and_makes_no_gradient_that_is_no_number():
    ensemble, logits = GeometricEnsemble(1, 3), _logits(4, 3)
    logits[:, 2] = -torch.inf
    answer = ensemble([logits])
    assert (answer.softmax(1)[:, 2] == 0).all()
    nn.functional.cross_entropy(answer, torch.zeros(4, dtype=torch.long)).backward()
    assert ensemble.weights.grad.isfinite().all()


def test_weights_begin_near_nothing_and_the_bias_with_it():
    torch.manual_seed(0)
    ensemble = GeometricEnsemble(40, 3)
    assert float(ensemble.weights.std()) == pytest.approx(0.01, rel=0.1)
    assert not ensemble.bias.any()


def test_a_cascaded_head_is_linear_in_features_and_normalised_logits():
    head = CascadedHead(nn.Linear(4, 3), 3)
    features, earlier = _logits(5, 4), 10 * _logits(5, 3)
    normalised = (earlier - earlier.mean(1, keepdim=True)) / (
        earlier.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    weight = torch.cat([head.head.weight, head.earlier.weight], dim=1)
    expected = torch.cat([features, normalised], dim=1) @ weight.T + head.head.bias
    torch.testing.assert_close(head(features, earlier), expected)


def test_a_cascade_sends_no_gradient_to_the_head_before():
    heads = ExitHeads([nn.Linear(4, 3), nn.Linear(4, 3)], num_classes=3, ensemble="cascade")
    said = [heads.say(0, _logits(5, 4), [])]
    heads.say(1, _logits(5, 4), said).sum().backward()
    assert all(parameter.grad is None for parameter in heads.heads[0].parameters())
    assert heads.heads[1].earlier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("ensemble", "combined"), [("none", False), ("cascade", False), ("geometric", True)])
def test_who_answers(ensemble, combined):
    heads = ExitHeads([nn.Linear(4, 3), nn.Linear(4, 3)], num_classes=3, ensemble=ensemble)
    said = [_logits(5, 3), -2 * _logits(5, 3)]
    assert torch.equal(heads.answer(said), said[-1]) != combined
