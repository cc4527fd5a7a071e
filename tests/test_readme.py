"""What README tells people to type works as it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run the first command of README, after its `pip install`."""
    directory = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", directory / "configs")
    install, _, fit = _blocks("bash")[0].splitlines()[0].partition(" && ")
    assert install == "pip install ."
    program, *options = fit.split()
    assert program == "lightning-cl"
    return directory, _run(sys.executable, "-m", "lightning_cl", *options, cwd=directory)


def test_readme_begins_with_the_two_commands() -> None:
    assert _blocks("bash")[0].splitlines() == [
        "pip install . && lightning-cl fit --config configs/split_digits.yaml",
        'pip install ".[test]" && pytest',
    ]


def test_first_command_runs_without_a_warning(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, process = first_run
    assert (process.returncode, process.stderr) == (0, "")
    assert "Warning" not in process.stdout


def test_first_command_shows_the_accuracy_matrix_and_where_it_is_written(
    first_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, process = first_run
    run = directory / "runs" / "split_digits" / "version_0"
    assert "average accuracy" in process.stdout.lower()
    assert (run / "results.json").is_file()
    assert (run / "accuracy_matrix.csv").is_file()
    assert len(list(run.glob("*.png"))) >= 1
    written = process.stdout.replace("\n", "")
    for name in ("results.json", "accuracy_matrix.csv", ".png"):
        assert name in written


def test_python_blocks_run_one_after_another(tmp_path: Path) -> None:
    blocks = _blocks("python")
    assert "ClassIncremental" in blocks[0]
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    process = _run(sys.executable, "readme.py", cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def _commands(block: str) -> list[list[str]]:
    return [
        shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines() if line.startswith("lightning-cl")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", _blocks("bash")[1:], ids=["own", "processes", "resume", "more_tasks"])
def test_other_commands_run(block: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "my_module.py").write_text(_blocks("python")[1].partition("\ntrainer = ")[0])
    commands = [options for options in _commands(block) if not _needs_more_than_this_machine(options)]
    assert commands
    if "version_0" in " ".join(commands[0]):
        commands.insert(0, ["fit", "--config", "configs/split_digits.yaml"])
    for options in commands:
        process = _run(sys.executable, "-m", "lightning_cl", *options, cwd=tmp_path)
        assert process.returncode == 0, process.stderr


def _needs_more_than_this_machine(options: list[str]) -> bool:
    return "--trainer.devices" in options


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http|#)[^)#]+)", README))
def test_links_lead_to_files(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/\w+\.yaml", README))))
def test_configs_that_are_named_exist(path: str) -> None:
    assert (ROOT / path).is_file()
