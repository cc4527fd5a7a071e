"""Long work inside a fit, shown beside the fit's own progress bar."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

T = TypeVar("T")


def show_progress(trainer: Trainer, items: Iterable[T], description: str) -> Iterator[T]:
    """Yield items, and show on the Trainer's progress bar how many there were, if it has one that shows anything.

    Args:
        trainer: The Trainer.
        items: What is worked through.
        description: What the bar is called.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        # the terminal has one live display, so the work is a line of it
        line = bar.progress.add_task(description, total=len(items) if isinstance(items, Sized) else None)
        try:
            for item in items:
                yield item
                bar.progress.advance(line)
        finally:
            if bar.progress is not None:  # an exception may have taken it off
                bar.progress.remove_task(line)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        yield from Tqdm(items, desc=description, leave=False, dynamic_ncols=True)
    else:
        yield from items
