"""The tracker in streams of other kinds, and where tasks are refused."""

import pytest
import torch
from numbered_streams import Judge
from probed_streams import SIZE, Snapshots, assert_same_curve, curve_by_hand, fit_tracked, predict

from lightning_cl.callbacks import ContinualMetrics, StabilityGapTracker
from lightning_cl.datamodules import DomainIncremental, TaskList
from tests.modules import DigitsData, Plain, ShiftingDigits


def _tracker(**options):
    return StabilityGapTracker(**{"probe_size": SIZE, **options})


# ------------------------------------------------------------------ tasks that are refused


def test_a_rejected_task_leaves_no_trace_in_the_curve():
    tracker, _, _ = fit_tracked(_tracker(), [Judge(1)])
    trained, accuracies = tracker.curve.trained.tolist(), tracker.curve.accuracies[:, 0]
    assert trained == [0] * 3 + [2] * 3
    assert tracker.curve.steps.tolist() == [1, 2, 3, 7, 8, 9]
    assert accuracies[:, 1].isnan().all()
    assert not accuracies[3:, [0, 2]].isnan().any()


def test_a_task_that_is_repeated_leaves_its_last_attempt_in_the_curve():
    snapshots = Snapshots()
    tracker, _, _ = fit_tracked(_tracker(), [Judge(1, [1]), snapshots])
    assert tracker.curve.steps.tolist() == [1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert tracker.curve.trained.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    by_hand = curve_by_hand(snapshots, lambda step, images: predict(snapshots.module(step, Plain()), images))
    assert_same_curve(tracker.curve.accuracies[:, 0], by_hand[[0, 1, 2, 6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize("options", [{}, {"dense_steps": 3}], ids=str)
def test_after_a_rejected_task_nothing_is_measured_before_the_first_step(options):
    tracker, _, _ = fit_tracked(_tracker(**options), [Judge(0)], accumulate_grad_batches=2)
    assert tracker.curve.steps.tolist() == [3, 4, 5, 6]
    assert tracker.curve.trained.tolist() == [1, 1, 2, 2]


def test_a_stream_whose_first_task_is_rejected_has_figures_of_the_others():
    tracker, trainer, _ = fit_tracked(_tracker(), [Judge(0)])
    assert tracker.curve.trained.tolist() == [1] * 3 + [2] * 3
    assert tracker.curve.accuracies[:, 0, 0].isnan().all()
    assert tracker.figures["gap"] == trainer.callback_metrics["stability/gap"]


# ------------------------------------------------------------------ other streams


def test_tasks_that_share_classes_have_no_recency():
    metrics = ContinualMetrics(print_table=False)
    sequence = DomainIncremental(DigitsData(), [None, torch.Tensor.neg, lambda images: 1 - images])
    tracker, _, _ = fit_tracked(_tracker(probe_size=60), [metrics], sequence=sequence)
    ends = tracker.curve.epoch_ends
    assert_same_curve(tracker.curve.accuracies[ends, 0], metrics.matrix)
    assert tracker.curve.recency.isnan().all()
    assert not torch.tensor(tracker.figures["gap"]).isnan()


def test_a_list_of_datamodules_is_measured_with_the_probes_of_each():
    metrics = ContinualMetrics(print_table=False)
    sequence = TaskList([DigitsData(), ShiftingDigits()])
    tracker, _, _ = fit_tracked(_tracker(probe_size=60), [metrics], sequence=sequence)
    assert tracker.curve.trained.tolist() == [0] * 9 + [1] * 9
    assert_same_curve(tracker.curve.accuracies[tracker.curve.epoch_ends, 0], metrics.matrix)
    assert tracker.curve.recency.isnan().all()


def test_tasks_whose_samples_make_no_common_batch_are_measured_apart():
    class Small(DigitsData):
        def dataset(self, first, count):
            images, labels = super().dataset(first, count).tensors
            return torch.utils.data.TensorDataset(images[:, :32], labels)

    class AnyWidth(Plain):
        def forward(self, images):
            return super().forward(torch.nn.functional.pad(images, (0, 64 - images.shape[1])))

    metrics = ContinualMetrics(print_table=False)
    sequence = TaskList([DigitsData(), Small()])
    tracker, _, _ = fit_tracked(_tracker(probe_size=60), [metrics], AnyWidth, sequence=sequence)
    assert_same_curve(tracker.curve.accuracies[tracker.curve.epoch_ends, 0], metrics.matrix)
