"""Samples leave a batch where an exit is sure, and no answer depends on who else is in the batch."""

import pytest
import torch
from networks import NETWORKS, hooked, network_with_exits
from torch import nn

from lightning_cl.exits import ExitHooks, ExitPoint, LayersAtRest, layers_after
from lightning_cl.heads.exit_rules import confidence_of, first_confident, patience_of

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def _offline(network, hooks, inputs, threshold, confidence="max_softmax"):
    """What each sample gets if all exits are evaluated and the rule is applied afterwards."""
    with hooks.collecting():
        final = network(inputs)
        logits = torch.stack(hooks.logits, dim=1)
    confidences = patience_of(logits.argmax(-1)) if confidence == "patience" else confidence_of(logits, confidence)
    taken = first_confident(confidences, threshold)
    assert logits.shape[:2] == (len(inputs), len(hooks._points) + 1)
    return logits[torch.arange(len(inputs)), taken], taken, final


def _threshold(network, hooks, inputs, share=0.5):
    """A threshold that a share of the samples does not pass at the first exit."""
    with hooks.collecting():
        network(inputs)
        confidences = confidence_of(hooks.logits[0]).sort().values
    position = int(share * (len(inputs) - 1))
    return float(confidences[position : position + 2].mean())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "nested"])
def test_every_sample_gets_what_the_rule_gives_it_offline(name, share):
    network, hooks, inputs = hooked(name)
    for threshold in (0.0, _threshold(network, hooks, inputs, share), 1.0):
        hooks.threshold = None
        expected, taken, _ = _offline(network, hooks, inputs, threshold)
        hooks.threshold = threshold
        torch.testing.assert_close(network(inputs), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(hooks.taken, taken)
        assert len(taken.unique()) > (0 < threshold < 1)


@pytest.mark.parametrize("confidence", ["max_softmax", "entropy", "patience"])
@pytest.mark.parametrize("removes_rows", [True, False])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "vit"])
def test_every_rule_is_that_of_the_offline_evaluation(name, removes_rows, confidence):
    network, hooks, inputs = hooked(name)
    hooks.confidence, hooks.removes_rows = confidence, removes_rows
    seen = set()
    for threshold in (0.0, 0.05, 0.25, 0.3, 0.5, 0.7, 1.0):
        expected, taken, _ = _offline(network, hooks, inputs, threshold, confidence)
        hooks.threshold = threshold
        torch.testing.assert_close(network(inputs), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(hooks.taken, taken)
        hooks.threshold = None
        seen |= set(taken.tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("name", ["mlp", "resnet32", "mobilenet_v3_small", "vit"])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_answers_depend_on_no_other_sample(name, size):
    network, hooks, inputs = hooked(name)
    hooks.threshold = _threshold(network, hooks, inputs)
    whole, taken = network(inputs), hooks.taken
    assert len(taken.unique()) > 1
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
    answers, exits = [], []
    for part in inputs[order].split(size):
        answers.append(network(part))
        exits.append(hooks.taken)
    torch.testing.assert_close(torch.cat(answers), whole[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(exits), taken[order])


def test_what_a_module_does_after_the_head_is_done_to_every_exit():
    network, hooks, inputs = hooked("nested")
    expected, _, _ = _offline(network, hooks, inputs, 0.3)
    hooks.threshold = 0.3
    torch.testing.assert_close(network(inputs), 2 * expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_threshold_the_network_answers_as_if_there_were_no_exits(name):
    plain, _, _, _, inputs = network_with_exits(name)
    network, hooks, _ = hooked(name)
    assert torch.equal(network(inputs), plain(inputs))
    hooks.remove()
    assert torch.equal(network(inputs), plain(inputs))
    assert not any(module._forward_hooks for module in network.modules())


class Counts(nn.Module):
    """Counts the rows that it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, features):
        self.rows.append(len(features))
        return features


def _chain(count=3):
    """Layers that hand their input on, with exits that are sure of what is above 1, 2, ..."""
    layers = [Counts() for _ in range(count)]
    network = nn.Sequential(*layers, nn.Linear(1, 2)).eval()
    points = [ExitPoint(str(position), torch.zeros(1, 1), False) for position in range(count - 1)]

    class Above(nn.Module):
        def __init__(self, bound):
            super().__init__()
            self.bound = bound

        def forward(self, features):
            return torch.tensor([9.0, 0.0]).where(features > self.bound, 0.0)

    heads = [Above(bound) for bound in (2.5, 1.5)[: count - 1]]
    return network, layers, ExitHooks(network, points, heads, str(count))


def test_later_layers_get_the_rows_that_stay_and_no_others():
    network, layers, hooks = _chain()
    hooks.threshold = 0.9
    values = torch.tensor([[3.0], [0.0], [2.0], [1.0], [4.0]])
    network(values)
    assert [layer.rows for layer in layers] == [[5], [3], [2]]
    assert hooks.taken.tolist() == [0, 2, 1, 2, 0]


def test_when_all_have_left_the_layers_after_have_nothing_to_do():
    network, layers, hooks = _chain()
    rest = LayersAtRest(network, {"1": (1,), "2": (1,), "3": (2,)}, hooks)
    hooks.threshold = 0.9
    answers = network(torch.tensor([[3.0], [5.0]]))
    assert [layer.rows for layer in layers] == [[2], [], []]
    assert torch.equal(answers, torch.tensor([[9.0, 0.0], [9.0, 0.0]]))
    network(torch.tensor([[0.0], [5.0]]))
    assert [layer.rows for layer in layers] == [[2, 2], [1], [1]]
    rest.remove()
    assert "forward" not in vars(layers[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_at_rest_answers_the_same(name):
    network, points, heads, classifier, inputs = network_with_exits(name)
    shapes = layers_after(network, points[0].layer, classifier, lambda: network(inputs[:2]))
    assert shapes
    hooks = ExitHooks(network, points, heads, classifier)
    hooks.threshold = 0.0
    expected = network(inputs)
    calls = []
    rest = LayersAtRest(network, shapes, hooks)
    classes = {type(module) for key, module in network.named_modules() if key in shapes and key != classifier}
    handles = [network.get_submodule(key).register_forward_hook(lambda *a: calls.append(a[2].shape)) for key in shapes]
    assert torch.equal(network(inputs), expected)
    assert classes
    assert all(shape[0] == 0 for shape in calls)
    hooks.threshold = 0.3
    mixed, taken = network(inputs), hooks.taken
    rest.remove()
    for handle in handles:
        handle.remove()
    assert torch.equal(network(inputs), mixed)
    assert torch.equal(hooks.taken, taken)


@pytest.mark.parametrize("name", NETWORKS)
@torch.enable_grad()
def test_training_is_on_the_networks_own_answer_and_every_head_hears_it(name):
    torch.manual_seed(1)
    network, hooks, inputs = hooked(name)
    hooks.threshold = 0.0
    network.train()
    answer = network(inputs)
    assert len(hooks.logits) == len(hooks._heads) + 1
    first = next(network.parameters())
    for position, logits in enumerate(hooks.logits):
        (gradient,) = torch.autograd.grad(logits.sum() + logits.square().sum(), first, retain_graph=True)
        assert gradient.abs().sum() > 0, position
    if name != "nested":
        assert answer is hooks.logits[-1]


@pytest.mark.parametrize("name", NETWORKS)
@torch.enable_grad()
def test_detached_heads_send_nothing_into_the_network(name):
    network, hooks, inputs = hooked(name)
    hooks.detached = True
    network.train()
    network(inputs)
    sum(logits.square().sum() for logits in hooks.logits[:-1]).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.grad is not None for head in hooks._heads for parameter in head.parameters())
