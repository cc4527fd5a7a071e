"""Long work inside a fit is shown on the fit's own progress bar, if it has one."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_cl.reporting.progress import show_progress
from tests.modules import DigitsData, Plain, quiet_trainer


class Works(Callback):
    """Works at the end of an epoch, and notes the lines of a Rich bar meanwhile and afterwards."""

    def __init__(self, breaks=False):
        self.breaks, self.items, self.lines, self.left = breaks, [], [], None

    def on_train_epoch_end(self, trainer, pl_module):
        bar = trainer.progress_bar_callback
        rich = bar.progress if isinstance(bar, RichProgressBar) else None
        try:
            for item in show_progress(trainer, range(3), "Work"):
                self.items.append(item)
                if rich is not None:
                    self.lines.append([(t.completed, t.total) for t in rich.tasks if t.description == "Work"])
                if self.breaks:
                    raise RuntimeError("broken")
        except RuntimeError:
            pass
        if rich is not None:
            self.left = [task.description for task in rich.tasks]


def _fit(work, *bars):
    trainer = quiet_trainer(callbacks=[work, *bars], max_epochs=1, enable_progress_bar=bool(bars), limit_val_batches=0)
    trainer.fit(Plain(), datamodule=DigitsData())
    return work


@pytest.mark.parametrize("bars", [[], [TQDMProgressBar()], [RichProgressBar()]], ids=["none", "tqdm", "rich"])
def test_all_is_worked_through(bars):
    assert _fit(Works(), *bars).items == [0, 1, 2]


def test_a_rich_bar_has_a_line_for_the_time_of_the_work():
    work = _fit(Works(), RichProgressBar())
    assert work.lines == [[(0, 3)], [(1, 3)], [(2, 3)]]
    assert "Work" not in work.left


def test_a_rich_bar_loses_the_line_when_the_work_breaks():
    work = _fit(Works(breaks=True), RichProgressBar())
    assert len(work.lines) == 1
    assert "Work" not in work.left


def test_a_tqdm_bar_is_shown_below_the_fits(capfd):
    _fit(Works(), TQDMProgressBar())
    shown = "".join(capfd.readouterr())
    assert "Work" in shown
    assert "/3" in shown


def test_without_a_bar_nothing_is_shown(capfd):
    _fit(Works())
    assert "Work" not in "".join(capfd.readouterr())


def test_a_bar_that_is_switched_off_shows_nothing(capfd):
    bar = TQDMProgressBar()
    bar.disable()
    _fit(Works(), bar)
    assert "Work" not in "".join(capfd.readouterr())
