"""The small configs show attack, detection and recovery in one command."""

import json
import sys
from pathlib import Path

import pytest

from lightning_cl.cli import main

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
FASHION = "--data.init_args.sequence.init_args.base.init_args"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "seed"),
    [
        *(pytest.param("stp_split_digits", [], seed, id=f"digits-{seed}") for seed in range(3)),
        pytest.param(
            "stp_split_fashion_mnist",
            [f"{FASHION}.root={DATA}", f"{FASHION}.download=false"],
            0,
            id="fashion_mnist",
            marks=[
                pytest.mark.data,
                pytest.mark.skipif(not (DATA / "FashionMNIST").is_dir(), reason="no FashionMNIST in ../shared/data"),
            ],
        ),
    ],
)
def test_the_poisoned_task_and_no_other_is_undone(
    config: str, options: list[str], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = ROOT / "configs" / f"{config}.yaml"
    main(["fit", "--config", str(path), *options, f"--seed_everything={seed}", "--trainer.accelerator=cpu"])
    found = json.loads((tmp_path / "runs" / config / "version_0" / "poison_report.json").read_text())
    verdicts = {task["task"]: task["verdict"] for task in found["tasks"]}
    assert verdicts == {1: "calibration", 2: "poisoned", 3: "clean"}
    assert (tmp_path / "runs" / config / "version_0" / "poison_task_2.png").is_file()
