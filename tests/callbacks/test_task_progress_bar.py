import io
import pickle
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger
from rich import get_console

from lightning_cl.callbacks.task_progress_bar import TaskProgressBar


class Stream(BoringDataModule):
    """Two tasks of two epochs, as a sequence shows them."""

    num_tasks = 2
    task_epochs = 2

    @property
    def task_epoch(self):
        return self.trainer.current_epoch % 2

    @property
    def current_task(self):
        index = self.trainer.current_epoch // 2
        return SimpleNamespace(index=index, name=f"task_{index}")


class PrintsAtTheEnd(Callback):
    def on_fit_end(self, trainer, pl_module):
        get_console().print("the table")


class LogsToTheBar(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("train_loss", 1.0, prog_bar=True)
        return super().training_step(batch, batch_idx)


def _fit(
    tmp_path, bar_class=TaskProgressBar, datamodule=None, width=120, terminal=False, max_epochs=4, ckpt_path=None, **bar
):
    """Run a short stream and return what it wrote to the console."""
    output = io.StringIO()
    console = {"file": output, "force_terminal": terminal, "width": width, "color_system": None}
    trainer = Trainer(
        max_epochs=max_epochs,
        limit_train_batches=3,
        limit_val_batches=2,
        callbacks=[bar_class(console_kwargs=console, **bar), PrintsAtTheEnd()],
        logger=CSVLogger(tmp_path, version=7),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(LogsToTheBar(), datamodule=datamodule or Stream(), ckpt_path=ckpt_path)
    return trainer, output.getvalue()


def _epochs(text):
    """The names of the epochs in the order of their first showing."""
    return list(dict.fromkeys(re.findall(r"(?:Task \d+/\d+ · )?Epoch \d+(?:/-?\d+)?", text)))


@pytest.mark.parametrize("leave", [False, True])
def test_the_live_bar_names_task_and_epoch_and_nothing_else(tmp_path, leave):
    _, text = _fit(tmp_path, terminal=True, leave=leave)
    assert _epochs(text) == [
        "Task 1/2 · Epoch 1/2",
        "Task 1/2 · Epoch 2/2",
        "Task 2/2 · Epoch 1/2",
        "Task 2/2 · Epoch 2/2",
    ]


def test_a_finished_bar_that_stays_keeps_its_name(tmp_path):
    _, text = _fit(tmp_path, leave=True)
    bars = [line for line in text.splitlines() if "Epoch" in line]
    assert [line[:20] for line in bars] == [
        "Task 1/2 · Epoch 1/2",
        "Task 1/2 · Epoch 2/2",
        "Task 2/2 · Epoch 1/2",
        "Task 2/2 · Epoch 2/2",
    ]
    assert all("3/3" in line for line in bars)


def test_a_task_without_a_planned_end_shows_no_number_of_epochs(tmp_path):
    datamodule = Stream()
    datamodule.task_epochs = -1
    _, text = _fit(tmp_path, datamodule=datamodule)
    assert _epochs(text) == ["Task 2/2 · Epoch 2"]


def test_written_to_a_pipe_the_fit_leaves_one_line_and_no_empty_one(tmp_path):
    _, text = _fit(tmp_path)
    bar, *rest = text.splitlines()
    assert bar.startswith("Task 2/2 · Epoch 2/2 ━")
    assert "3/3" in bar
    assert "train_loss: 1.000" in bar
    assert rest == ["the table"]


def test_the_bar_keeps_to_one_line_of_eighty_columns(tmp_path):
    _, text = _fit(tmp_path, width=80)
    assert len(text.splitlines()) == 2


def test_what_is_printed_at_the_end_of_the_fit_stands_below_the_bar(tmp_path):
    _, text = _fit(tmp_path, terminal=True)
    assert text.rindex("Epoch") < text.index("the table")


def test_the_version_of_the_run_leaves_its_room_to_the_metrics(tmp_path):
    _, text = _fit(tmp_path)
    assert "v_num" not in text


def test_without_a_stream_it_is_lightnings_own_bar(tmp_path):
    _, ours = _fit(tmp_path, datamodule=BoringDataModule())
    _, lightnings = _fit(tmp_path, RichProgressBar, datamodule=BoringDataModule())

    def without_times(text):
        bar = next(line for line in text.splitlines() if "Epoch" in line)
        return re.sub(r"[\d.]+it/s|\d:\d\d:\d\d|\s+", " ", bar).split()

    assert without_times(ours) == without_times(lightnings)
    assert _epochs(ours) == ["Epoch 3/3"]
    assert "v_num" in ours


def test_an_epoch_resumed_in_its_middle_is_named_too(tmp_path):
    class SavesInTheMiddle(LogsToTheBar):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.current_epoch == 2 and batch_idx == 0:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    trainer, _ = _fit(tmp_path)
    trainer = Trainer(
        max_epochs=4,
        limit_train_batches=3,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(SavesInTheMiddle(), datamodule=Stream())
    _, text = _fit(tmp_path, terminal=True, ckpt_path=tmp_path / "middle.ckpt")
    assert _epochs(text) == ["Task 2/2 · Epoch 1/2", "Task 2/2 · Epoch 2/2"]


def test_the_bar_works_again_after_the_fit(tmp_path):
    trainer, _ = _fit(tmp_path, max_epochs=1)
    output = get_console().file
    trainer.validate(LogsToTheBar(), datamodule=Stream(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(LogsToTheBar(), datamodule=Stream())
    starts = [line.split(" ━")[0].strip() for line in output.getvalue().splitlines()]
    assert starts == [
        "Task 1/2 · Epoch 1/2",
        "the table",
        "Validation",
        "Task 1/2 · Epoch 2/2",
        "the table",
    ]


def test_a_fit_that_fails_stops_the_bar(tmp_path):
    class Fails(LogsToTheBar):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    output = io.StringIO()
    bar = TaskProgressBar(console_kwargs={"file": output, "force_terminal": True})
    trainer = Trainer(max_epochs=2, callbacks=[bar], accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Fails(), datamodule=Stream())
    assert bar.progress is None or not bar.progress.live.is_started


def test_a_bar_that_is_switched_off_writes_nothing(tmp_path):
    _, text = _fit(tmp_path, refresh_rate=0)
    assert "Epoch" not in text


def test_the_bar_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(TaskProgressBar(leave=True))).refresh_rate == 100
