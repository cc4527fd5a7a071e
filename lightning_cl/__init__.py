"""Continual learning for PyTorch Lightning: callbacks and DataModules for streams of tasks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_cl.loading import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # the memory and the heads are of use without Lightning, which takes seconds to import
    if name == "load":
        from lightning_cl.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
