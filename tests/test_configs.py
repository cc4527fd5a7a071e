"""Every experiment under configs/ is parsed, and run for a step of each task."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_cl.cli import main

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXPERIMENTS = [path for path in CONFIGS if path.stem != "ddp"]
DATA = Path(os.environ.get("LIGHTNING_CL_DATA", ROOT.parent / "shared" / "data"))
TEN_TASKS = {
    "adagauss_cub200",
    "adagauss_split_cifar100",
    "permuted_mnist",
    "split_cifar100",
    "er_split_cifar100",
    "ewc_split_cifar100",
    "lwf_split_cifar100",
    "lwm_split_cifar100",
    "nmc_split_cifar100",
    "nmc_cub200",
    "exits_resnet_cifar100",
    "slda_frozen",
}
LONG = {  # large networks, or many tasks
    "adagauss_cub200",
    "adagauss_split_cifar100",
    "derpp_split_cifar10",
    "er_split_cifar100",
    "ewc_split_cifar100",
    "exits_resnet_cifar100",
    "exits_split_fashion_mnist",
    "lwf_split_cifar100",
    "lwm_split_cifar100",
    "nmc_cub200",
    "nmc_split_cifar100",
    "slda_frozen",
    "split_cifar100",
    "split_cifar100_b50",
    "stp_bait_split_cifar100",
}
QUICK = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _run_in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def _narrow(path: Path) -> list[str]:
    """Fewer features than the samples of the tests' small batches, which the anti-collapse loss needs."""
    model = _config(path)["model"]["init_args"]
    if "bottleneck" not in model:
        return []
    quick = ["--model.init_args.backbone=resnet32"] if model["backbone"] == "resnet18_cifar" else []
    return ["--model.init_args.bottleneck=8", *quick]


def _config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def _write_arrays(directory: Path, num_classes: int, input_shape: list[int]) -> str:
    """Write a small set of a config's classes and shape, and give the DataModule that takes the place of its own."""
    rng = np.random.default_rng(0)
    files = {}
    for part, per_class in (("train", 4), ("test", 1)):
        labels = np.tile(np.arange(num_classes), per_class)
        images = rng.integers(0, 256, (len(labels), *input_shape), dtype=np.uint8)
        files[part] = str(directory / f"{part}.npz")
        np.savez(files[part], images=images, labels=labels)
    base = {"class_path": "ArrayData", "init_args": {**files, "layout": "nchw", "val_fraction": 0.25, "num_workers": 0}}
    return json.dumps(base)


def _base_of(path: Path) -> str:
    """Return the option that leads to a config's data."""
    poisoned = "sequence" in _config(path)["data"]["init_args"]
    return "--data.init_args.sequence.init_args.base" if poisoned else "--data.init_args.base"


def _trainings(path: Path) -> int:
    """Return how often a task of a config is trained, a calibration's repeats with it."""
    callbacks = {
        callback["class_path"]: callback.get("init_args", {}) for callback in _config(path)["trainer"]["callbacks"]
    }
    runs = callbacks["PoisonDetector"].get("calibration_runs", 5) if "PoisonDetector" in callbacks else 0
    return _tasks(path) + runs


def _tasks(path: Path) -> int:
    tasks = {"joint": 1, "split_cifar100_b50": 6, "stp_bait_split_cifar100": 6, **dict.fromkeys(TEN_TASKS, 10)}
    tasks |= {"stp_split_digits": 4, "stp_split_fashion_mnist": 4}
    return tasks.get(path.stem, tasks.get(path.stem.partition("_")[0], 5))


def _some(wanted: Callable[[str], bool]) -> list[Any]:
    """Return the experiments of some names; those that take long are left to the slow run."""
    chosen = [path for path in EXPERIMENTS if wanted(path.stem)]
    marks = {path: [pytest.mark.slow] if path.stem in LONG else [] for path in chosen}
    return [pytest.param(path, marks=marks[path], id=path.stem) for path in chosen]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_begins_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    options = re.findall(r"--config (\S+)", first)
    assert first.startswith("# lightning-cl fit --config configs/")
    assert options[-1] == f"configs/{path.name}"
    assert all((ROOT / option).is_file() for option in options)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("overlay", [[], ["--config", str(ROOT / "configs" / "ddp.yaml")]], ids=["alone", "with_ddp"])
def test_config_is_parsed(path: Path, overlay: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), *overlay, "--print_config"])
    assert stop.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["trainer"]["max_epochs"] == _config(path)["trainer"]["max_epochs"]
    assert parsed["trainer"]["strategy"] == ("ddp" if overlay else "auto")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_config_writes_into_a_directory_of_its_own_name(path: Path) -> None:
    logger = _config(path)["trainer"]["logger"]["init_args"]
    assert (logger["save_dir"], logger["name"]) == ("runs", path.stem)


@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if "digits" in p.stem], ids=lambda path: path.stem)
def test_digits_config_runs_as_it_is(path: Path) -> None:
    cli = main(["fit", "--config", str(path), *QUICK])
    assert cli.datamodule.num_tasks == _tasks(path)
    assert cli.trainer.global_step == _trainings(path)


@pytest.mark.parametrize("path", _some(lambda name: "digits" not in name))
def test_config_runs_on_arrays_of_its_shape(path: Path, tmp_path: Path) -> None:
    model = _config(path)["model"]["init_args"]
    arrays = _write_arrays(tmp_path, model["num_classes"], model.get("input_shape", [3, 32, 32]))
    untrained = ["--model.init_args.weights=null"] if "weights" in model else []
    cli = main(["fit", "--config", str(path), f"{_base_of(path)}={arrays}", *untrained, *_narrow(path), *QUICK])
    assert cli.datamodule.num_tasks == _tasks(path)
    assert cli.trainer.global_step == _trainings(path)


@pytest.mark.data
@pytest.mark.parametrize("path", _some(lambda name: "fashion" in name))
def test_fashion_mnist_config_runs_on_the_real_images(path: Path) -> None:
    _need(DATA / "FashionMNIST")
    base = f"{_base_of(path)}.init_args"
    cli = main(["fit", "--config", str(path), f"{base}.root={DATA}", f"{base}.download=false", *QUICK])
    assert cli.datamodule.num_classes == 10
    assert cli.trainer.global_step == _trainings(path)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if "cifar100" in p.stem], ids=lambda path: path.stem)
def test_cifar100_config_runs_on_the_real_images(path: Path) -> None:
    _need(DATA / "cifar100")
    train = sorted(str(file) for file in (DATA / "cifar100").glob("train-*.npz"))
    small = {"batch_size": 32, "eval_batch_size": 32}
    files = {"train": train, "test": str(DATA / "cifar100" / "test.npz")}
    base = {"class_path": "ArrayData", "init_args": {**files, **small}}
    cli = main(["fit", "--config", str(path), f"{_base_of(path)}={json.dumps(base)}", *_narrow(path), *QUICK])
    assert cli.datamodule.num_classes == 100
    assert cli.trainer.global_step == _trainings(path)


def test_config_without_its_data_says_where_it_looked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = ROOT / "configs" / "split_cifar10.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--data.init_args.base.init_args.download=false", *QUICK])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: `root`")
    assert str(tmp_path / "data") in message


def _need(directory: Path) -> None:
    if not directory.is_dir():
        pytest.skip(f"needs {directory}")
