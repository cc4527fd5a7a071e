"""Exits inside a network: where they can stand, what they cost, and how samples leave there."""

from lightning_cl.exits.heads import ExitHeads
from lightning_cl.exits.hooks import ExitHooks
from lightning_cl.exits.network import ExitNetwork
from lightning_cl.exits.placement import layers_at_equal_costs, rows_can_leave
from lightning_cl.exits.points import ExitPoint, find_exit_points, flops_until, layers_after, layers_matching
from lightning_cl.exits.rest import LayersAtRest
from lightning_cl.exits.subnetwork import SubNetwork

__all__ = [
    "ExitHeads",
    "ExitHooks",
    "ExitNetwork",
    "ExitPoint",
    "LayersAtRest",
    "SubNetwork",
    "find_exit_points",
    "flops_until",
    "layers_after",
    "layers_at_equal_costs",
    "layers_matching",
    "rows_can_leave",
]
