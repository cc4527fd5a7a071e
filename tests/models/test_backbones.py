import pytest
import torch
from torch import nn

from lightning_cl.models import CifarResNet, build_backbone


def _parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (1, 28, 28)),
        ("mlp", (7,)),
        ("convnet", (1, 8, 8)),
        ("convnet", (3, 32, 32)),
        ("convnet", (3, 64, 48)),
        ("resnet32", (3, 32, 32)),
        ("resnet32", (1, 28, 28)),
        ("resnet18_cifar", (3, 32, 32)),
        ("resnet18_cifar", (1, 8, 8)),
        ("mobilenet_v3_small", (3, 64, 64)),
        ("regnet_y_400mf", (3, 64, 64)),
    ],
)
def test_each_backbone_gives_one_row_of_logits_per_sample(name, shape):
    model = build_backbone(name, num_classes=7, input_shape=shape)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet32", "resnet18_cifar", "mobilenet_v3_small"])
def test_each_backbone_has_one_linear_layer_of_the_class_count(name):
    linear = [layer for layer in build_backbone(name, 7).modules() if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear].count(7) == 1
    assert linear[-1].out_features == 7


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("mlp", (1, 28, 28), 784 * 400 + 400 + 400 * 400 + 400 + 400 * 10 + 10),
        ("resnet32", (3, 32, 32), 464_154),
        ("resnet18_cifar", (3, 32, 32), 11_173_962),
    ],
)
def test_parameter_counts_are_those_of_the_literature(name, shape, count):
    assert _parameters(build_backbone(name, 10, shape)) == count


def test_resnet32_halves_the_image_twice_and_has_shortcuts_without_parameters():
    model = CifarResNet(3, 10)
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) == 31


def test_resnet18_cifar_keeps_the_resolution_in_its_stem():
    model = build_backbone("resnet18_cifar", 10)
    assert model.conv1.stride == (1, 1)
    assert model.conv1.kernel_size == (3, 3)
    assert isinstance(model.maxpool, nn.Identity)


@pytest.mark.parametrize(
    "name",
    ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "maxvit_t", "mnasnet0_5", "swin_t",
     "vgg11", "vit_b_16"],
)  # fmt: skip
def test_the_head_of_torchvisions_families_is_replaced(name):
    with torch.device("meta"):
        model = build_backbone(name, 7, (3, 224, 224))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers if layer.out_features in (7, 1000)] == [7]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_with_auxiliary_heads_give_plain_logits_in_training(name):
    with torch.device("meta"):
        model = build_backbone(name, 7, (3, 299, 299)).train()
        assert model(torch.zeros(2, 3, 299, 299)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet23", "num_classes": 10}, r"`backbone` must be .*got 'resnet23'. Nearest names: .*resnet32"),
        ({"name": "mlp", "num_classes": 0}, "`num_classes` must be at least 1, got 0"),
        ({"name": "convnet", "num_classes": 10, "input_shape": (784,)}, "`input_shape` must be .channels, height"),
        ({"name": "resnet18", "num_classes": 10, "input_shape": (1, 28, 28)}, "resnet18 takes 3 channels, got"),
        ({"name": "mlp", "num_classes": 10, "weights": "DEFAULT"}, "`weights` goes with torchvision models"),
        ({"name": "resnet18", "num_classes": 10, "weights": "BEST"}, "`weights` of resnet18 must be one of DEFAULT"),
        ({"name": "squeezenet1_0", "num_classes": 10}, "squeezenet1_0 ends in a convolution"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(**arguments)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet32", "resnet18"])
def test_a_bottleneck_gives_the_head_so_many_features(name):
    model = build_backbone(name, num_classes=10, input_shape=(3, 32, 32), bottleneck=16)
    *_, narrow, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    assert (narrow.out_features, head.in_features, head.out_features) == (16, 16, 10)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_bottleneck_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`bottleneck` must be at least 1, got 0"):
        build_backbone("mlp", num_classes=10, bottleneck=0)
