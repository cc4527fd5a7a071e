"""Streams of Digits on the command line, and what tests look for in its errors."""

import pytest

from lightning_cl.cli import main

OPTIONS = [
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--model=ImageClassifier",
    "--model.input_shape=[1,8,8]",
    "--data=ClassIncremental",
    "--data.base=Digits",
    "--data.num_tasks=5",
]


def options_for(name, **arguments):
    """Return the options that add a callback."""
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in arguments.items())]


def error_of(capsys, *options):
    """Run a fit that must be refused, and return what is printed to stderr."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
