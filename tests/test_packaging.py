"""The wheel: what is in it, and that it runs in an environment that has nothing else of this checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The checkout must not be what is imported.
    environment.pop("PYTHONPATH", None)
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build with the backend itself, as `pip wheel` would, but with what is installed here: no network is needed."""
    directory = tmp_path_factory.mktemp("dist")
    process = _run(sys.executable, "-m", "hatchling", "build", "-d", directory, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return directory


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an empty environment with the wheel, which finds the dependencies where this test's Python has them."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    scripts = directory / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    purelib = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
    site_packages = Path(purelib.stdout.strip())
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Behind the wheel's own folder in `sys.path`: an installed lightning-cl of this Python does not come first.
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    process = _run(*install, "--ignore-installed", "--disable-pip-version-check", wheel, cwd=directory)
    assert process.returncode == 0, process.stderr
    return python


def test_wheel_holds_the_package_once_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"lightning_cl"}
    assert len(names) == len(set(names))


def test_wheel_tells_type_checkers_that_it_is_typed(wheel: Path) -> None:
    assert "lightning_cl/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_wheel_carries_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    licence = next(name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert "Apache License" in archive.read(licence).decode()


def test_source_distribution_has_configs_and_tests_and_no_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {"README.md", "LICENSE", "pyproject.toml", "configs/split_digits.yaml", "tests/test_packaging.py"} <= names
    assert not [name for name in names if name.startswith(("callbacks", "datamodules"))]
    assert not [member.name for member in members if member.issym()]


def test_wheel_imports_from_anywhere(python: Path, tmp_path: Path) -> None:
    process = _run(python, "-c", "import lightning_cl; print(lightning_cl.__file__)", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert Path(process.stdout.strip()).is_relative_to(python.parent.parent)


def test_console_script_of_the_wheel_trains_the_digits(python: Path, tmp_path: Path) -> None:
    config = ROOT / "configs" / "split_digits.yaml"
    script = python.with_name("lightning-cl")
    process = _run(script, "fit", "--config", config, "--trainer.max_epochs=1", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "runs" / "split_digits" / "version_0" / "results.json").is_file()
