"""Where the files of a run go."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> Path | None:
    """Return the log directory; ``None`` where nothing is to be written: without a logger, or in a dry run.

    To be called on all ranks, since Lightning sends it from the first to the others.
    """
    if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    directory = trainer.log_dir
    return None if directory is None else Path(directory)
