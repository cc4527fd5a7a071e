"""Phases of exits that early stopping ends: what is trained in which epoch, and how such a run is resumed."""

from functools import lru_cache

import pytest
import torch.nn.functional as F
from command_line import OPTIONS
from exit_streams import LAYERS, Deep, Weights
from exit_streams import fit_exits as _fit
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from numbered_streams import Judge, SaveAfterSteps, same, same_weights

from lightning_cl.callbacks import EarlyExits, Replay, TaskEarlyStopping
from lightning_cl.cli import main

REGIMES = ["mixed", "disjoint"]


class LogsItsLoss(Deep):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[1]))


class Scores(Callback):
    """Logs a made-up score after each epoch."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", float(next(self.scores)))


class Phases(Callback):
    """Writes down the phase of each epoch by its first letter, attempt by attempt."""

    def __init__(self):
        self.tasks = []

    def on_train_epoch_end(self, trainer, pl_module):
        (exits,) = [callback for callback in trainer.callbacks if isinstance(callback, EarlyExits)]
        if exits.fit.clock.progress.epochs == 0:
            self.tasks.append("")
        self.tasks[-1] += exits.fit.training.phase[0]


def _stops_at_every_second_epoch():
    """No loss improves by so much, so that each phase has one epoch more than the patience."""
    return EarlyStopping("val_loss", patience=1, min_delta=1000)


def _stopped_twice(regime, others=(), **settings):
    exits = EarlyExits(LAYERS, regime, threshold=0.6, print_table=False)
    callbacks = [Replay(20), _stops_at_every_second_epoch(), *others]
    return _fit(exits=exits, module=LogsItsLoss, others=callbacks, max_epochs=6, limit_val_batches=1.0, **settings)


def _phases_by(scores, exits, **settings):
    phases = Phases()
    others = [TaskEarlyStopping("score", mode="max", patience=1), Scores(scores), phases]
    settings = {"max_epochs": 6, "limit_val_batches": 1, "stream": {"num_tasks": 2}, **settings}
    _fit(exits=exits, others=others, **settings)
    return phases.tasks


@pytest.mark.parametrize("regime", REGIMES)
def test_early_stopping_ends_the_networks_phase_and_then_the_task(regime):
    weights = Weights()
    _, trainer, _ = _stopped_twice(regime, [weights])
    assert trainer.current_epoch == len(weights.heads) == 3 * 4
    for task in range(3):
        for epoch in range(4 * task + 1, 4 * task + 4):
            heads_phase = epoch % 4 >= 2
            assert same(weights.heads[epoch], weights.heads[epoch - 1]) != heads_phase
            stands_still = heads_phase and regime == "disjoint"
            assert same(weights.network[epoch], weights.network[epoch - 1]) == stands_still
        if task > 0:  # it begins with the network's phase
            assert same(weights.heads[4 * task], weights.heads[4 * task - 1])
            assert not same(weights.network[4 * task], weights.network[4 * task - 1])


def test_a_phase_that_is_not_stopped_ends_by_its_epochs():
    assert _phases_by(range(20), EarlyExits(LAYERS, "mixed")) == ["nnnaaa"] * 2
    assert _phases_by(range(20), EarlyExits(LAYERS, "disjoint", phase_epochs=[4, 2])) == ["nnnnhh"] * 2


def test_a_phase_that_ends_by_its_epochs_begins_with_fresh_patience():
    scores = [5, 6, 1, 2, 3, 2, 8, 9, 5, 4]
    assert _phases_by(scores, EarlyExits(LAYERS, "mixed", phase_epochs=[2, 5]), max_epochs=7) == ["nnaaaa", "nnaa"]


def test_the_second_phase_may_have_all_epochs_that_the_first_left():
    scores = [2, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    exits = EarlyExits(LAYERS, "disjoint", phase_epochs=[4, 2])
    assert _phases_by(scores, exits) == ["nnhhhh", "nnnnhh"]


def test_no_phase_is_stopped_before_min_epochs():
    exits = EarlyExits(LAYERS, "mixed", phase_epochs=[4, 2])
    assert _phases_by([5, 4, 3, 2, 1] * 2, exits, min_epochs=3) == ["nnnaa"] * 2


def test_joint_training_is_over_when_it_is_stopped():
    assert _phases_by([2, 1, 2, 1], EarlyExits(LAYERS, "joint")) == ["aa", "aa"]


@pytest.mark.parametrize(("attempts", "num_tasks"), [([1], 2), (None, 3)], ids=["trained again", "skipped"])
def test_a_task_that_was_undone_leaves_no_phase_behind(attempts, num_tasks):
    phases = Phases()
    scores = [2, 1, 2, 1] + [1, 2, 3, 2, 1] * 2
    others = [TaskEarlyStopping("score", mode="max", patience=1), Scores(scores), phases, Judge(1, attempts)]
    exits = EarlyExits(LAYERS, "mixed", print_table=False)
    _fit(exits=exits, others=others, max_epochs=6, limit_val_batches=1, stream={"num_tasks": num_tasks})
    assert phases.tasks == ["nnaa", "nnnaa", "nnnaa"]


# ------------------------------------------------------------------ resume

STEPS = [2, 5, 8, 11, 17]  # in each phase of the first task, of 3 steps an epoch, and in the second task


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @lru_cache
    def run(regime):
        folder = tmp_path_factory.mktemp("phases")
        keeper = ModelCheckpoint(folder, "end-{epoch}", save_top_k=-1)
        return *_stopped_twice(regime, [SaveAfterSteps(folder, STEPS), keeper], enable_checkpointing=True), folder

    return run


@pytest.mark.parametrize(
    "place",
    [
        "end-epoch=1",
        8,
        *(pytest.param(p, marks=pytest.mark.slow) for p in (2, 5, 11, 17, *(f"end-epoch={e}" for e in (0, 2, 3, 5)))),
    ],
)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_resumed_run_ends_the_same_to_the_bit(regime, place, saved):
    """Epoch 1 is the one with which the first phase ends."""
    exits, trainer, module, folder = saved(regime)
    resumed, other, again = _stopped_twice(regime, ckpt_path=folder / f"{place}.ckpt")
    assert same_weights(module, again)
    assert same(exits.state_dict(), resumed.state_dict())
    assert trainer.current_epoch == other.current_epoch == 12


# ------------------------------------------------------------------ on the command line


@pytest.mark.usefixtures("_elsewhere")
def test_a_configuration_file_may_have_early_stopping_and_phases(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "trainer:\n"
        "  max_epochs: 5\n"
        "  limit_train_batches: 1\n"
        "  logger: false\n"
        "  enable_checkpointing: false\n"
        "  callbacks:\n"
        "    - class_path: TaskEarlyStopping\n"
        "      init_args: {monitor: val_loss, patience: 1, min_delta: 1000}\n"
        "    - class_path: EarlyExits\n"
        "      init_args: {layers: [model.body.1], regime: disjoint, phase_epochs: [2, 3], print_table: false}\n"
    )
    options = [option for option in OPTIONS if "max_epochs" not in option]
    cli = main(["fit", "--config", str(tmp_path / "run.yaml"), *options, "--data.num_tasks=2"])
    assert cli.trainer.current_epoch == 2 * 4
    (exits,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, EarlyExits)]
    assert exits.figures
