"""Networks of all kinds, with layers where exits can stand."""

import torch
import torchvision
from torch import nn

from lightning_cl.exits import ExitHeads, ExitHooks, find_exit_points
from lightning_cl.heads.exit_heads import build_exit_head
from lightning_cl.models import build_backbone


class Nested(nn.Module):
    """A backbone inside a backbone, with a batch taken from a dict and scores that are worked on after the head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"body": build_backbone("convnet", 5, (1, 8, 8)).blocks})
        self.fc = nn.Linear(64, 5)

    def forward(self, images):
        features = self.encoder["body"](images).mean((2, 3))
        return 2 * self.fc(features)


def _vit():
    vit = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(vit.heads.head.weight)  # which begins as zeros
    return vit


# how a network is built, the shape of its inputs, its exits in the order in which a sample meets them, its classifier
NETWORKS = {
    "mlp": (lambda: build_backbone("mlp", 5, (1, 8, 8)), (1, 8, 8), ["body.1", "body.4"], "head"),
    "convnet": (lambda: build_backbone("convnet", 5, (1, 8, 8)), (1, 8, 8), ["blocks.3", "blocks.5", "hidden"], "head"),
    "resnet32": (lambda: build_backbone("resnet32", 5, (3, 8, 8)), (3, 8, 8), ["stages.0", "stages.1.2"], "head"),
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=5),
        (3, 32, 32),
        ["layer1", "layer2.0", "layer3"],
        "fc",
    ),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        (3, 32, 32),
        ["features.2", "features.5", "features.9"],
        "classifier.3",
    ),
    "vit": (_vit, (3, 16, 16), ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"], "heads.head"),
    "nested": (Nested, (1, 8, 8), ["encoder.body.3", "encoder.body.7"], "fc"),
}


def network_with_exits(name, head="pool", samples=12):
    """Return a network in eval mode, its exits, their heads, and inputs of which some are told apart better."""
    build, shape, layers, classifier = NETWORKS[name]
    torch.manual_seed(0)
    network = build().eval()
    inputs = torch.randn(samples, *shape) * torch.linspace(0.1, 3, samples).view(-1, *[1] * len(shape))
    with torch.no_grad():
        points = find_exit_points(network, layers, classifier, lambda: network(inputs), samples)
    heads = [build_exit_head(head, point.features, 5, seed) for seed, point in enumerate(points)]
    for exit_ in heads:
        exit_.eval()
    return network, points, heads, classifier, inputs


def hooked(name, ensemble="none", **options):
    """Return the same with hooks on the network."""
    network, points, heads, classifier, inputs = network_with_exits(name, **options)
    return network, ExitHooks(network, points, ExitHeads(heads, 5, ensemble), classifier), inputs
