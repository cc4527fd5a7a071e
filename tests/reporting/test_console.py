"""What stands on the terminal when a run ends."""

from pathlib import Path

import rich
import torch

from lightning_cl.reporting import print_summary


def test_the_summary_shows_matrix_averages_and_where_the_files_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rich.reconfigure(width=80)  # whatever the console was set to before
    paths = [tmp_path / "runs" / "results.json", Path("/elsewhere/results.json")]
    matrix = torch.tensor([[0.98, torch.nan], [0.50, 0.94]])
    print_summary(matrix, {"average_accuracy": 0.72}, ["first", "second"], "Accuracy after each task", paths)
    title, *table, average, near, far = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert title == "Accuracy after each task"
    assert table[0].split() == ["after", "first", "second", "average"]
    assert table[-1].split() == ["second", "0.50", "0.94", "0.72"]
    assert average == "average accuracy  0.7200"
    assert (near, far) == ("  runs/results.json", "  /elsewhere/results.json")
