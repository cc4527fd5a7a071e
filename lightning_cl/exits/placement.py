"""Where rows may leave a network, and places for exits at equal shares of its cost."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_cl.exits.heads import ExitHeads
from lightning_cl.exits.hooks import ExitHooks
from lightning_cl.exits.points import ExitPoint, Run
from lightning_cl.exits.rest import LayersAtRest
from lightning_cl.taps import first_tensor


class _Place(NamedTuple):
    """A layer that is called once and puts out a row for each sample."""

    layer: str
    flops: int


def answers_of(root: nn.Module, classifier: str, run: Run) -> tuple[Tensor, Tensor]:
    """Return what the classification layer gets and puts out, before rows that left are put back."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> None:
        features = first_tensor(inputs, named)
        kept.append(((output if features is None else features).detach().float(), output.detach().float()))

    handle = root.get_submodule(classifier).register_forward_hook(keep, prepend=True, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return kept[-1]


def rows_can_leave(root: nn.Module, layer: str, classifier: str, run: Run, samples: int) -> bool:
    """Return whether the answers of rows that stay are the same when others leave at a layer; tried, not derived.

    Args:
        root: The module.
        layer: Name of the layer.
        classifier: Name of the classification layer.
        run: Calls the module on a batch; for use in eval mode.
        samples: Rows of that batch.
    """
    whole = answers_of(root, classifier, run)
    leaving = torch.arange(samples) % 2 == 0
    hooks = _Forced(root, ExitPoint(layer, torch.zeros(0), False), whole[1].shape[1], classifier, leaving)
    try:
        parts = answers_of(root, classifier, run)
    except Exception:  # whatever a module does with the wrong number of rows
        return False
    finally:
        hooks.remove()
    # a classification layer that begins with zeros gives all the same answer, but not the same input
    return all(_alike(part, rows[~leaving.to(rows.device)]) for part, rows in zip(parts, whole, strict=True))


def all_can_leave(
    root: nn.Module,
    points: Sequence[ExitPoint],
    rest: dict[str, tuple[int, ...]],
    classifier: str,
    run: Run,
    samples: int,
) -> bool:
    """Return whether a network can do with a batch of no rows after each of its exits; tried.

    Args:
        root: The module.
        points: The exits.
        rest: The layers that then compute nothing, with the shape of one row.
        classifier: Name of the classification layer.
        run: Calls the module on a batch; for use in eval mode.
        samples: Rows of that batch.
    """
    classes = answers_of(root, classifier, run)[1].shape[1]
    for point in points:
        hooks = _Forced(root, point, classes, classifier, torch.ones(samples, dtype=torch.bool))
        layers = LayersAtRest(root, rest, hooks)
        try:
            if len(answers_of(root, classifier, run)[1]) > 0:
                return False
        except Exception:  # such as a view of -1 columns
            return False
        finally:
            layers.remove()
            hooks.remove()
    return True


def _alike(part: Tensor, rows: Tensor) -> bool:
    tolerance = 1e-3 * float(rows.abs().max()) + 1e-6
    return part.shape == rows.shape and torch.allclose(part, rows, rtol=1e-3, atol=tolerance)


def layers_at_equal_costs(root: nn.Module, classifier: str, run: Run, samples: int, count: int) -> list[str]:
    """Return layers that divide a network into parts of about the same cost, where rows may leave.

    Args:
        root: The module.
        classifier: Name of the classification layer.
        run: Calls the module on a batch; for use in eval mode.
        samples: Rows of that batch.
        count: How many layers.

    Raises:
        ValueError: If the network has fewer such places.

    Example::

        >>> layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(5)]
        >>> network, batch = nn.Sequential(*layers, nn.Linear(8, 3)).eval(), torch.randn(4, 8)
        >>> layers_at_equal_costs(network, "5", lambda: network(batch), samples=4, count=2)
        ['1', '3']
    """
    places, total = _places(root, classifier, run, samples)
    tried: dict[str, bool] = {}
    chosen: list[_Place] = []
    for part in range(1, count + 1):
        for place in sorted(places, key=lambda p: (abs(p.flops - part * total / (count + 1)), p.layer.count("."))):
            if place.flops in {other.flops for other in chosen}:
                continue
            if place.layer not in tried:
                tried[place.layer] = rows_can_leave(root, place.layer, classifier, run, samples)
            if tried[place.layer]:
                chosen.append(place)
                break
        else:
            raise ValueError(
                f"`layers='auto:{count}'` asks for {count} exits, and {type(root).__name__} has {len(chosen)} places"
                " where samples can leave. Ask for fewer, or name the layers."
            )
    return [place.layer for place in sorted(chosen, key=lambda place: place.flops)]


def _places(root: nn.Module, classifier: str, run: Run, samples: int) -> tuple[list[_Place], int]:
    counter = FlopCounterMode(display=False)
    calls: dict[str, int] = {}
    found: dict[str, int] = {}
    over = False

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal over
            over = over or name == classifier
            calls[name] = calls.get(name, 0) + 1
            flops = counter.get_total_flops()
            if not over and flops and isinstance(output, Tensor) and output.dim() > 1 and len(output) == samples:
                found[name] = flops

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in root.named_modules() if name]
    try:
        with counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
    # of layers that cost nothing after one another the last has what all of them made
    places = [_Place(name, flops) for name, flops in reversed(found.items()) if calls[name] == 1]
    return places, counter.get_total_flops()


class _Forced(ExitHooks):
    """Lets the same rows leave, however sure the exit is."""

    def __init__(self, root: nn.Module, point: ExitPoint, num_classes: int, classifier: str, leaving: Tensor) -> None:
        self._leaving = leaving
        head = nn.Module()
        head.forward = lambda features: features.new_zeros(len(features), num_classes)
        super().__init__(root, [point], ExitHeads([head]), classifier)
        self.threshold = 0.5

    def _confidences(self, logits: Tensor, position: int) -> Tensor:
        return self._leaving.to(logits.device).float()
