"""A curve of accuracies grows evaluation by evaluation, and goes through a checkpoint whole."""

import pytest
import torch

from lightning_cl.metrics.curve import AccuracyCurve

nan = torch.nan


def _filled(length, tasks=3, heads=1):
    generator = torch.Generator().manual_seed(0)
    curve, rows = AccuracyCurve(tasks, heads), []
    for step in range(1, length + 1):
        row = torch.rand(heads, tasks, generator=generator), torch.rand(heads, generator=generator)
        curve.append(10 * step, step % tasks, step % 4 == 0, *row)
        rows.append(row)
    return curve, rows


def test_a_curve_without_evaluations():
    curve = AccuracyCurve(3, 2)
    assert curve.length == 0
    assert curve.accuracies.shape == (0, 2, 3)
    assert curve.recency.shape == (0, 2)
    assert curve.steps.dtype == curve.trained.dtype == torch.int64
    assert curve.epoch_ends.dtype == torch.bool
    curve.mark_epoch_end()
    assert curve.length == 0


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 500])
@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_added_is_kept_in_its_order_while_the_curve_grows(length, heads):
    curve, rows = _filled(length, heads=heads)
    assert curve.length == length
    assert curve.steps.tolist() == [10 * step for step in range(1, length + 1)]
    assert curve.trained.tolist() == [step % 3 for step in range(1, length + 1)]
    assert curve.epoch_ends.tolist() == [step % 4 == 0 for step in range(1, length + 1)]
    assert torch.equal(curve.accuracies, torch.stack([row[0] for row in rows]))
    assert torch.equal(curve.recency, torch.stack([row[1] for row in rows]))


def test_room_grows_in_proportion_so_that_steps_cost_the_same_late_in_a_run():
    curve, moved, before = AccuracyCurve(2), 0, None
    for step in range(5000):
        curve.append(step, 0, False, torch.zeros(1, 2), torch.zeros(1))
        storage = curve.accuracies.data_ptr()
        moved += storage != before
        before = storage
    assert moved < 12


def test_nan_is_kept():
    curve = AccuracyCurve(2)
    curve.append(1, 0, True, torch.tensor([[0.5, nan]]), torch.tensor([nan]))
    assert curve.accuracies[0, 0, 0] == 0.5
    assert curve.accuracies[0, 0, 1].isnan()
    assert curve.recency.isnan().all()


def test_an_epochs_end_may_be_known_only_later():
    curve, _ = _filled(3)
    assert not curve.epoch_ends.any()
    curve.mark_epoch_end()
    assert curve.epoch_ends.tolist() == [False, False, True]
    curve.append(50, 0, False, torch.zeros(1, 3), torch.zeros(1))
    assert curve.epoch_ends.tolist() == [False, False, True, False]


@pytest.mark.parametrize("length", [0, 1, 64, 70])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_saved_curve_goes_on_where_it_was(length, heads, tmp_path):
    curve, _ = _filled(length, heads=heads)
    torch.save(curve.state_dict(), tmp_path / "curve.pt")
    again = AccuracyCurve(3, heads)
    again.load_state_dict(torch.load(tmp_path / "curve.pt", weights_only=True))
    for grown in (curve, again):
        for step in range(80):
            grown.append(1000 + step, 2, False, torch.full((heads, 3), 0.5), torch.zeros(heads))
    assert again.length == length + 80
    first, second = curve.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_state_holds_copies_without_the_room_to_grow():
    curve, _ = _filled(5)
    state = curve.state_dict()
    for value in state.values():
        assert len(value) == 5
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    before = state["epoch_ends"].clone()
    curve.mark_epoch_end()
    assert torch.equal(state["epoch_ends"], before)


def test_a_loaded_curve_does_not_write_into_the_state():
    state = _filled(5)[0].state_dict()
    curve = AccuracyCurve(3)
    curve.load_state_dict(state)
    curve.mark_epoch_end()
    curve.accuracies.zero_()
    assert not state["epoch_ends"][-1]
    assert state["accuracies"].sum() > 0


def test_a_stream_may_have_more_tasks_later():
    short, rows = _filled(70, tasks=2, heads=2)
    curve = AccuracyCurve(5, 2)
    curve.load_state_dict(short.state_dict())
    curve.append(999, 4, True, torch.ones(2, 5), torch.ones(2))
    assert curve.accuracies.shape == (71, 2, 5)
    assert torch.equal(curve.accuracies[:70, :, :2], torch.stack([row[0] for row in rows]))
    assert curve.accuracies[:70, :, 2:].isnan().all()
    assert curve.accuracies[70].eq(1).all()


def test_a_state_replaces_what_the_curve_had():
    curve, _ = _filled(100)
    shorter, _ = _filled(7)
    curve.load_state_dict(shorter.state_dict())
    assert curve.length == 7
    assert curve.steps.tolist() == shorter.steps.tolist()
