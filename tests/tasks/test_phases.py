"""Phases of a task: who is asked for another one, when, and what early stopping makes of it."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lightning_cl.callbacks import TaskEarlyStopping
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import DigitsData, Plain, quiet_trainer


class Phases(ContinualCallback):
    """Has so many phases in each task; notes the epochs after which it was asked, and whether they were stopped."""

    def __init__(self, phases=2):
        self.phases, self.left, self.asked = phases, 0, []

    def on_task_start(self, trainer, pl_module, task):
        self.left = self.phases - 1

    def goes_on(self, trainer, stopped):
        return stopped

    def next_phase(self, trainer, pl_module, task, stopped):
        self.asked.append((task.index, trainer.current_epoch, stopped))
        begins = self.left > 0 and self.goes_on(trainer, stopped)
        self.left -= begins
        return begins


class Watches(Phases):
    observer = True


class Others(Phases):
    """Another behaviour with phases."""


class EveryThirdEpoch(Phases):
    """Changes its phase by itself."""

    def goes_on(self, trainer, stopped):
        return (trainer.current_epoch + 1) % 3 == 0


class Scores(Callback):
    """Logs a made-up score after each epoch."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", float(next(self.scores)))


class Epochs(ContinualCallback):
    """Counts the fit's epochs at each task end."""

    observer = True

    def __init__(self):
        self.ends = []

    def on_task_end(self, trainer, pl_module, task):
        self.ends.append(trainer.current_epoch + 1)


def _task_ends(phases, scores, stopping=TaskEarlyStopping, data=None, **settings):
    epochs = Epochs()
    callbacks = [Scores(scores), stopping("score", mode="max", patience=1), *phases, epochs]
    data = data or ClassIncremental(DigitsData(), num_tasks=2)
    quiet_trainer(callbacks=callbacks, **{"max_epochs": 6, **settings}).fit(Plain(), datamodule=data)
    return epochs.ends


@pytest.mark.parametrize("stopping", [TaskEarlyStopping, EarlyStopping])
def test_a_stop_begins_the_next_phase_and_ends_the_task_after_the_last(stopping):
    phases = Phases(2)
    # each phase starts lower than the one before ended, and is given its own patience
    assert _task_ends([phases], [5, 6, 5, 1, 2, 1, 1, 0, 0, 0], stopping) == [6, 10]
    stops = [(task, epoch) for task, epoch, stopped in phases.asked if stopped]
    assert stops == [(0, 2), (1, 7), (1, 9)]  # the first task's second phase ended with its last epoch
    assert (0, 5) not in [(task, epoch) for task, epoch, _ in phases.asked]


def test_an_ordinary_fit_has_phases_too():
    assert _task_ends([Phases(3)], [3, 2, 2, 1, 1, 0], data=DigitsData(), max_epochs=9) == [6]


def test_a_fit_that_is_told_to_stop_has_no_other_phase():
    class Stops(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    phases = Phases(3)
    assert _task_ends([phases, Stops()], range(9), data=DigitsData()) == [2]
    assert phases.asked == [(0, 0, False)]


def test_a_phase_does_not_outlast_the_task():
    assert _task_ends([Phases(9)], [2, 1] * 5, max_epochs=5) == [5, 10]


def test_a_phase_that_ends_by_itself_begins_with_fresh_patience():
    scores = [5, 6, 7, 1, 2, 1, 7, 8, 9, 1, 2, 1]
    assert _task_ends([EveryThirdEpoch()], scores, max_epochs=7) == [6, 12]


def test_no_phase_is_stopped_before_min_epochs():
    assert _task_ends([Phases(2)], [5, 4, 3, 2, 1, 0] * 2, min_epochs=3) == [5, 10]


def test_behaviours_are_all_asked_and_observers_are_not():
    behaviours, watches = [Phases(2), Others(2)], Watches(9)
    assert _task_ends([watches, *behaviours], [2, 1] * 4) == [4, 8]
    assert behaviours[0].asked == behaviours[1].asked
    assert len(behaviours[0].asked) == 8
    assert watches.asked == []
