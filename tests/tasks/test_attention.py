"""Grad-CAM maps, the tap that they are taken with, and the layers that have any."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.models import ImageClassifier
from lightning_cl.taps import ActivationTap, untapped
from lightning_cl.tasks.attention import attention_maps, check_second_derivative, find_map_layer


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 5))


IMAGES = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ maps


def test_a_map_weighs_channels_by_their_mean_slope_and_has_length_one():
    activation = torch.tensor([[[[1.0, 2.0]], [[5.0, -1.0]]]], requires_grad=True)
    scores = (activation * torch.tensor([[[[1.0, 3.0]], [[-0.5, -0.5]]]])).sum((1, 2, 3))
    # 2 * (1, 2) - 0.5 * (5, -1) = (-0.5, 4.5)
    assert attention_maps(scores, activation).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("values", [0.0, -1.0, 1e-30], ids=["nothing", "against", "tiny"])
def test_a_map_with_nothing_left_is_zero_and_has_finite_gradients(values):
    activation = torch.full((1, 2, 2, 2), values, requires_grad=True)
    weights = torch.ones(2, requires_grad=True)
    scores = (activation.mean((2, 3)) * weights).sum(1)
    maps = attention_maps(scores, activation, create_graph=True)
    gradients = torch.autograd.grad(maps.sum(), [activation, weights])
    assert float(maps.detach().abs().max()) < 1e-12
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_maps_have_second_derivatives():
    activation = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(12, dtype=torch.float64, requires_grad=True)

    def map_of(activation, weights):
        scores = torch.tanh(activation.flatten(1) @ weights)
        return attention_maps(scores, activation, create_graph=True).double()

    assert torch.autograd.gradcheck(map_of, (activation, weights), eps=1e-3, atol=1e-2, rtol=1e-2)


# ------------------------------------------------------------------ the tap


def test_what_is_kept_stands_before_an_operation_in_place():
    net = _net()
    with ActivationTap({"conv": net[0]}) as tap:
        net(IMAGES)
    assert torch.equal(tap.outputs["conv"], net[0](IMAGES))
    assert bool((tap.outputs["conv"] < 0).any())


def test_what_comes_out_is_not_changed():
    net = _net()
    expected = net(IMAGES)
    with ActivationTap({"conv": net[0], "head": net[3]}):
        assert torch.equal(net(IMAGES), expected)


def test_what_nothing_is_trained_for_begins_to_record():
    net = _net().requires_grad_(False)
    with ActivationTap({"conv": net[0]}) as tap:
        total = net(IMAGES).sum()
    assert bool(torch.autograd.grad(total, tap.outputs["conv"])[0].any())


def test_outputs_stand_in_the_order_of_the_last_calls():
    net = _net()
    with ActivationTap({"head": net[3], "conv": net[0]}) as tap:
        net(IMAGES)
        assert list(tap.outputs) == ["conv", "head"]
        net[0](IMAGES)
    assert list(tap.outputs) == ["head", "conv"]


@pytest.mark.parametrize("only_own_step", [True, False])
def test_calls_that_are_not_the_modules_own_step_may_be_left_out(only_own_step):
    net = _net()
    with ActivationTap({"conv": net[0]}, only_own_step) as tap, untapped():
        net(IMAGES)
    assert list(tap.outputs) == ([] if only_own_step else ["conv"])


def test_no_hook_is_left():
    net = _net()
    with ActivationTap({"conv": net[0]}):
        assert net[0]._forward_hooks
    assert not net[0]._forward_hooks


# ------------------------------------------------------------------ layers that have maps


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [("resnet32", "model.stages"), ("resnet18_cifar", "model.layer4"), ("convnet", "model.pool")],
)
def test_the_last_layer_with_more_than_one_position_is_found(backbone, layer):
    module = ImageClassifier(backbone, num_classes=10, input_shape=(3, 16, 16)).eval()
    images = torch.rand(2, 3, 16, 16)
    [head] = [name for name, part in module.named_modules() if getattr(part, "out_features", 0) == 10]
    assert find_map_layer(module, module, images, head, None) == layer


class Branches(nn.Module):
    """What its side layer says is not listened to, and its late one comes after the classification layer."""

    def __init__(self):
        super().__init__()
        self.body, self.side, self.late = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
        self.unused = nn.Conv2d(1, 2, 3)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2, 3)

    def forward(self, images):
        features = self.body(images)
        self.side(images)
        logits = self.head(self.pool(features).flatten(1))
        return logits + self.late(images).mean()


def test_a_layer_that_the_logits_do_not_come_from_is_passed_by():
    net = Branches()
    assert find_map_layer(net, net, IMAGES, "head", None) == "body"


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        ("bodi", "`layer='bodi'` names no layer of Branches"),
        ("head", r"`layer='head'` of Branches puts out \(2, 3\)"),
        ("pool", r"`layer='pool'` of Branches puts out \(2, 2, 1, 1\)"),
        ("unused", "`layer='unused'` of Branches puts out no tensor"),
        ("side", "The logits of `head='head'` of Branches do not depend on what `layer='side'`"),
        ("late", "The logits of `head='head'` of Branches do not depend on what `layer='late'`"),
    ],
)
def test_a_layer_without_maps_is_refused_with_those_that_have(layer, found):
    net = Branches()
    with pytest.raises(MisconfigurationException, match=rf"(?s)`layer` must name.*{found}.*fit: 'body'\."):
        find_map_layer(net, net, IMAGES, "head", layer)


def test_what_is_compiled_with_its_backward_is_refused_after_the_layer_and_allowed_before_it():
    torch.compiler.reset()
    net = _net()
    net[3].compile(backend="aot_eager")
    with pytest.raises(MisconfigurationException, match=r"follows `layer='0'`.*differentiated twice.*uncompiled"):
        check_second_derivative(net, net, IMAGES, "0")
    net = _net()
    net[0].compile(backend="aot_eager")
    check_second_derivative(net, net, IMAGES, "1")
