"""The exits of one module as a whole: built by a dry run, put on, taken off, and made again from what was saved."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.exits.heads import ExitHeads
from lightning_cl.exits.hooks import ExitHooks
from lightning_cl.exits.placement import all_can_leave, answers_of, layers_at_equal_costs, rows_can_leave
from lightning_cl.exits.points import (
    ExitPoint,
    Run,
    find_exit_points,
    flops_until,
    layers_after,
    layers_matching,
)
from lightning_cl.exits.rest import LayersAtRest
from lightning_cl.heads import pool_positions
from lightning_cl.heads.exit_ensemble import Ensemble
from lightning_cl.heads.exit_heads import ExitHeadKind, build_exit_head, pool_features, seeded
from lightning_cl.taps import EXITS


class ExitNetwork:
    """Exit heads for the layers of a module.

    Args:
        spec: What was found out about the module, in plain numbers and names, as `find` does.
        head: The kind of head, or a module to copy.

    Attributes:
        heads: The heads of the exits, in the order in which a sample meets them.
        hooks: What lets them answer, while they are on a module.
    """

    def __init__(self, spec: dict[str, Any], head: ExitHeadKind | nn.Module) -> None:
        self.spec = spec
        self.hooks: ExitHooks | None = None
        classes = spec["num_classes"]
        heads = [
            build_exit_head(head, torch.zeros(2, *shape), classes, seed) for seed, shape in enumerate(spec["shapes"])
        ]
        with seeded(len(heads)):
            self.heads = ExitHeads(heads, classes, spec["ensemble"], spec["widths"])
        self.heads.to_type_of(torch.zeros((), dtype=getattr(torch, spec["dtype"])))
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
        ensemble: Ensemble = "none",
        nearest_means: bool = False,
    ) -> "ExitNetwork":
        """Find out by dry runs where the exits of a module stand and what they cost; for use in eval mode.

        Args:
            root: The module.
            layers: Patterns of layer names, or how many exits there shall be at equal shares of the cost.
            classifier: Name of the classification layer.
            run: Calls the module on a batch.
            samples: Rows of that batch.
            head: The kind of head, or a module to copy.
            ensemble: What exits make of what those before them said; see `ExitHeads`.
            nearest_means: Whether nearest means shall answer in eval mode.

        Raises:
            ValueError: If a layer cannot have an exit, or its head gives no logits.
        """
        features, logits = answers_of(root, classifier, run)
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
            "ensemble": ensemble,
            "widths": None,
            "rest": {name: list(shape) for name, shape in rest.items()},
            "dtype": str(points[0].features.dtype).removeprefix("torch."),
            "keeps_one": not all_can_leave(root, points, rest, classifier, run, samples),
        }
        if nearest_means:
            pooled = [*(pool_features(point.features) for point in points), pool_positions(features)]
            spec["widths"] = [rows.shape[1] for rows in pooled]
        network = cls(spec, head)
        network.heads.to_type_of(points[0].features)
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
        needed = (*self.spec["layers"], self.spec["classifier"], *self.spec["rest"])
        missing = [name for name in needed if name not in known]
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
        self.hooks = self.heads.hooks = ExitHooks(root, points, self.heads, self.spec["classifier"])
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
        self._root = self.hooks = self.heads.hooks = self._rest = None

    def _costs(self, until: Sequence[int], total: int, samples: int) -> list[float]:
        """Count the operations up to each exit with all heads until there."""
        heads, costs = 0, []
        shapes = list(self.spec["shapes"])
        if self.spec["widths"] is not None:
            shapes.append(self.spec["widths"][-1:])
        for position, (flops, shape) in enumerate(zip([*until, total], shapes, strict=False)):
            heads += flops_until(self.heads, [], partial(self._try, position, samples, shape))[1]
            costs.append((flops + heads) / total)
        self.heads.train()
        return costs if len(costs) > len(until) else [*costs, 1 + heads / total]

    @torch.no_grad()
    def _try(self, position: int, samples: int, shape: Sequence[int]) -> None:
        like = next(self.heads.parameters(), torch.zeros(()))
        features = torch.zeros(samples, *shape, dtype=like.dtype, device=like.device)
        if self.spec["widths"] is not None:
            self.heads.eval().nearest_to(position, features)
        else:
            said = features.new_zeros(samples, self.spec["num_classes"])
            self.heads.eval().say(position, features, [said])
