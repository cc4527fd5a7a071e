"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_cl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PRIVATE_LIGHTNING_NAME = re.compile(
    r"\b(?:trainer|strategy|connector|fit_loop|epoch_loop|val_loop|optimizer_loop|precision_plugin)\._[a-z]\w*"
)
ROOMS = {
    "cli": 4,
    "__main__": 4,
    "loading": 4,
    "callbacks": 3,
    "datamodules": 3,
    "models": 3,
    "reporting": 3,
    "exits": 2,
    "tasks": 2,
    "taps": 2,
    "memory": 1,
    "heads": 1,
    "metrics": 1,
    "arguments": 1,
    "hashing": 1,
    "corruptions": 1,
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("link", ["callbacks", "datamodules"])
def test_links_at_the_root_lead_into_the_package(link: str) -> None:
    target = os.readlink(ROOT / link)
    assert not os.path.isabs(target)
    assert (ROOT / target).resolve() == PACKAGE / link
    assert (ROOT / link / "__init__.py").is_file()


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=_name)
def test_file_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_function_has_at_most_60_lines(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    too_long = {f.name for f in functions if f.end_lineno is not None and f.end_lineno - f.lineno >= 60}
    # A docstring is no code: what it takes does not count.
    assert {f.name for f in functions if f.name in too_long and _code_lines(f) > 60} == set()


def _code_lines(function: ast.FunctionDef) -> int:
    first = function.body[1] if ast.get_docstring(function) is not None and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "compat.py"], ids=_name)
def test_private_lightning_names_stand_in_compat_only(path: Path) -> None:
    assert PRIVATE_LIGHTNING_NAME.findall(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_package_neither_prints_nor_asserts(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_follow_the_arrows_between_the_rooms(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return
    for name in _imports(path):
        if name.startswith("lightning_cl.") and name != "lightning_cl.__version__":
            assert ROOMS[name.split(".")[1]] <= ROOMS[room], name
        if ROOMS[room] == 1:
            assert not name.startswith("lightning.pytorch"), name


@pytest.mark.parametrize("path", sorted((PACKAGE / "callbacks").glob("*.py")), ids=_name)
def test_callbacks_do_not_import_each_other(path: Path) -> None:
    if path.name != "__init__.py":
        assert [name for name in _imports(path) if name.startswith("lightning_cl.callbacks")] == []


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").glob("*"), *ROOT.glob("*.md")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "pyproject.toml"]
    absolute = re.compile(r"(?<![\w.])/(?:" + "|".join(["home", "root", "work", "opt", "Users"]) + r")/\w")
    assert {_name(path) for path in files if absolute.search(path.read_text())} == set()
