"""Each exit is measured beside what the network answers, in the same pass through the network."""

import copy
import csv
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from command_line import OPTIONS
from exit_streams import LAYERS, Deep
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nearest_means import Photographs
from numbered_streams import fit_stream, same, same_weights
from probed_streams import SIZE, Snapshots, assert_same_curve, probes_of

from lightning_cl.callbacks import EarlyExits, NearestMeanClassifier, Replay, StabilityGapTracker
from lightning_cl.cli import main
from lightning_cl.reporting.stability import stability_figure
from tests.modules import DigitsData

REGIMES = ["joint", "mixed", "disjoint"]
THRESHOLD = 0.3


def _exits(regime="joint", **options):
    return EarlyExits(LAYERS, regime, **{"threshold": THRESHOLD, "print_table": False, **options})


def _fit(exits=None, others=(), options=None, module=Deep, **settings):
    tracker = StabilityGapTracker(**{"probe_size": SIZE, "exits": True, **(options or {})})
    exits = [exits or _exits()]
    trainer, module = fit_stream(
        [Replay(20), tracker, *others, *exits], module, DigitsData(), **{"max_epochs": 2, **settings}
    )
    return tracker, trainer, module


# ------------------------------------------------------------------ by hand


def _logits_by_hand(exits, state, images):
    """What each exit says, of copies of network and heads that know nothing of each other."""
    network, heads = Deep(), copy.deepcopy(exits.network.heads)
    mine = {name: tensor for name, tensor in state.items() if not name.startswith("early_exits.")}
    network.load_state_dict(mine)
    heads.load_state_dict({name.removeprefix("early_exits."): state[name] for name in state.keys() - mine.keys()})
    network.eval()
    heads.eval()
    with torch.no_grad():
        first = network.net[:2](images)
        second = network.net[2:5](first.clone())
        return [heads.heads[0](first), heads.heads[1](second), network.net[5:](second)]


def _leaves(said, confidence):
    """Whether a sample leaves where its last logits were said."""
    if confidence == "patience":  # of 2 possible repeats 1 is enough
        return len(said) > 1 and said[-1].argmax() == said[-2].argmax()
    return float(said[-1].softmax(0).max()) > THRESHOLD


def _taken_by_hand(logits, row, confidence):
    for exit_ in range(len(logits) - 1):
        if _leaves([rows[row] for rows in logits[: exit_ + 1]], confidence):
            return exit_
    return len(logits) - 1


def _curve_by_hand(exits, snapshots, first_step):
    """The network's answer, and each exit's; before a step all samples go to the end."""
    rows = torch.full((len(snapshots.tasks), 4, 3), torch.nan)
    used = set()
    for row, (step, current) in enumerate(snapshots.tasks.items()):
        for task in range(current + 1):
            images, labels = probes_of(task)
            logits = _logits_by_hand(exits, snapshots.states[step], images)
            taken = [_taken_by_hand(logits, n, exits.confidence) if step > first_step else 2 for n in range(SIZE)]
            used.update(taken)
            answers = torch.stack([logits[exit_][n] for n, exit_ in enumerate(taken)])
            for head, answer in enumerate([answers, *logits]):
                rows[row, head, task] = (answer.argmax(1) == labels).float().mean()
    return rows, used


@pytest.mark.parametrize(
    ("regime", "confidence", "alone"),
    [("joint", "max_softmax", 0), ("joint", "patience", 0), ("mixed", "max_softmax", 3), ("disjoint", "patience", 3)],
)
def test_the_curve_is_that_of_an_evaluation_by_hand_after_each_step(regime, confidence, alone):
    """While the heads of the first task are not trained yet they are measured, and nobody leaves."""
    exits, snapshots = _exits(regime, confidence=confidence), Snapshots()
    tracker, _, _ = _fit(exits, [snapshots])
    expected, used = _curve_by_hand(exits, snapshots, first_step=alone)
    assert len(used) > 1
    assert len({tuple(part.flatten().nan_to_num(-1).tolist()) for part in expected.unbind(1)}) > 2
    assert_same_curve(tracker.curve.accuracies, expected)


def test_on_all_validation_samples_it_is_what_the_exits_measured_at_the_end():
    exits = _exits()
    tracker, _, _ = _fit(exits, options={"probe_size": 20})
    assert_same_curve(tracker.curve.accuracies[-1, 1:], exits.record.accuracies[2].T)
    assert float(tracker.curve.accuracies[-1, 0].mean()) == pytest.approx(exits.figures["accuracy"])


class Later(Deep):
    """Changes its mind after the classification layer."""

    def forward(self, images):
        return super().forward(images).roll(1, dims=1)


ANSWERS = {
    "threshold": lambda: (_exits(), []),
    "chosen threshold, correction": lambda: (_exits("mixed", threshold="auto:5pp", correction="tlc"), []),
    "ensemble": lambda: (_exits(ensemble="geometric"), []),
    "ensemble, to the end": lambda: (_exits(ensemble="geometric", threshold=1.0), []),
    "nearest means": lambda: (_exits(exit_classifier="nearest_mean"), []),
    "another head": lambda: (_exits(threshold=None), [NearestMeanClassifier()]),
}


@pytest.mark.parametrize("module", [Deep, Later])
@pytest.mark.parametrize("name", ANSWERS)
def test_what_the_network_answers_is_measured_as_without_the_exits(name, module):
    curves = []
    for exits in (True, False):
        early_exits, others = ANSWERS[name]()
        tracker, _, _ = _fit(early_exits, others, {"exits": exits}, module)
        curves.append(tracker.curve)
    assert curves[0].accuracies.shape == (18, 4, 3)
    assert torch.equal(curves[0].recency[:, :1].nan_to_num(9), curves[1].recency.nan_to_num(9))
    assert_same_curve(curves[0].accuracies[:, :1], curves[1].accuracies)


# ------------------------------------------------------------------ invariants


@pytest.mark.parametrize("regime", REGIMES)
def test_the_run_is_the_same_to_the_bit_without_it(regime):
    ends = []
    for callbacks in ([], [StabilityGapTracker(probe_size=SIZE, tasks="all", exits=True)]):
        exits, photographs = _exits(regime, threshold="auto:5pp", correction="tlc"), Photographs()
        _, module = fit_stream([Replay(20), exits, *callbacks, photographs], Deep, DigitsData(), max_epochs=2)
        ends.append([photographs.steps, photographs.end, dict(module.state_dict()), exits.state_dict()])
    assert same(*ends)


STEPS = [2, 4, 10, 12]


class SaveAfterSteps(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step in STEPS:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def _trained(regime, others=(), **settings):
    return _fit(_exits(regime, threshold="auto:5pp", correction="tlc"), others, **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @lru_cache
    def run(regime):
        folder = tmp_path_factory.mktemp("run")
        return *_trained(regime, [SaveAfterSteps(folder)]), folder

    return run


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_resumed_run_has_the_curve_of_the_uninterrupted_one(regime, step, saved):
    tracker, _, module, folder = saved(regime)
    resumed, _, again = _trained(regime, ckpt_path=folder / f"{step}.ckpt")
    assert tracker.curve.length == 18
    assert same(resumed.curve.state_dict(), tracker.curve.state_dict())
    assert list(resumed.figures) == list(tracker.figures)
    assert same_weights(again, module)


def test_callbacks_in_any_order_give_the_same_curve():
    curves = []
    for turn in (1, -1):
        tracker = StabilityGapTracker(probe_size=SIZE, exits=True)
        fit_stream([Replay(20), _exits(), tracker][::turn], Deep, DigitsData())
        curves.append(tracker.curve.state_dict())
    assert same(*curves)


# ------------------------------------------------------------------ what is left of it

PREFIXES = ["", "exit_1_", "exit_2_", "end_"]


def test_files_and_logs_have_all_exits_by_name(tmp_path):
    logger = CSVLogger(tmp_path, version=0)
    tracker, trainer, _ = _fit(logger=logger, max_epochs=1)
    folder = Path(trainer.log_dir)
    with open(folder / "stability_gap.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for head, prefix in enumerate(PREFIXES):
        column = [float(row[f"{prefix}acc_task_0"]) for row in rows]
        assert column == pytest.approx(tracker.curve.accuracies[:, head, 0].tolist())
    assert len(rows[0]) == 3 + 4 * len(PREFIXES)
    figures = json.loads((folder / "stability_gap.json").read_text())
    assert figures == pytest.approx(tracker.figures)
    names = [name for name in figures if not name.startswith(tuple(PREFIXES[1:]))]
    assert list(figures) == [prefix + name for prefix in PREFIXES for name in names]
    assert (folder / "stability_gap.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "metrics.csv", newline="") as file:
        logged = next(csv.reader(file))
    for prefix in PREFIXES:
        assert f"{prefix}probe_acc/task_2" in logged
        assert f"stability/{prefix}gap" in logged


def test_the_picture_has_a_row_for_each_exit():
    tracker, _, _ = _fit(max_epochs=1)
    figure = stability_figure(tracker.curve, ["a", "b", "c"], tracker._heads)
    assert [ax.get_title() for ax in figure.axes] == ["network", "exit 1", "exit 2", "end"]


@pytest.mark.slow
@pytest.mark.usefixtures("_elsewhere")
def test_a_config_asks_for_it():
    tracker = "{class_path: StabilityGapTracker, init_args: {exits: true, probe_size: 16, every_n_steps: 50}}"
    early_exits = "{class_path: EarlyExits, init_args: {layers: [model.body.1], regime: joint}}"
    Path("run.yaml").write_text(f"trainer:\n  callbacks: [{tracker}, {early_exits}]\n")
    options = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--data.val_fraction=0.2"]
    cli = main(["fit", *OPTIONS, *options, "--config=run.yaml"])
    (tracked,) = [c for c in cli.trainer.callbacks if isinstance(c, StabilityGapTracker)]
    assert {"gap", "exit_1_gap", "end_gap"} <= set(tracked.figures)


# ------------------------------------------------------------------ what goes wrong


def _refused(match, callbacks, **settings):
    class NeverTrained(Deep):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training had begun")

    with pytest.raises(MisconfigurationException, match=match):
        fit_stream(callbacks, NeverTrained, DigitsData(), **settings)


def test_exits_of_a_network_without_any():
    tracker = StabilityGapTracker(probe_size=SIZE, exits=True)
    _refused(r"`exits=True` .*there are none.*`EarlyExits\(\.\.\.\)`", [Replay(20), tracker])


def test_exits_and_a_second_head_at_once():
    tracker = StabilityGapTracker(probe_size=SIZE, exits=True, compare_heads=True)
    _refused(
        "`exits=True` .*`compare_heads=True`", [Replay(20), NearestMeanClassifier(), _exits(threshold=None), tracker]
    )


@pytest.mark.parametrize("saved_with", [True, False])
def test_resuming_with_other_heads_is_refused(saved_with, tmp_path):
    def callbacks(exits):
        return [Replay(20), _exits(), StabilityGapTracker(probe_size=SIZE, exits=exits)]

    fit_stream([*callbacks(saved_with), SaveAfterSteps(tmp_path)], Deep, DigitsData())
    match = "`exits=True` and 2 exits.*`compare_heads=False`" if saved_with else "False`.*`exits=True` and 2 exits"
    _refused(match, callbacks(not saved_with), ckpt_path=tmp_path / "4.ckpt")
