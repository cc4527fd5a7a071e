"""The command line: Lightning's own CLI, with the suite's classes known by their short names."""

import difflib
import logging
import os
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

import lightning_cl.callbacks
import lightning_cl.datamodules
import lightning_cl.models  # the three imports make the short class names known to the parser

_USER_ERROR = 2  # what argparse, and so every wrong option, exits with

_PACKAGE = Path(__file__).parent
_LIGHTNING = Path(lightning.pytorch.__file__).parent.parent

_THIRD_PARTY_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    # lightning <= 2.6 asks torch >= 2.9 an outdated question about its own tree specs.
    (r".*`?isinstance\(treespec, LeafSpec\)`? is deprecated", FutureWarning),
    # Advice, not a fault: data in memory is faster without workers, and on two cores so are most files.
    (r"The '\w+' does not have many workers", UserWarning),
    # The first tasks of a stream may well be shorter than the Trainer's `log_every_n_steps`.
    (r"The number of training batches \(\d+\) is smaller than the logging interval", UserWarning),
    # Says which logger stands in for TensorBoard where that is not installed; the run names the log directory.
    (r"Starting from v1\.9\.0, `tensorboardX` has been removed", UserWarning),
    # `main([...])` from Python, with options of the calling program's own in `sys.argv`, is what `args` is for.
    (r"LightningCLI's args parameter is intended to run from within Python", UserWarning),
)


class _Parser(LightningArgumentParser):
    """Lightning's parser, which answers an unknown class name with the names that are near it."""

    @override
    def parse_object(self, cfg_obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the hyperparameters of a checkpoint, too, in the form in which Lightning 2.5 hands them on."""
        for command in LightningCLI.subcommands():
            model = cfg_obj.get(command, {}).get("model") if isinstance(cfg_obj, dict) else None
            if isinstance(model, dict) and "_class_path" in model:
                class_path = model.pop("_class_path")
                cfg_obj = {command: {"model": {"class_path": class_path, "dict_kwargs": model}}}
        return super().parse_object(cfg_obj, *args, **kwargs)

    @override
    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        unknown = re.search(r"Expected a dot import path string: (\S+)", message)
        if unknown is not None:
            where = message.partition("\n")[0]
            message = f"{where} {_suggest(unknown.group(1))}"
        super().error(message, *args, **kwargs)
        raise SystemExit(_USER_ERROR)


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run ``lightning-cl``: parse ``fit``, ``validate``, ``test`` or ``predict`` with its options, and do it.

    Classes of the suite, of Lightning and of torch may be given by their short names, others by their import path; the
    working directory is importable. Errors of the user's making end in one message on stderr and exit code 2; with the
    environment variable ``JSONARGPARSE_DEBUG=true`` they keep their traceback, as all other errors do.

    Args:
        args: The command line without the program's name; that of the process if none is given.

    Returns:
        The CLI after the run, with its ``trainer``, ``model``, ``datamodule`` and ``config``.

    Raises:
        SystemExit: After an error of the user's making.

    Example::

        cli = main(["fit", "--config", "configs/split_digits.yaml", "--trainer.max_epochs", "1"])
        cli.trainer.callback_metrics
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    usages = {command: {"usage": f"lightning-cl {command} [options]"} for command in LightningCLI.subcommands()}
    with _quiet_third_parties():
        try:
            return LightningCLI(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                # A stream's result depends on its seed, so a run repeats itself unless another one is asked for.
                seed_everything_default=0,
                parser_class=_Parser,
                parser_kwargs={
                    "prog": "lightning-cl",
                    "description": "Continual learning with Lightning: any module, any data, a stream of tasks.",
                    "version": lightning_cl.__version__,
                    **usages,
                },
                args=None if args is None else list(args),
            )
        except Exception as error:
            message = None if os.environ.get("JSONARGPARSE_DEBUG") else _message_for_user(error)
            if message is None:
                raise
            rank = getattr(rank_zero_only, "rank", 0)
            sys.stderr.write(f"{f'rank {rank}: ' if rank else ''}error: {message}\n")
            raise SystemExit(_USER_ERROR) from None


def run() -> None:
    """Run the console script: a program's exit code is its result, so the CLI object is not handed on."""
    main()


@contextmanager
def _quiet_third_parties() -> Iterator[None]:
    """Hide what other libraries tell everybody, and nothing that this run's own code may want to say."""
    # What a callback says at level INFO was asked for with its `verbose`.
    levels = {"lightning.pytorch": logging.WARNING, "lightning.fabric": logging.WARNING}
    levels["lightning.pytorch.callbacks"] = logging.INFO
    before = {name: logging.getLogger(name).level for name in levels}
    with warnings.catch_warnings():
        for message, category in _THIRD_PARTY_NOISE:
            warnings.filterwarnings("ignore", message=message, category=category)
        try:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _message_for_user(error: Exception) -> str | None:
    """Give the message of an error that the user can mend by other input, and ``None`` for any other error.

    The parser tries a value against each type that an option may have, and wraps what the constructors raised on the
    way: the cause of all is the one that counts.
    """
    cause: BaseException = error
    while cause.__cause__ is not None and _raised_in(cause) not in (_PACKAGE, _LIGHTNING):
        cause = cause.__cause__
    if isinstance(cause, MisconfigurationException):
        return str(cause)
    if isinstance(error, (EOFError, RuntimeError, pickle.UnpicklingError)) and _loads_checkpoint(error):
        return (
            f"the checkpoint cannot be read, it is damaged or no checkpoint: {str(error).partition('.')[0] or 'empty'}."
        )
    origin = _raised_in(cause)
    if origin == _PACKAGE and isinstance(cause, (ValueError, TypeError, FileNotFoundError)):
        return str(cause)
    if origin == _LIGHTNING and isinstance(cause, FileNotFoundError):
        return str(cause)
    twice = re.match(r"Found more than one stateful callback of type `(\w+)`", str(cause))
    if isinstance(cause, RuntimeError) and twice is not None:
        return f"`trainer.callbacks` has more than one {twice[1]}. Take one out; `--config` and `+=` add to a list."
    if isinstance(cause, RuntimeError) and str(cause).startswith(SaveConfigCallback.__name__):
        return str(cause)
    return None


def _raised_in(error: BaseException) -> Path | None:
    """Find out which of the two packages holds the line that raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return None
    file = Path(frames[-1].filename)
    return next((root for root in (_PACKAGE, _LIGHTNING) if file.is_relative_to(root)), None)


def _loads_checkpoint(error: BaseException) -> bool:
    # the command line reads its hyperparameters before the Trainer reads the rest
    readers = ("load_checkpoint", "_parse_ckpt_path")
    return any(frame.name in readers for frame in traceback.extract_tb(error.__traceback__))


def _suggest(name: str) -> str:
    near = difflib.get_close_matches(name, sorted(_known_classes()), n=3)
    hint = f"Did you mean {' or '.join(f'`{known}`' for known in near)}? " if near else ""
    return f"no class `{name}` is known. {hint}A class of your own needs its module's name: `my_module.{name}`."


def _known_classes() -> set[str]:
    names: set[str] = set()
    pending: list[type[object]] = [Callback, LightningDataModule, LightningModule]
    while pending:
        subclasses: list[type[object]] = pending.pop().__subclasses__()
        names.update(subclass.__name__ for subclass in subclasses)
        pending.extend(subclasses)
    return names
