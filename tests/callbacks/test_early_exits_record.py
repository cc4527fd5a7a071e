"""What a run keeps of the measurements of its exits, and what figures can still be made of it."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from exit_streams import LAYERS, Deep
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from numbered_streams import fit_stream, same

from lightning_cl.callbacks import EarlyExits, Replay
from lightning_cl.heads.exit_rules import confidence_of, first_confident
from lightning_cl.reporting.exits import exit_table
from lightning_cl.reporting.results import json_of
from tests.modules import DigitsData, digits

IMAGES, LABELS = digits(24, 10)


class DigitsToValidate(DigitsData):
    """As many validation images of each digit as are asked for."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def dataset(self, first, count):
        return super().dataset(first, self.count if first == 24 else count)


class FiguresByEpoch(Callback):
    """Keeps the figures that a run has when an epoch starts."""

    def __init__(self):
        self.figures = {}

    def on_train_epoch_start(self, trainer, pl_module):
        (exits,) = [callback for callback in trainer.callbacks if isinstance(callback, EarlyExits)]
        self.figures[trainer.current_epoch] = exits.figures


def _fit(threshold, others=(), data=None, **settings):
    exits = EarlyExits(LAYERS, "joint", threshold=threshold, print_table=False)
    settings = {"max_epochs": 2, **settings}
    return exits, *fit_stream([Replay(30), exits, *others], Deep, data or DigitsData(), **settings)


def _size(state):
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue())


@pytest.mark.parametrize("threshold", [0.905, "auto:5pp"])
def test_the_state_has_the_same_size_for_any_number_of_validation_samples(threshold):
    records = [_fit(threshold, data=DigitsToValidate(count))[0].record for count in (4, 40)]
    few, many = (_size(record.state_dict()) for record in records)
    assert few == many
    assert not same(*(record.state_dict() for record in records))


def test_the_state_in_a_checkpoint_is_plain(tmp_path):
    exits, trainer, _ = _fit(0.905)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][exits.state_key]["record"]
    assert same(saved, exits.record.state_dict())
    assert {type(parts) for parts in saved["summaries"].values()} == {list}


def test_a_threshold_between_those_of_the_curve_is_measured_itself():
    """Between two samples whose confidences lie in one step of the curve."""
    exits, _, module = _fit(None, max_epochs=4)
    exits.network.attach(module.eval())
    with torch.no_grad(), exits.hooks.collecting():
        module(IMAGES)
        logits = torch.stack(exits.hooks.logits, dim=1)
    exits.network.detach()
    early = confidence_of(logits)[:, 0].sort().values
    steps = (early * 100).floor()
    place = next(i for i in range(10, len(early)) if steps[i] == steps[i - 1] and early[i] - early[i - 1] > 1e-4)
    threshold = float(early[place - 1] + early[place]) / 2
    figures = _fit(threshold, max_epochs=4)[0].figures
    taken = first_confident(confidence_of(logits), threshold)
    right = logits[torch.arange(len(taken)), taken].argmax(1) == LABELS
    for task in range(3):
        rows = task == LABELS // 2
        expected = taken[rows].bincount(minlength=3) / rows.sum()
        torch.testing.assert_close(figures["exit_shares"][str(task)], expected)
    assert figures["accuracy"] == pytest.approx(float(right.float().mean()))
    assert figures["cost"] == pytest.approx(float(exits.network.costs[taken].mean()))
    assert len(figures["curve"]["thresholds"]) == 101


@pytest.mark.parametrize("threshold", [0.905, "auto:5pp"])
def test_a_resumed_run_has_the_figures_of_the_run_before(threshold, tmp_path):
    first, second = FiguresByEpoch(), FiguresByEpoch()
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, _, _ = _fit(threshold, [first, keeper], enable_checkpointing=True)
    resumed, _, _ = _fit(threshold, [second], ckpt_path=tmp_path / "epoch=2.ckpt")
    assert first.figures[3]["accuracy"] > 0
    assert sorted(second.figures) == [3, 4, 5]
    for epoch, figures in second.figures.items():
        assert json_of(figures) == json_of(first.figures[epoch])
    assert json_of(resumed.figures) == json_of(whole.figures)


def test_a_threshold_that_was_not_measured_has_no_figures_but_the_curve_has(recwarn):
    exits, _, _ = _fit(0.905)
    before = exits.figures
    assert not [warning for warning in recwarn if "not measured" in str(warning.message)]
    exits.threshold = 0.305
    with pytest.warns(UserWarning, match=r"not measured with `threshold=0.305`"):
        figures = exits.figures
    assert math.isnan(figures["accuracy"])
    assert math.isnan(figures["cost"])
    assert same(figures["curve"], before["curve"])
    assert exit_table(figures).row_count == exit_table(before).row_count
    exits.threshold = 0.3
    assert exits.figures["accuracy"] > 0


def test_a_budget_that_no_threshold_keeps_within_has_no_accuracy(tmp_path):
    """The first exit costs 5/6 of the network."""
    logger = CSVLogger(tmp_path, version=0)
    _fit(0.905, logger=logger, log_every_n_steps=1)
    budgets = json.loads((Path(logger.log_dir) / "exits.json").read_text())["accuracy_at_budget"]
    assert {budget for budget, accuracy in budgets.items() if accuracy is None} == {"0.25", "0.5", "0.75"}
    assert budgets["1.0"] > 0
