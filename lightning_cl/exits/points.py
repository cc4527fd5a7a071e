"""Find out, by a dry run, where exits can stand in a network, what they cost, and whether rows may leave there."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_cl.taps import layer_named

Run = Callable[[], Any]


class ExitPoint(NamedTuple):
    """Where an exit stands.

    Attributes:
        layer: Name of the layer whose output its head gets.
        features: What the layer puts out for a few samples.
        written_over: Whether the network changes that output in place later, so that a head needs a copy.
    """

    layer: str
    features: Tensor
    written_over: bool


def layers_matching(root: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers that match some patterns, as `fnmatch` has them, each once.

    Raises:
        ValueError: If a pattern matches none, with the names that are nearest to it.
    """
    names = [name for name, _ in root.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(
                f"`layers`: {pattern!r} matches no layer of {type(root).__name__}. Nearest names:"
                f" {', '.join(map(repr, nearest))}."
            )
        found.update(dict.fromkeys(matching))
    return list(found)


def find_exit_points(
    root: nn.Module, layers: Sequence[str], classifier: str, run: Run, samples: int
) -> list[ExitPoint]:
    """Call a network once, and return its exits in the order in which a sample meets them.

    Args:
        root: The module.
        layers: Names of the layers.
        classifier: Name of the classification layer.
        run: Calls the module on a batch; for use in eval mode.
        samples: Rows of that batch.

    Raises:
        ValueError: If a layer cannot have an exit, saying why.
    """
    if classifier in layers:
        raise ValueError(f"`layers`: {classifier!r} is the classification layer, which every sample reaches anyway.")
    calls: list[tuple[str, Any, int | None]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            calls.append((name, output, _version_of(output)))

        return hook

    handles = [layer_named(root, name).register_forward_hook(note(name)) for name in (*layers, classifier)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    order = [name for name, _, _ in calls]
    # dropout in place writes in training alone
    drops = any(getattr(layer, "inplace", False) and "drop" in type(layer).__name__.lower() for layer in root.modules())
    points = []
    for name, output, version in calls:
        if name != classifier:
            _check_point(name, output, order, classifier, samples)
            written_over = drops or version is None or _version_of(output) != version
            points.append(ExitPoint(name, output.detach(), written_over))
    for name in layers:
        if name not in order:
            raise ValueError(f"`layers`: {name!r} is not called when {type(root).__name__} answers.")
    return points


def _version_of(output: Any) -> int | None:
    """Return how often a tensor was written to; ``None`` in inference mode, where nobody counts."""
    return output._version if isinstance(output, Tensor) and not output.is_inference() else None


def _check_point(name: str, output: Any, order: list[str], classifier: str, samples: int) -> None:
    if order.count(name) > 1:
        raise ValueError(
            f"`layers`: {name!r} is called {order.count(name)} times for one batch; an exit needs one call."
        )
    if order.index(name) > order.index(classifier):
        raise ValueError(f"`layers`: {name!r} comes after the classification layer {classifier!r}.")
    if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != samples:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"`layers`: {name!r} puts out no row for each of {samples} samples, but {got}; an exit needs a batch"
            " dimension."
        )


def flops_until(root: nn.Module, layers: Sequence[str], run: Run) -> tuple[dict[str, int], int]:
    """Count the floating-point operations of a network by PyTorch's own counter.

    Args:
        root: The module.
        layers: Names of layers that are called once.
        run: Calls the module on one sample.

    Returns:
        Those until each layer has put out, and all.
    """
    counter = FlopCounterMode(display=False)
    until: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            until[name] = counter.get_total_flops()

        return hook

    handles = [layer_named(root, name).register_forward_hook(note(name)) for name in layers]
    try:
        with counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return until, counter.get_total_flops()


def layers_after(root: nn.Module, layer: str, classifier: str, run: Run, samples: int) -> dict[str, tuple[int, ...]]:
    """Return the outermost layers that are called once and as a whole after an exit, with the shape of one row.

    They get and put out a row for each sample: where no row is left they have nothing to compute.
    """
    began: dict[str, bool] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    state = {"open": False}
    calls: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            began[name] = state["open"]

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name == layer:
                state["open"] = True
            elif name == classifier:
                state["open"] = False
            elif began.get(name) and state["open"] and all(_has_rows(v, samples) for v in (output, *inputs[:1])):
                shapes[name] = tuple(output.shape[1:])

        return hook

    with _hooked(root, before, after):
        run()
    whole = [name for name in shapes if calls[name] == 1]
    return {name: shapes[name] for name in whole if not any(name.startswith(f"{outer}.") for outer in whole)}


def _has_rows(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and len(value) == samples


@contextmanager
def _hooked(root: nn.Module, before: Callable[[str], Any], after: Callable[[str], Any]) -> Iterator[None]:
    handles = []
    for name, module in root.named_modules():
        if name:
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
