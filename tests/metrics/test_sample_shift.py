"""Samples that move unlike others of their class have the highest scores."""

import pytest
import torch

from lightning_cl.metrics.sample_shift import precision_at_k, sample_scores


def _moved(lengths, width=3):
    """Outputs of length one, and outputs that have moved by so much."""
    before = torch.zeros(len(lengths), width)
    before[:, 0] = 1.0
    after = before.clone()
    after[:, 1] = torch.tensor(lengths)
    return before, after


LENGTHS = [0.9, 1.0, 1.1, 1.2, 8.0, 0.09, 0.1, 0.11, 0.12, 0.8]
LABELS = torch.tensor([0] * 5 + [1] * 5)


def test_a_sample_is_compared_with_its_own_class():
    before, after = _moved(LENGTHS)
    scores = sample_scores({"fc": before}, {"fc": after}, LABELS)
    assert set(scores.topk(2).indices.tolist()) == {4, 9}
    assert scores[[2, 7]].abs().max() < 0.05  # the medians, 1.1 and 0.11
    alone = sample_scores({"fc": before[5:]}, {"fc": after[5:]}, LABELS[5:])
    torch.testing.assert_close(scores[5:], alone, atol=0.05, rtol=0.01)


def test_a_shift_counts_relative_to_the_outputs():
    before, after = _moved(LENGTHS)
    scale = torch.linspace(0.1, 10, len(LENGTHS))[:, None]
    plain, scaled = (
        sample_scores({"fc": first}, {"fc": second}, LABELS)
        for first, second in ((before, after), (before * scale, after * scale))
    )
    torch.testing.assert_close(plain, scaled, atol=0.2, rtol=0.02)


def test_layers_are_added_up():
    before, after = _moved(LENGTHS)
    one = sample_scores({"a": before}, {"a": after}, LABELS)
    two = sample_scores({"a": before, "b": before}, {"b": after, "a": after}, LABELS)
    torch.testing.assert_close(two, 2 * one)


def test_samples_that_do_not_move_have_finite_scores():
    before, after = _moved([0.0, 0.0, 0.0, 1.0])
    scores = sample_scores({"a": before, "silent": before * 0}, {"a": after, "silent": before * 0}, LABELS[:4])
    assert scores.isfinite().all()
    assert scores.argmax() == 3


def test_a_layer_that_grew_is_compared_in_what_it_had():
    before, after = _moved(LENGTHS)
    wider = torch.cat([after, torch.full((len(after), 2), 9.0)], dim=1)
    assert torch.equal(
        sample_scores({"fc": before}, {"fc": wider}, LABELS), sample_scores({"fc": before}, {"fc": after}, LABELS)
    )


@pytest.mark.parametrize(
    ("after", "found"), [({}, "is not called any more"), ({"fc": torch.zeros(10, 2)}, r"now gives \(10, 2\)")]
)
def test_a_layer_that_is_gone_or_another(after, found):
    with pytest.raises(ValueError, match=rf"Layer 'fc' gave \(10, 3\) .*{found}.*`layers="):
        sample_scores({"fc": torch.ones(10, 3)}, after, LABELS)


def test_precision_counts_the_first_k():
    poisoned = torch.tensor([False, True, False, True])
    assert precision_at_k(torch.tensor([1.0, 4.0, 2.0, 3.0]), poisoned) == 1
    assert precision_at_k(torch.tensor([4.0, 1.0, 3.0, 2.0]), poisoned) == 0
    assert precision_at_k(torch.tensor([4.0, 3.0, 2.0, 1.0]), poisoned) == 0.5
    assert precision_at_k(torch.ones(4), torch.zeros(4, dtype=torch.bool)).isnan()
    with pytest.raises(ValueError, match=r"one entry a sample, got \(4,\) and \(3,\)"):
        precision_at_k(torch.ones(4), poisoned[:3])
