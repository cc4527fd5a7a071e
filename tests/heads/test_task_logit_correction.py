"""Task-wise logits correction: fitted without a draw, and never between the classes of one task."""

import pytest
import torch

from lightning_cl.heads.task_logit_correction import (
    TaskLogitCorrection,
    correction_error,
    fit_task_logit_correction,
)

CLASSES = [[0, 1], [2, 3, 4], [5], [6, 7]]
ONE = torch.tensor([[[1.0, 0.0, 3.0, 1.0]]])


@pytest.mark.parametrize(("slope", "offset", "error"), [(0, 0, 0), (1, 0, 0.25), (0, 1, 0.25), (0.5, 0.5, 0.25)])
def test_the_error_by_hand(slope, offset, error):
    assert float(correction_error(ONE, [[0, 1], [2, 3]], TaskLogitCorrection(slope, offset))) == error


def test_what_is_alike_needs_no_correction():
    assert fit_task_logit_correction(ONE, [[0, 1], [2, 3]]) == pytest.approx((0, 0))


def test_one_task_has_no_correction():
    assert fit_task_logit_correction(torch.randn(20, 3, 4), [[0, 1, 2, 3]]) == (0, 0)


def test_no_correction_changes_nothing():
    logits = torch.randn(9, 3, 8)
    assert torch.equal(TaskLogitCorrection(0.0, 0.0).apply(logits, CLASSES), logits)


def test_a_bias_that_grows_with_age_is_found_and_taken_back():
    torch.manual_seed(0)
    logits = 0.01 * torch.randn(50, 3, 8)
    logits[..., [6, 7]] += 4.0 + torch.tensor([3.0, 0.0])  # class 6 wins; 7 is what the newest task has left
    for age, own in ((3, CLASSES[0]), (2, CLASSES[1]), (1, CLASSES[2])):
        logits[..., own] += 4.0 - (0.5 * age + 1.0)
    slope, offset = fit_task_logit_correction(logits, CLASSES)
    assert slope == pytest.approx(0.5, abs=0.02)
    assert offset == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_correction_has_less_error(seed):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(30, 4, 8)
    best = fit_task_logit_correction(logits, CLASSES)
    least = float(correction_error(logits, CLASSES, best))
    for slope, offset in torch.randn(200, 2).tolist():
        other = TaskLogitCorrection(best.slope + 0.1 * slope, best.offset + 0.1 * offset)
        assert float(correction_error(logits, CLASSES, other)) >= least - 1e-6


def test_the_fit_is_the_same_each_time_and_draws_nothing():
    logits = torch.randn(30, 4, 8)
    before = torch.get_rng_state()
    assert fit_task_logit_correction(logits, CLASSES) == fit_task_logit_correction(logits, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)


def test_predictions_among_the_classes_of_a_task_never_change():
    logits = torch.randn(100, 3, 8)
    corrected = TaskLogitCorrection(1.7, -3.0).apply(logits, CLASSES)
    for own in CLASSES:
        assert torch.equal(corrected[..., own].argmax(-1), logits[..., own].argmax(-1))
    assert not torch.equal(corrected.argmax(-1), logits.argmax(-1))
    assert torch.equal(corrected[..., [6, 7]], logits[..., [6, 7]])


def test_classes_of_tasks_to_come_stay_as_they_are():
    logits = torch.randn(5, 8)
    corrected = TaskLogitCorrection(1.0, 1.0).apply(logits, CLASSES[:2])
    assert torch.equal(corrected[:, :2], logits[:, :2] + 2)
    assert torch.equal(corrected[:, 2:], logits[:, 2:])


def test_classes_that_are_ruled_out_stay_so_and_have_no_part_in_the_fit():
    logits = torch.randn(30, 2, 8)
    without = fit_task_logit_correction(logits[..., :5], [[0, 1], [2, 3, 4]])
    ruled_out = torch.cat([logits[..., :5], torch.full((30, 2, 3), -torch.inf)], dim=-1)
    assert fit_task_logit_correction(ruled_out, [[0, 1], [2, 3, 4]]) == pytest.approx(without)
    assert TaskLogitCorrection(1.0, 1.0).apply(ruled_out, CLASSES)[..., 5:].isinf().all()


def test_a_task_whose_only_class_wins_has_no_part():
    logits = torch.tensor([[[0.0, 0.0, 9.0]]])
    assert fit_task_logit_correction(logits, [[0], [1], [2]]) == pytest.approx((0, 0))
    assert float(correction_error(logits, [[0], [1], [2]], TaskLogitCorrection(0.0, 1.0))) == 0


@pytest.mark.parametrize("scale", [1, 1000])
def test_half_precision_logits_are_fitted_in_double(scale):
    logits = scale * torch.randn(30, 4, 8).bfloat16()
    assert fit_task_logit_correction(logits, CLASSES) == fit_task_logit_correction(logits.double(), CLASSES)
