"""What is measured of exits: against by-hand evaluation, in files, and for the threshold that is chosen by it."""

import json
from pathlib import Path

import pytest
import torch
from command_line import OPTIONS
from exit_streams import LAYERS, Deep
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import fit_stream, same

import lightning_cl
from lightning_cl.callbacks import ContinualMetrics, EarlyExits, Replay
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from lightning_cl.heads.exit_rules import confidence_of, first_confident
from lightning_cl.heads.task_logit_correction import fit_task_logit_correction
from lightning_cl.metrics.early_exit import accuracy_at_budget, exit_curve, exit_summary, mean_curve
from tests.modules import DigitsData, Plain, TrainingDigits, digits, quiet_trainer

IMAGES, LABELS = digits(24, 10)


def _fit(exits, others=(), **settings):
    return fit_stream([Replay(30), exits, *others], Deep, DigitsData(), **{"max_epochs": 4, **settings})


def _by_hand(exits, module):
    """Confidences and hits of each exit on the validation samples of each task."""
    exits.network.attach(module.eval())
    with torch.no_grad(), exits.hooks.collecting():
        module(IMAGES)
        logits = torch.stack(exits.hooks.logits, dim=1)
    exits.network.detach()
    right = logits.argmax(-1) == LABELS[:, None]
    return [(confidence_of(logits)[task == LABELS // 2], right[task == LABELS // 2]) for task in range(3)]


def test_figures_are_those_of_an_evaluation_by_hand():
    exits = EarlyExits(LAYERS, "joint", threshold=0.3, print_table=False)
    _, module = _fit(exits)
    costs, parts = torch.tensor(exits.network.spec["costs"]), _by_hand(exits, module)
    curve = mean_curve([exit_curve(*part, costs) for part in parts])
    figures = exits.figures
    for task, (confidences, right) in enumerate(parts):
        taken = first_confident(confidences, 0.3)
        torch.testing.assert_close(figures["exit_shares"][str(task)], taken.bincount(minlength=3) / len(taken))
        torch.testing.assert_close(figures["accuracy_matrices"][:, 2, task], right.float().mean(0))
    used = mean_curve([exit_curve(*part, costs, torch.tensor([0.3])) for part in parts])
    assert figures["accuracy"] == pytest.approx(float(used.accuracies))
    assert figures["cost"] == pytest.approx(float(used.costs))
    for budget, accuracy in figures["accuracy_at_budget"].items():
        expected = float(accuracy_at_budget(curve, float(budget)))
        assert accuracy == pytest.approx(expected, nan_ok=True)


def test_costs_are_flops_with_the_heads_on_the_way():
    exits = EarlyExits(LAYERS, "joint", print_table=False)
    _fit(exits)
    first, second, last = 2 * 64 * 24, 2 * 24 * 16, 2 * 16 * 6
    heads = [2 * 24 * 6, 2 * 16 * 6]
    total = first + second + last
    expected = [first + heads[0], first + second + sum(heads), total + sum(heads)]
    assert exits.network.spec["costs"] == pytest.approx([flops / total for flops in expected])


def test_a_chosen_threshold_loses_no_more_than_allowed_and_is_in_use_from_the_next_task_on():
    noticed = []

    class Notes(Deep):
        def on_train_epoch_start(self):
            hooks = next(c for c in self.trainer.callbacks if isinstance(c, EarlyExits)).hooks
            noticed.append(hooks.threshold)

    exits = EarlyExits(LAYERS, "joint", threshold="auto:5pp", print_table=False)
    metrics = ContinualMetrics(print_table=False)
    _, module = fit_stream([Replay(30), exits, metrics], Notes, DigitsData(), max_epochs=4)
    parts = _by_hand(exits, module)
    curve = mean_curve([exit_curve(*part, torch.tensor(exits.network.spec["costs"])) for part in parts])
    allowed = curve.accuracies >= curve.accuracies[-1] - 0.05 - 1e-6
    cheapest = curve.costs[allowed].min()
    assert exits.figures["cost"] == pytest.approx(float(cheapest))
    assert exits.figures["accuracy"] >= float(curve.accuracies[-1]) - 0.05 - 1e-6
    assert noticed[:4] == [None] * 4
    assert all(value is not None for value in noticed[4:])
    assert metrics.matrix[2].mean() == pytest.approx(exits.figures["accuracy"])  # what the module's own forward gives


@pytest.mark.parametrize("epochs", [1, 2])
def test_figures_are_logged_and_written(epochs, tmp_path, capsys):
    exits = EarlyExits(LAYERS, "joint", threshold=0.3)
    logger = CSVLogger(tmp_path, version=0)
    trainer, _ = _fit(exits, logger=logger, max_epochs=epochs, log_every_n_steps=1)
    assert float(trainer.callback_metrics["exits/accuracy"]) == pytest.approx(exits.figures["accuracy"])
    assert float(trainer.callback_metrics["exits/cost"]) == pytest.approx(exits.figures["cost"])
    written = json.loads((Path(logger.log_dir) / "exits.json").read_text())
    assert written["cost"] == pytest.approx(exits.figures["cost"])
    assert written["threshold"] == 0.3
    assert (Path(logger.log_dir) / "exits.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines() if line.split()][:1] == ["exit"]
    assert "end" in table


def test_a_dry_run_measures_and_corrects_on_little(monkeypatch):
    fitted_to, measured = [], []

    def summary(scores, threshold):
        measured.append(len(scores.correct))
        return exit_summary(scores, threshold)

    def fit(logits, classes):
        fitted_to.append(len(logits))
        return fit_task_logit_correction(logits, classes)

    monkeypatch.setattr("lightning_cl.tasks.exit_evaluation.fit_task_logit_correction", fit)
    monkeypatch.setattr("lightning_cl.tasks.exit_evaluation.exit_summary", summary)
    exits = EarlyExits(LAYERS, "mixed", threshold="auto:5pp", correction="tlc", print_table=False)
    fit_stream([exits], Deep, DigitsData(), fast_dev_run=1)
    assert fitted_to == [32, 32, 32]
    assert measured == [16] * 6


def test_without_validation_data_nothing_is_measured_and_nothing_chosen():
    exits = EarlyExits(["net.0"], "joint", threshold=0.3)
    fit_stream([exits], Plain, TrainingDigits())
    assert exits.figures == {}
    with pytest.raises(Exception, match=r"`threshold='auto:1pp'` is chosen on validation data, and task 0 .* has none"):
        fit_stream([EarlyExits(["net.0"], "joint", threshold="auto:1pp")], Plain, TrainingDigits())


@pytest.mark.parametrize("threshold", ["auto", "auto:x", "0.5pp", "auto:-1pp", ""])
def test_a_threshold_that_is_no_number_nor_a_way_to_choose_one(threshold):
    with pytest.raises(ValueError, match=f"`threshold` must be .*'auto:0.5pp', got '{threshold}'"):
        EarlyExits(["net.0"], threshold=threshold)


@pytest.mark.usefixtures("_elsewhere")
def test_exits_at_equal_costs_on_the_command_line():
    callback = ["--trainer.callbacks+=EarlyExits", "--trainer.callbacks.layers=auto:1"]
    cli = main(["fit", *OPTIONS, *callback, "--trainer.callbacks.regime=joint"])
    (exits,) = [c for c in cli.trainer.callbacks if isinstance(c, EarlyExits)]
    assert len(exits.network.spec["layers"]) == 1


@pytest.mark.usefixtures("_elsewhere")
def test_a_threshold_is_chosen_on_the_command_line():
    callback = ["--trainer.callbacks+=EarlyExits", "--trainer.callbacks.layers=[model.body.1]"]
    options = ["--trainer.callbacks.regime=joint", "--trainer.callbacks.threshold=auto:1pp"]
    cli = main(["fit", *OPTIONS, *callback, *options])
    (exits,) = [c for c in cli.trainer.callbacks if isinstance(c, EarlyExits)]
    assert 0 <= exits.threshold_in_use <= 1


# ------------------------------------------------------------------ correction of recent tasks


def _raw_logits(exits, module, images):
    """What the exits say without the correction."""
    hooks = exits.network.attach(module.eval())
    with torch.no_grad(), hooks.collecting():
        module(images)
        logits = torch.stack(hooks.logits, dim=1)
    exits.network.detach()
    return logits


def test_the_correction_is_fitted_to_the_newest_tasks_training_samples_alone():
    exits = EarlyExits(LAYERS, "joint", correction="tlc", print_table=False)
    _, module = _fit(exits)
    training, labels = digits(0, 24)
    logits = _raw_logits(exits, module, training[labels >= 4])
    expected = fit_task_logit_correction(logits, [[0, 1], [2, 3], [4, 5]])
    found, classes = exits.record.correction
    assert found == pytest.approx(expected, abs=1e-4)
    assert classes == [[0, 1], [2, 3], [4, 5]]
    assert found != (0, 0)


def test_every_exit_answers_with_the_correction_in_evaluation_and_without_it_in_training():
    runs = {}
    for correction in ("none", "tlc"):
        exits = EarlyExits(LAYERS, "joint", correction=correction, threshold=0.4, print_table=False)
        metrics = ContinualMetrics(print_table=False)
        trainer, module = fit_stream([Replay(30), exits, metrics], Deep, DigitsData(), max_epochs=4)
        runs[correction] = exits, metrics, dict(module.state_dict()), trainer, module
    exits, metrics, weights, trainer, module = runs["tlc"]
    assert same(weights, runs["none"][2])  # training is untouched
    assert same(metrics.task_aware_matrix, runs["none"][1].task_aware_matrix)
    correction, classes = exits.record.correction
    logits = correction.apply(_raw_logits(exits, module, IMAGES), classes)
    taken = first_confident(confidence_of(logits), 0.4)
    answers = logits[torch.arange(len(taken)), taken].argmax(1)
    accuracies = [(answers == LABELS)[task == LABELS // 2].float().mean() for task in range(3)]
    torch.testing.assert_close(metrics.matrix[2], torch.stack(accuracies))
    assert exits.figures["accuracy"] == pytest.approx(float(metrics.matrix[2].mean()))


def test_a_loaded_module_has_the_correction(tmp_path):
    exits = EarlyExits(LAYERS, "joint", correction="tlc", threshold=0.4, print_table=False)
    trainer, module = _fit(exits)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    correction, classes = exits.record.correction
    logits = correction.apply(_raw_logits(exits, module, IMAGES), classes)
    taken = first_confident(confidence_of(logits), 0.4)
    with torch.no_grad():
        answers = lightning_cl.load(tmp_path / "last.ckpt", Deep)(IMAGES)
    torch.testing.assert_close(answers, logits[torch.arange(len(taken)), taken], atol=1e-5, rtol=1e-5)


def test_one_task_has_no_correction():
    exits = EarlyExits(LAYERS, "joint", correction="tlc", print_table=False)
    trainer = quiet_trainer(callbacks=[exits], max_epochs=2)
    trainer.fit(Deep(), datamodule=ClassIncremental(DigitsData(), num_tasks=1))
    assert exits.record.correction[0] == (0, 0)


def test_tasks_that_share_classes_cannot_be_corrected():
    exits = EarlyExits(LAYERS, "joint", correction="tlc")
    trainer = quiet_trainer(callbacks=[exits])
    with pytest.raises(MisconfigurationException, match=r"`correction='tlc'` .*share classes"):
        trainer.fit(Deep(), datamodule=DomainIncremental(DigitsData(), [None, torch.Tensor.neg]))
