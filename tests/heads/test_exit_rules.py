"""Where samples leave: how sure an exit is, and which exit a sample takes."""

import math

import pytest
import torch

from lightning_cl.heads.exit_rules import confidence_of, first_confident, patience_of


@pytest.mark.parametrize("kind", ["max_softmax", "entropy"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_confidence_is_highest_for_one_class_and_lowest_for_all_alike(kind, classes):
    rows = torch.stack([torch.zeros(classes), 100 * torch.eye(classes)[0], torch.randn(classes)])
    confidences = confidence_of(rows, kind)
    assert confidences[0] == pytest.approx(1 / classes if kind == "max_softmax" else 0, abs=1e-6)
    assert confidences[1] == pytest.approx(1)
    assert confidences[0] < confidences[2] < confidences[1]


def test_entropy_by_hand():
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    entropy = -sum(p * math.log(p) for p in probabilities.tolist())
    assert float(confidence_of(probabilities.log()[None], "entropy")) == pytest.approx(1 - entropy / math.log(3))


@pytest.mark.parametrize("kind", ["max_softmax", "entropy"])
def test_a_class_that_is_ruled_out_is_no_doubt(kind):
    assert float(confidence_of(torch.tensor([[5.0, -math.inf, -math.inf]]), kind)) == 1


@pytest.mark.parametrize("kind", ["max_softmax", "entropy"])
def test_half_precision_is_as_sure_as_single(kind):
    logits = torch.randn(50, 10).bfloat16()
    assert torch.equal(confidence_of(logits, kind), confidence_of(logits.float(), kind))


def test_patience_counts_repeats():
    predictions = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 2], [1, 1, 2, 2], [1, 2, 1, 2]])
    repeats = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(patience_of(predictions) * 3, repeats.float())


def test_patience_is_the_same_before_the_later_exits_have_predicted():
    predictions = torch.zeros(3, 60, dtype=torch.long)
    predictions[1, 7] = predictions[2, 20:] = 1
    for known in range(1, 61):
        assert torch.equal(patience_of(predictions[:, :known], 60), patience_of(predictions)[:, :known])


@pytest.mark.parametrize(("threshold", "exit_"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.79, 1), (0.8, 2), (1.0, 2)])
def test_a_sample_leaves_where_it_is_first_surer_than_the_threshold(threshold, exit_):
    assert first_confident(torch.tensor([[0.5, 0.8, 0.2]]), threshold).tolist() == [exit_]


def test_who_is_nowhere_sure_goes_to_the_end_however_sure_that_is():
    assert first_confident(torch.tensor([[0.3, 0.4, 0.0]]), 0.9).tolist() == [2]


def test_exits_come_later_as_the_threshold_rises():
    confidences = torch.rand(200, 5)
    taken = torch.stack([first_confident(confidences, threshold / 100) for threshold in range(101)])
    assert (taken.diff(dim=0) >= 0).all()
    assert (taken[-1] == 4).all()
    assert (taken[0] == 0).all()


def test_confidences_are_left_as_they_are():
    confidences = torch.rand(20, 3)
    before = confidences.clone()
    first_confident(confidences, 0.5)
    assert torch.equal(confidences, before)
