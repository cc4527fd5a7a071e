"""Samples leave a batch where an exit is sure, and no answer depends on who else is in the batch."""

import pytest
import torch
import torchvision
from networks import NETWORKS, hooked, network_with_exits
from torch import nn

from lightning_cl.exits import ExitHeads, ExitHooks, ExitNetwork, ExitPoint, LayersAtRest, layers_after
from lightning_cl.heads.exit_rules import confidence_of, first_confident, patience_of
from lightning_cl.taps import own_outputs

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


@pytest.mark.parametrize("removes_rows", [True, False])
@pytest.mark.parametrize("ensemble", ["cascade", "geometric"])
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_exits_that_look_back_answer_as_offline(name, ensemble, removes_rows):
    network, hooks, inputs = hooked(name, ensemble=ensemble)
    hooks.removes_rows = removes_rows
    threshold = _threshold(network, hooks, inputs)
    expected, taken, _ = _offline(network, hooks, inputs, threshold)
    hooks.threshold = threshold
    torch.testing.assert_close(network(inputs), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(hooks.taken, taken)
    assert len(taken.unique()) > 1


def test_where_own_outputs_are_wanted_no_exit_answers():
    network, hooks, inputs = hooked("convnet", ensemble="geometric")
    own = network(inputs)
    hooks.threshold, hooks.correction = 0.0, lambda logits: logits + 1
    with own_outputs():
        assert torch.equal(network(inputs), own)
    assert not torch.equal(network(inputs), own)


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
    return network, layers, ExitHooks(network, points, ExitHeads(heads), str(count))


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
    shapes = layers_after(network, points[0].layer, classifier, lambda: network(inputs[:2]), 2)
    assert shapes
    hooks = ExitHooks(network, points, ExitHeads(heads), classifier)
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
    assert len(hooks.logits) == hooks.count
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
    assert all(parameter.grad is not None for parameter in hooks._heads.parameters())


# ------------------------------------------------------------------ networks that cannot do with no rows


class Views(nn.Module):
    """Takes its features apart as many do, with -1 for their number."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 64, 5)

    def forward(self, images):
        features = self.first(images).relu()
        return self.fc(features.view(features.size(0), -1))


class Positions(nn.Module):
    """Adds an embedding of positions after its exit."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.positions = nn.Embedding(8, 6)
        self.mix = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, images):
        tokens = self.first(images[:, 0])
        tokens = tokens + self.positions(torch.arange(tokens.shape[1]))
        return self.fc(self.mix(tokens).mean(1))


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, 0.0), 1, enable_nested_tensor=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, images):
        tokens = self.first(images[:, 0])
        return self.fc(self.encoder(tokens.transpose(0, 1)).mean(0))


def _network_of(root, inputs):
    root.eval()
    return ExitNetwork.find(root, ["first"], "fc", lambda: root(inputs), len(inputs), "pool")


@pytest.mark.parametrize("threshold", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("build", [Views, Positions, SequenceFirst])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_all_may_leave_whatever_comes_after(build, size, threshold):
    torch.manual_seed(0)
    root, inputs = build(), torch.randn(8, 1, 8, 8)
    network = _network_of(root, inputs)
    assert network.mixing_layer is None
    hooks = network.attach(root.eval())
    expected, taken, _ = _offline(root, hooks, inputs, threshold)
    hooks.threshold = threshold
    answers, exits = [], []
    for part in inputs.split(size):
        answers.append(root(part))
        exits.append(hooks.taken)
    network.detach()
    torch.testing.assert_close(torch.cat(answers), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(exits), taken)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        features = self.first(images)
        return self.fc((features + self.second(features)).mean((2, 3)))


def test_images_may_have_another_size_than_in_the_dry_run():
    root = Residual()
    network = _network_of(root, torch.randn(8, 1, 8, 8))
    hooks = network.attach(root.eval())
    hooks.threshold = 0.0
    assert root(torch.randn(4, 1, 12, 12)).shape == (4, 5)
    assert hooks.taken.tolist() == [0] * 4
    network.detach()


class Centred(nn.Module):
    """Looks across the batch, before a layer that begins with zeros."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.fc = nn.Linear(6, 5)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images):
        hidden = self.first(images[:, 0, 0])
        return self.fc(hidden - hidden.mean(0))


def test_looking_across_the_batch_is_noticed_before_a_layer_of_zeros():
    assert _network_of(Centred(), torch.randn(8, 1, 8, 8)).mixing_layer == "first"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
@torch.enable_grad()
def test_dropout_in_place_after_an_exit_does_not_break_training(name):
    root = getattr(torchvision.models, name)(num_classes=5)
    inputs = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        network = ExitNetwork.find(root.eval(), ["avgpool"], name_of(root), lambda: root(inputs), 4, "pool")
    hooks = network.attach(root.train())
    root(inputs)
    sum(logits.square().sum() for logits in hooks.logits).backward()
    network.detach()


def name_of(root):
    """The last linear layer."""
    return [name for name, layer in root.named_modules() if isinstance(layer, nn.Linear)][-1]


def test_a_forward_that_somebody_put_on_a_layer_comes_back():
    root, inputs = Residual(), torch.randn(8, 1, 8, 8)
    network = _network_of(root, inputs)
    mine = root.second.forward
    root.second.forward = mine
    network.attach(root)
    network.detach()
    assert vars(root.second)["forward"] is mine


def test_exits_go_on_no_other_module():
    network, other = _network_of(Residual(), torch.randn(8, 1, 8, 8)), nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="exits are of another module: Sequential has no layer 'first'"):
        network.attach(other)
    assert not hasattr(other, "early_exits")


def test_heads_have_the_precision_of_their_features():
    root = Residual().double()
    network = _network_of(root, torch.randn(8, 1, 8, 8).double())
    hooks = network.attach(root)
    hooks.threshold = 0.0
    assert root(torch.randn(2, 1, 8, 8).double()).dtype == torch.float64
    network.detach()
