"""What somebody sees who types `lightning-cl`."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_cl import __version__
from lightning_cl.cli import main

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ["--config", str(ROOT / "configs" / "split_digits.yaml"), "--trainer.accelerator=cpu"]
RUN = Path("runs", "split_digits")

USER_MODULE = """
import warnings

from lightning_cl.models import ImageClassifier


class MyClassifier(ImageClassifier):
    def __init__(self, width: int = 8, complaint: str = "") -> None:
        super().__init__("mlp", num_classes=10, input_shape=(1, 8, 8))
        self.complaint = complaint
        if width < 0:
            raise ValueError("my own check")

    def on_train_start(self) -> None:
        if self.complaint == "warn":
            warnings.warn("mind the gap")
        if self.complaint:
            raise ValueError(self.complaint)
"""


@pytest.fixture(autouse=True)
def _run_in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_module.py").write_text(USER_MODULE)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    return "my_module.MyClassifier"


def _fit(*options: str) -> LightningCLI:
    return main(["fit", *DIGITS, "--trainer.max_epochs=1", *options])


def _exit(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(options))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def _subprocess(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def test_short_names_of_the_suite_resolve(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "ImageClassifier", "--data", "ClassIncremental", "--data.base", "Digits"]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--data.num_tasks=5", "--trainer.callbacks+=TaskProgressBar", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"].startswith("lightning_cl.models")
    assert config["data"]["class_path"].startswith("lightning_cl.datamodules")
    assert config["data"]["init_args"]["base"]["class_path"].startswith("lightning_cl.datamodules")
    assert config["trainer"]["callbacks"][0]["class_path"].startswith("lightning_cl.callbacks")


def test_run_trains_every_task_and_gives_back_the_cli() -> None:
    cli = _fit()
    assert cli.trainer.current_epoch == cli.datamodule.num_tasks == 5
    assert (RUN / "version_0" / "results.json").is_file()


def test_saved_config_reruns_as_it_is_with_the_same_result() -> None:
    _fit()
    main(["fit", "--config", str(RUN / "version_0" / "config.yaml")])
    first, second = (RUN / version / "accuracy_matrix.csv" for version in ("version_0", "version_1"))
    assert first.read_text() == second.read_text()


def test_run_continues_from_its_last_checkpoint() -> None:
    _fit("--trainer.max_epochs=1")
    checkpoint = RUN / "version_0" / "checkpoints" / "last.ckpt"
    cli = _fit("--trainer.max_epochs=1", "--ckpt_path", str(checkpoint))
    assert cli.trainer.current_epoch == 5


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_take_the_trained_model(command: str) -> None:
    trained = _fit()
    checkpoint = RUN / "version_0" / "checkpoints" / "last.ckpt"
    cli = main([command, *DIGITS, "--ckpt_path", str(checkpoint)])
    for name, weight in trained.model.state_dict().items():
        assert weight.equal(cli.model.state_dict()[name]), name


def test_modules_of_the_working_directory_can_be_named(my_module: str) -> None:
    cli = _fit("--trainer.fast_dev_run=1", "--model", my_module)
    assert type(cli.model).__name__ == "MyClassifier"


def test_seed_is_zero_unless_another_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "ImageClassifier", "--data", "Digits", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", *options])
    assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] == 0


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-cl {__version__}\n"


def test_wrong_value_of_a_constructor_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    error = _exit(capsys, "fit", *DIGITS, "--data.num_tasks=0")
    assert error.startswith("error: `num_tasks")


def test_wrong_value_of_a_nested_constructor_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    error = _exit(capsys, "fit", *DIGITS, "--data.base.batch_size=0")
    assert error == "error: `batch_size` must be at least 1, got 0.\n"


def test_wrong_value_found_in_setup_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    error = _exit(capsys, "fit", *DIGITS, "--data.num_tasks=11")
    assert error.startswith("error: `num_tasks")


def test_wrong_combination_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    error = _exit(capsys, "fit", *DIGITS, "--trainer.devices=0")
    assert error.startswith("error: ")
    assert "devices" in error


def test_wrong_value_of_a_callback_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    error = _exit(capsys, "fit", *DIGITS, *stopping, "--trainer.callbacks.mode=middle")
    assert error.startswith("error: `mode`")


def test_missing_checkpoint_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    error = _exit(capsys, "fit", *DIGITS, "--ckpt_path=nowhere.ckpt")
    assert error == "error: Checkpoint file not found: nowhere.ckpt\n"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_checkpoint_is_one_message(content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    error = _exit(capsys, "fit", *DIGITS, f"--ckpt_path={tmp_path / 'last.ckpt'}")
    assert error.startswith("error: the checkpoint cannot be read")
    assert error.count("\n") == 1


def test_used_run_directory_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    _fit("--trainer.logger.version=0")
    capsys.readouterr()
    error = _exit(capsys, "fit", *DIGITS, "--trainer.logger.version=0")
    assert "config.yaml to NOT exist" in error


def test_unknown_option_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    error = _exit(capsys, "fit", *DIGITS, "--trainer.epochs=1")
    assert error.splitlines()[0] == "usage: lightning-cl fit [options]"
    assert error.splitlines()[-1] == "error: unrecognized arguments: --trainer.epochs=1"


@pytest.mark.parametrize(
    ("option", "typed", "meant"),
    [
        ("--model", "ImageClasifier", "ImageClassifier"),
        ("--data", "ClassIncrementl", "ClassIncremental"),
        ("--trainer.callbacks+", "ContinualMetric", "ContinualMetrics"),
    ],
)
def test_misspelt_class_is_answered_with_its_name(
    option: str, typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _exit(capsys, "fit", *DIGITS, f"{option}={typed}")
    last = error.splitlines()[-1]
    assert f"no class `{typed}` is known. Did you mean `{meant}`" in last
    assert f"`my_module.{typed}`" in last


def test_bug_in_a_users_module_keeps_its_traceback(my_module: str) -> None:
    with pytest.raises(ValueError, match=r"^my own mistake$"):
        _fit("--model", my_module, "--model.complaint=my own mistake")


def test_error_of_a_users_constructor_keeps_its_traceback(my_module: str) -> None:
    with pytest.raises(ValueError, match="my own check"):
        _fit("--model", my_module, "--model.width=-1")


def test_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="num_tasks"):
        _fit("--data.num_tasks=0")


def test_users_own_warning_is_seen(my_module: str) -> None:
    with pytest.warns(UserWarning, match="mind the gap"), pytest.raises(ValueError, match="warn"):
        _fit("--model", my_module, "--model.complaint=warn")


def test_filters_and_log_levels_are_put_back() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level, list(warnings.filters)
    _fit("--trainer.fast_dev_run=1")
    assert (logger.level, list(warnings.filters)) == before


def test_what_a_callback_was_asked_to_say_is_said(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    try:
        stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
        _fit(*stopping, "--trainer.callbacks.verbose=true")
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(caplog.handler)
    assert "Metric val_loss improved" in caplog.text


def test_python_dash_m_is_the_same_program() -> None:
    process = _subprocess("-m", "lightning_cl", "--version")
    assert (process.returncode, process.stdout, process.stderr) == (0, f"lightning-cl {__version__}\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "script"])
def test_two_processes_start_and_train_in_silence(how: str, tmp_path: Path) -> None:
    script = tmp_path / "lightning-cl"
    script.write_text("from lightning_cl.cli import run\n\nrun()\n")
    program = ["-m", "lightning_cl"] if how == "module" else [script.name]
    process = _subprocess(*program, "fit", *DIGITS, "--config", str(ROOT / "configs" / "ddp.yaml"))
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("results.json") == 1
    assert (RUN / "version_0" / "results.json").is_file()


@pytest.mark.slow
def test_error_in_two_processes_ends_both(tmp_path: Path) -> None:
    overlay = ["--config", str(ROOT / "configs" / "ddp.yaml")]
    process = _subprocess("-m", "lightning_cl", "fit", *DIGITS, *overlay, "--data.num_tasks=11")
    assert process.returncode == 2
    assert "error: `num_tasks" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_a_cli_of_ones_own_knows_the_suite_after_one_import(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import lightning_cl.cli\n"
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning_cl.models import ImageClassifier\n"
        "cli = LightningCLI(ImageClassifier, run=False)\n"
        "assert type(cli.datamodule).__name__ == 'ClassIncremental'\n"
        "assert type(cli.trainer.callbacks[0]).__name__ == 'TaskProgressBar'\n"
    )
    data = ["--data=ClassIncremental", "--data.base=Digits", "--data.num_tasks=5"]
    process = _subprocess("train.py", "--trainer.callbacks+=TaskProgressBar", *data)
    assert process.returncode == 0, process.stderr
