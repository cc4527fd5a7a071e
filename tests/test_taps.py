"""A head answers in place of a layer, in evaluation only, and leaves no trace once it is taken off."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from lightning_cl.taps import ClassMask, LayerTap, LogitTap, OutputReplacement, find_head, layers_matching, own_outputs


class Net(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = head or nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.backbone(images))


class Answer(nn.Module):
    """Says the same whatever it is asked."""

    def __init__(self, answer=7.0):
        super().__init__()
        self.register_buffer("answer", torch.tensor(answer))

    def forward(self, features):
        return self.answer.expand(len(features), 3)


IMAGES = torch.ones(2, 4)


def _answers(net, answer=7.0):
    with torch.no_grad():
        return bool((net(IMAGES) == answer).all())


def _net(head="answer"):
    torch.manual_seed(0)
    net = Net()
    return net, OutputReplacement(net, net.head, Answer() if head == "answer" else head)


# ------------------------------------------------------------------ when the head answers


def test_the_head_answers_in_eval_mode():
    net, _ = _net()
    assert _answers(net.eval())


def test_the_layer_answers_while_the_module_trains():
    net, _ = _net()
    expected = net.head(net.backbone(IMAGES))
    assert torch.equal(net.train()(IMAGES), expected)


def test_a_frozen_part_in_eval_mode_does_not_bring_the_head_into_training():
    net, _ = _net()
    net.train()
    net.backbone.eval()
    net.head.eval()
    assert not _answers(net)


def test_the_head_answers_where_a_part_stays_in_training_mode():
    net, _ = _net()
    net.eval()
    net.head.train()
    assert _answers(net)


def test_gradients_of_training_are_those_without_a_head():
    nets = []
    for replaced in (True, False):
        net, replacement = _net()
        if not replaced:
            replacement.remove()
        net.train()(IMAGES).square().sum().backward()
        nets.append(net)
    for with_head, without in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(with_head.grad, without.grad)


def test_the_head_gets_the_input_of_the_layer():
    net, _ = _net(nn.Identity())
    torch.testing.assert_close(net.eval()(IMAGES), net.backbone(IMAGES))


def test_a_layer_that_is_called_by_keyword_is_replaced_too():
    class ByKeyword(Net):
        def forward(self, images):
            return self.head(input=self.backbone(images))

    net = ByKeyword()
    OutputReplacement(net, net.head, Answer())
    assert _answers(net.eval())


def test_without_a_head_the_layer_answers():
    net, replacement = _net(head=None)
    net.eval()
    assert not _answers(net)
    replacement.head = Answer()
    assert _answers(net)


def test_scores_have_the_precision_of_the_layers_output():
    net, _ = _net()
    assert net.eval().double()(IMAGES.double()).dtype == torch.float64


def test_a_head_that_is_put_in_later_answers_next():
    net, replacement = _net()
    replacement.head = Answer(5.0)
    assert _answers(net.eval(), 5.0)


def test_what_looks_at_the_layer_sees_the_heads_answer():
    net, _ = _net()
    with LayerTap({"head": net.head}) as tap:
        net.eval()(IMAGES)
    assert tap.outputs["head"].eq(7).all()
    assert torch.equal(tap.inputs["head"], net.backbone(IMAGES))


# ------------------------------------------------------------------ own outputs


def test_in_own_outputs_the_layer_answers():
    net, _ = _net()
    net.eval()
    with own_outputs():
        assert not _answers(net)
    assert _answers(net)


def test_own_outputs_can_be_nested():
    net, _ = _net()
    net.eval()
    with own_outputs():
        with own_outputs():
            assert not _answers(net)
        assert not _answers(net)
    assert _answers(net)


def test_own_outputs_end_with_an_exception():
    net, _ = _net()
    net.eval()
    with pytest.raises(KeyError), own_outputs():
        raise KeyError
    assert _answers(net)


# ------------------------------------------------------------------ taken off, and copied


def test_a_replacement_that_is_taken_off_leaves_no_hook():
    net, replacement = _net()
    replacement.remove()
    assert not any(layer._forward_hooks for layer in net.modules())
    assert not _answers(net.eval())


def test_taking_it_off_twice_does_no_harm():
    net, replacement = _net()
    other = OutputReplacement(net, net.head, Answer(5.0))
    replacement.remove()
    replacement.remove()
    assert _answers(net.eval(), 5.0)
    other.remove()


def test_the_head_is_no_part_of_the_module():
    net, _ = _net()
    assert set(net.state_dict()) == {"backbone.0.weight", "backbone.0.bias", "head.weight", "head.bias"}


def test_a_copy_of_the_module_has_the_head():
    net, _ = _net()
    assert _answers(copy.deepcopy(net).eval())


def test_a_copy_is_asked_for_its_own_mode():
    net, _ = _net()
    twin = copy.deepcopy(net)
    net.eval()
    assert not _answers(twin.train())
    net.train()
    assert _answers(twin.eval())


def test_a_copy_keeps_its_head_when_the_originals_is_taken_off():
    net, replacement = _net()
    twin = copy.deepcopy(net)
    replacement.remove()
    assert _answers(twin.eval())
    assert not _answers(net.eval())


def test_a_copy_has_a_head_of_its_own():
    net, replacement = _net()
    twin = copy.deepcopy(net)
    replacement.head.answer.fill_(5.0)
    assert _answers(net.eval(), 5.0)
    assert _answers(twin.eval(), 7.0)


# ------------------------------------------------------------------ the classification layer


def _pointwise(outputs, **settings):
    return nn.Conv2d(8, outputs, 1, **settings)


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(8, 3),
        weight_norm(nn.Linear(8, 3)),
        old_weight_norm(nn.Linear(8, 3)),
        _pointwise(3),
        weight_norm(_pointwise(3)),
        nn.Sequential(nn.Conv2d(8, 3, 3), _pointwise(3), nn.AdaptiveAvgPool2d(1)),
    ],
    ids=["linear", "weight_norm", "old weight_norm", "convolution", "weight_norm of a convolution", "in a sequence"],
)
def test_the_one_layer_with_an_output_for_each_class_is_found(head):
    expected = "head.1" if isinstance(head, nn.Sequential) else "head"
    assert find_head(Net(head), 3, None) == expected


def test_a_linear_layer_comes_before_convolutions():
    net = Net()
    net.squeeze = _pointwise(3)
    assert find_head(net, 3, None) == "head"


def test_a_layer_that_is_named_needs_no_outputs_for_the_classes():
    assert find_head(Net(), 10, "head") == "head"
    assert find_head(Net(), None, "backbone.0") == "backbone.0"


def test_a_shared_layer_is_one_layer():
    net = Net()
    net.alias = net.head
    assert find_head(net, 3, None) == "head"


def _error(net, num_classes=3, head=None):
    with pytest.raises(ValueError) as error:
        find_head(net, num_classes, head)
    return str(error.value)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 3), lambda: weight_norm(nn.Linear(8, 3))])
def test_two_linear_layers_that_fit_are_both_named(make):
    net = Net(make())
    net.second = make()
    error = _error(net)
    assert "('head', 'second')" in error
    assert "3 outputs" in error
    assert "`head=...`" in error


def test_two_convolutions_that_fit_are_both_named_and_listed():
    error = _error(Net(nn.Sequential(_pointwise(3), _pointwise(3))))
    assert "('head.0', 'head.1')" in error
    assert "Conv2d" in error


def test_where_no_layer_fits_the_layers_that_there_are_are_listed():
    error = _error(Net(), num_classes=10)
    assert "No linear layer has 10 outputs" in error
    assert "'backbone.0'" in error
    assert "'head' (Linear(in_features=8, out_features=3" in error


def test_where_no_layer_fits_the_pointwise_convolutions_are_listed_too():
    assert "'head' (Conv2d(8, 3" in _error(Net(_pointwise(3)), num_classes=10)


def test_an_unknown_number_of_classes_is_said():
    assert "the number of classes, which is unknown" in _error(Net(), num_classes=None)


def test_a_wider_convolution_is_no_classification_layer():
    assert "No linear layer" in _error(Net(nn.Conv2d(8, 3, 3)))


def test_a_name_that_is_no_layer_is_shown_with_the_layers():
    error = _error(Net(), head="fc")
    assert "`head='fc'` names no layer of Net" in error
    assert "'backbone.0'" in error
    assert "'head'" in error


# ------------------------------------------------------------------ classes that are hidden


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.Linear(8, 3), (2, 8), 1),
        (nn.Linear(8, 3), (2, 3, 3, 8), 3),
        (nn.Conv2d(8, 3, 1), (2, 8, 3, 3), 1),
        (nn.Conv1d(8, 3, 1), (2, 8, 3), 1),
        (nn.Sequential(nn.Linear(3, 3), nn.Conv2d(8, 3, 1), nn.Identity()), (2, 8, 3, 3), 1),
    ],
    ids=["linear", "linear of positions", "convolution", "convolution of sequences", "in a sequence"],
)
def test_classes_are_hidden_where_the_layer_has_them(layer, shape, dim):
    with LogitTap(layer, ClassMask([0, 2])) as tap:
        logits = layer(torch.ones(shape))
    hidden = (logits != tap.logits).movedim(dim, 0)
    assert [bool(part.all()) for part in hidden] == [False, True, False]
    assert not hidden[[0, 2]].any()


# ------------------------------------------------------------------ layers by pattern


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2))
        self.early_exits = nn.ModuleDict({"exit": nn.Linear(4, 3)})
        self.fc = nn.Linear(4, 3)


def test_without_patterns_all_layers_with_weights_match_in_the_order_of_the_module():
    names = ["stem", "blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "fc"]
    assert list(layers_matching(Residual(), None)) == names


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["fc", "stem"], ["stem", "fc"]),
        (["blocks.*.1"], ["blocks.0.1", "blocks.1.1"]),
        (["blocks.[1-9].?"], ["blocks.1.0", "blocks.1.1", "blocks.1.2"]),
        (["blocks.1", "*.1"], ["blocks.0.1", "blocks.1", "blocks.1.1"]),
    ],
    ids=str,
)
def test_layers_match_shell_patterns(patterns, names):
    net = Residual()
    assert list(layers_matching(net, patterns)) == [name for name in dict(net.named_modules()) if name in names]
    assert set(layers_matching(net, patterns)) == set(names)


def test_a_layer_with_two_names_counts_once():
    net = Residual()
    net.same = net.fc
    assert list(layers_matching(net, ["*c", "s*m*"])) == ["stem", "fc"]


@pytest.mark.parametrize("pattern", ["block", "Stem", "early_exits*", ""])
def test_a_pattern_without_a_layer_is_an_error_that_lists_the_layers(pattern):
    with pytest.raises(ValueError, match=r"`layers` has .*matches no layer of Residual.*'stem', 'blocks.0.0'.*'fc'"):
        layers_matching(Residual(), ["fc", pattern])
