"""The exits of one module as a whole: built by a dry run, put on, taken off, and made again from what was saved."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.exits.hooks import ExitHooks, LayersAtRest
from lightning_cl.exits.placement import all_can_leave, answers_of, layers_at_equal_costs, rows_can_leave
from lightning_cl.exits.points import (
    ExitPoint,
    Run,
    find_exit_points,
    flops_until,
    layers_after,
    layers_matching,
)
from lightning_cl.heads.exit_heads import ExitHeadKind, build_exit_head
from lightning_cl.taps import EXITS


class ExitNetwork:
    """Exit heads for the layers of a module.

    Args:
        spec: What was found out about the module, in plain numbers and names, as `find` does.
        head: The kind of head, or a module to copy.

    Attributes:
        heads: One head for each exit, in the order in which a sample meets them.
        hooks: What lets them answer, while they are on a module.
    """

    def __init__(self, spec: dict[str, Any], head: ExitHeadKind | nn.Module) -> None:
        self.spec = spec
        self.hooks: ExitHooks | None = None
        self.heads = nn.ModuleList(
            build_exit_head(head, torch.zeros(2, *shape), spec["num_classes"], seed)
            for seed, shape in enumerate(spec["shapes"])
        ).to(getattr(torch, spec["dtype"]))
        self._root: nn.Module | None = None
        self._rest: LayersAtRest | None = None

    @classmethod
    def find(
        cls,
        root: nn.Module,
        layers: Sequence[str] | int,
        classifier: str,
        run: Run,
        samples: int,
        head: ExitHeadKind | nn.Module,
    ) -> "ExitNetwork":
        """Find out by dry runs where the exits of a module stand and what they cost; for use in eval mode.

        Args:
            root: The module.
            layers: Patterns of layer names, or how many exits there shall be at equal shares of the cost.
            classifier: Name of the classification layer.
            run: Calls the module on a batch.
            samples: Rows of that batch.
            head: The kind of head, or a module to copy.

        Raises:
            ValueError: If a layer cannot have an exit, or its head gives no logits.
        """
        _, logits = answers_of(root, classifier, run)
        if logits.dim() != 2:
            raise ValueError(
                f"{classifier!r} puts out {tuple(logits.shape)}; exits need logits of shape (batch, classes)."
            )
        if isinstance(layers, int):
            names = layers_at_equal_costs(root, classifier, run, samples, layers)
        else:
            names = layers_matching(root, layers)
        points = find_exit_points(root, names, classifier, run, samples)
        rest = layers_after(root, points[0].layer, classifier, run, samples)
        until, total = flops_until(root, [point.layer for point in points], run)
        spec = {
            "layers": [point.layer for point in points],
            "shapes": [list(point.features.shape[1:]) for point in points],
            "written_over": [point.written_over for point in points],
            "classifier": classifier,
            "num_classes": logits.shape[1],
            "head": None if isinstance(head, nn.Module) else head,
            "rest": {name: list(shape) for name, shape in rest.items()},
            "dtype": str(points[0].features.dtype).removeprefix("torch."),
            "keeps_one": not all_can_leave(root, points, rest, classifier, run, samples),
        }
        network = cls(spec, head)
        network.heads.to(points[0].features.device)
        spec["costs"] = network._costs([until[point.layer] for point in points], total, samples)
        mixing = (p.layer for p in points if not rows_can_leave(root, p.layer, classifier, run, samples))
        spec["mixing_layer"] = next(mixing, None)
        return network

    @property
    def costs(self) -> Tensor:
        """What a sample costs that leaves at each exit, and at the end, as a share of the module without exits."""
        return torch.tensor(self.spec["costs"])

    @property
    def mixing_layer(self) -> str | None:
        """The first exit where rows cannot leave the batch, since later answers depend on them."""
        found: str | None = self.spec["mixing_layer"]
        return found

    def attach(self, root: nn.Module) -> ExitHooks:
        """Put heads and hooks on a module."""
        known = dict(root.named_modules())
        missing = [name for name in (*self.spec["layers"], self.spec["classifier"]) if name not in known]
        if missing:
            raise ValueError(f"The exits are of another module: {type(root).__name__} has no layer {missing[0]!r}.")
        root.add_module(EXITS, self.heads)
        points = [
            ExitPoint(layer, torch.zeros(0, *shape), written_over)
            for layer, shape, written_over in zip(
                self.spec["layers"], self.spec["shapes"], self.spec["written_over"], strict=True
            )
        ]
        self._root = root
        self.hooks = ExitHooks(root, points, list(self.heads), self.spec["classifier"])
        self.hooks.removes_rows = self.mixing_layer is None
        self.hooks.keeps_one = self.spec["keeps_one"]
        shapes = {name: tuple(shape) for name, shape in self.spec["rest"].items()}
        self._rest = LayersAtRest(root, shapes, self.hooks)
        return self.hooks

    def detach(self) -> None:
        """Take heads and hooks off."""
        if self._root is None or self.hooks is None or self._rest is None:
            return
        self._rest.remove()
        self.hooks.remove()
        delattr(self._root, EXITS)
        self._root = self.hooks = self._rest = None

    def _costs(self, until: Sequence[int], total: int, samples: int) -> list[float]:
        """Count the operations up to each exit with all heads until there."""
        heads, costs = 0, []
        for flops, head, shape in zip(until, self.heads, self.spec["shapes"], strict=True):
            heads += flops_until(head, [], partial(_try, head, samples, shape))[1]
            head.train()
            costs.append((flops + heads) / total)
        return [*costs, 1 + heads / total]


def _try(head: nn.Module, samples: int, shape: Sequence[int]) -> None:
    like = next(head.parameters(), torch.zeros(()))
    head.eval()(torch.zeros(samples, *shape, dtype=like.dtype, device=like.device))
