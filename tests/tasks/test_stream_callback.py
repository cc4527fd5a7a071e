"""What callbacks that read the samples of a stream have in common."""

import re

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.datamodules import ClassIncremental, Joint
from lightning_cl.tasks.stream_callback import StreamCallback
from tests.modules import DigitsData, Plain, quiet_trainer


class Looks(StreamCallback):
    """Takes hold of a stream, and notes what it sees of it."""

    def __init__(self, several=False, fails=False):
        self.several, self.fails, self.seen = several, fails, []

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.need_stream(trainer, "looks at tasks", self.several)

    def on_task_start(self, trainer, pl_module, task):
        self.seen.append((self.in_stream, self.clock.stream is self.stream, self.stream.current_task.index))
        if self.fails:
            raise ZeroDivisionError


def _fit(callback, data):
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(Plain(), datamodule=data)


def _knows_nothing(callback):
    for part in ("stream", "clock"):
        with pytest.raises(RuntimeError, match="Looks was asked outside a fit of a task sequence"):
            getattr(callback, part)
    return not callback.in_stream


def test_the_stream_is_held_during_a_fit_alone():
    callback = Looks()
    assert _knows_nothing(callback)
    _fit(callback, ClassIncremental(DigitsData(), num_tasks=2))
    assert callback.seen == [(True, True, 0), (True, True, 1)]
    assert _knows_nothing(callback)


def test_an_error_lets_go_of_the_stream():
    callback = Looks(fails=True)
    with pytest.raises(ZeroDivisionError):
        _fit(callback, ClassIncremental(DigitsData(), num_tasks=2))
    assert _knows_nothing(callback)


def test_a_fit_without_a_sequence_is_refused():
    message = (
        "Looks looks at tasks, and this fit has no tasks. Wrap your DataModule in a task sequence, such as"
        " `ClassIncremental(your_datamodule, num_tasks=5)`."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        _fit(Looks(), DigitsData())


def test_a_single_task_is_refused_where_several_are_compared():
    _fit(Looks(), Joint(DigitsData()))
    with pytest.raises(MisconfigurationException, match="this fit has no stream of several"):
        _fit(Looks(several=True), Joint(DigitsData()))
