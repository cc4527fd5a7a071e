"""Where exits can stand, what they cost, and what is said where they cannot."""

import re

import pytest
import torch
from networks import NETWORKS
from torch import nn

from lightning_cl.exits import (
    find_exit_points,
    flops_until,
    layers_after,
    layers_at_equal_costs,
    layers_matching,
    rows_can_leave,
)


def _network(name):
    build, shape, layers, classifier = NETWORKS[name]
    return build().eval(), torch.randn(2, *shape), layers, classifier


@pytest.mark.parametrize("name", NETWORKS)
def test_exits_stand_in_the_order_in_which_a_sample_meets_them(name):
    network, inputs, layers, classifier = _network(name)
    points = find_exit_points(network, layers[::-1], classifier, lambda: network(inputs), 2)
    assert [point.layer for point in points] == layers
    assert all(len(point.features) == 2 for point in points)


@pytest.mark.parametrize(
    ("name", "layer", "written_over"),
    [("mlp", "body.1", True), ("mlp", "body.4", False), ("convnet", "blocks.1", True)],
)
def test_a_layer_that_is_written_over_is_noticed(name, layer, written_over):
    network, inputs, _, classifier = _network(name)
    (point,) = find_exit_points(network, [layer], classifier, lambda: network(inputs), 2)
    assert point.written_over == written_over


def test_in_inference_mode_a_layer_may_be_written_over():
    network, inputs = NETWORKS["convnet"][0]().eval(), torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        [point] = find_exit_points(network, ["blocks.3"], "head", lambda: network(inputs), 4)
    assert point.written_over


def test_names_and_patterns():
    network = NETWORKS["resnet18"][0]()
    assert layers_matching(network, ["layer1", "layer2"]) == ["layer1", "layer2"]
    assert layers_matching(network, ["layer?"]) == ["layer1", "layer2", "layer3", "layer4"]
    assert layers_matching(network, ["layer3.?", "layer3.0"]) == ["layer3.0", "layer3.1"]


@pytest.mark.parametrize(("pattern", "nearest"), [("layr1", "layer1"), ("convl", "conv1"), ("layer1.2", "layer1.1")])
def test_a_pattern_that_matches_nothing_shows_the_nearest_names(pattern, nearest):
    with pytest.raises(
        ValueError, match=rf"`layers`: '{pattern}' matches no layer of ResNet\. Nearest names: .*{nearest}"
    ):
        layers_matching(NETWORKS["resnet18"][0](), [pattern])


class Odd(nn.Module):
    """Layers where no exit can stand."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.pair = Pair()
        self.total = Total()
        self.fc = nn.Linear(4, 3)
        self.after = nn.Linear(3, 3)

    def forward(self, x):
        x = self.shared(self.shared(x))
        x, scale = self.pair(x)
        return self.after(self.fc(x * scale + self.total(x)))


class Pair(nn.Module):
    def forward(self, x):
        return x, 2.0


class Total(nn.Module):
    def forward(self, x):
        return x.sum(0, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("shared", "is called 2 times for one batch"),
        ("never", "is not called when Odd answers"),
        ("pair", "puts out no row for each of 2 samples, but tuple"),
        ("total", r"puts out no row for each of 2 samples, but \(1, 4\)"),
        ("after", "comes after the classification layer 'fc'"),
    ],
)
def test_a_layer_that_can_have_no_exit(layer, reason):
    network = Odd()
    with pytest.raises(ValueError, match=f"`layers`: '{layer}' {reason}"):
        find_exit_points(network, [layer], "fc", lambda: network(torch.randn(2, 4)), 2)
    assert not any(module._forward_hooks for module in network.modules())


def test_flops_by_hand():
    network, inputs, layers, _ = _network("mlp")
    until, total = flops_until(network, layers, lambda: network(inputs[:1]))
    first, second, head = 2 * 64 * 400, 2 * 400 * 400, 2 * 400 * 5
    assert until == {"body.1": first, "body.4": first + second}
    assert total == first + second + head


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_rise_from_exit_to_exit(name):
    network, inputs, layers, _ = _network(name)
    with torch.no_grad():
        until, total = flops_until(network, layers, lambda: network(inputs[:1]))
    counts = [until[layer] for layer in layers]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert counts[-1] < total


def test_the_outermost_layers_after_an_exit():
    network, inputs, _, classifier = _network("resnet32")
    after = layers_after(network, "stages.1.2", classifier, lambda: network(inputs), 2)
    assert after == {"stages.1.3": (32, 4, 4), "stages.1.4": (32, 4, 4), "stages.2": (64, 2, 2), "pool": (64, 1, 1)}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mlp"])
def test_exits_at_equal_costs_stand_where_rows_can_leave(name, count):
    network, _, _, classifier = _network(name)
    inputs = torch.randn(6, *NETWORKS[name][1])

    def run():
        return network(inputs)

    with torch.no_grad():
        layers = layers_at_equal_costs(network, classifier, run, 6, count)
        assert len(set(layers)) == count
        assert all(rows_can_leave(network, layer, classifier, run, 6) for layer in layers)
        until, total = flops_until(network, layers, run)
    shares = [until[layer] / total for layer in layers]
    assert shares == sorted(shares)
    for part, share in enumerate(shares, start=1):
        assert abs(share - part / (count + 1)) < 0.3  # a small network has few places
    assert not any(module._forward_hooks for module in network.modules())


def test_exits_of_a_residual_network_stand_after_its_blocks():
    network, _, _, classifier = _network("resnet32")
    inputs = torch.randn(4, *NETWORKS["resnet32"][1])
    with torch.no_grad():
        layers = layers_at_equal_costs(network, classifier, lambda: network(inputs), 4, 3)
        assert not rows_can_leave(network, "stages.1.2.norm1", classifier, lambda: network(inputs), 4)
    assert all(re.fullmatch(r"stages\.\d(\.\d)?", layer) for layer in layers)
