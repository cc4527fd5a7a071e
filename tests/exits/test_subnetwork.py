"""A network up to one of its exits, as it is exported."""

import copy

import pytest
import torch
from networks import NETWORKS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_cl.exits import ExitNetwork, SubNetwork

LAYERS = ["blocks.3", "blocks.5"]


def _with_exits(name="convnet", layers=None, **options):
    build, shape, usual, classifier = NETWORKS[name]
    torch.manual_seed(0)
    network, inputs = build().eval(), torch.randn(6, *shape)
    with torch.no_grad():
        found = ExitNetwork.find(network, layers or usual, classifier, lambda: network(inputs), 6, "pool", **options)
    hooks = found.attach(network)
    with torch.no_grad(), hooks.collecting():
        network.eval()(inputs)
        answers = list(hooks.logits)
    return network, inputs, answers


@pytest.mark.parametrize("options", [{}, {"ensemble": "geometric"}], ids=["heads", "ensemble"])
@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet18", "vit", "nested"])
def test_it_answers_as_the_exit_does(name, options):
    network, inputs, answers = _with_exits(name, **options)
    for position in range(len(answers) - 1):
        with torch.no_grad():
            torch.testing.assert_close(SubNetwork(network, position)(inputs), answers[position])
    with torch.no_grad():
        assert torch.equal(network(inputs), _with_exits(name)[0](inputs))  # which goes on as before


def test_nothing_after_the_exit_is_computed():
    network, inputs, _ = _with_exits()
    costs = []
    for module in (SubNetwork(network, 0), SubNetwork(network, 1), network):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(inputs)
        costs.append(counter.get_total_flops())
    assert costs[0] < 0.8 * costs[1] < 0.8 * costs[2]


def test_a_trace_answers_the_same_for_any_batch(tmp_path):
    network, inputs, answers = _with_exits()
    with torch.no_grad():
        traced = torch.jit.trace(SubNetwork(network, 1), (inputs,))
    torch.jit.save(traced, tmp_path / "exit.pt")
    loaded = torch.jit.load(tmp_path / "exit.pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), answers[1])
        torch.testing.assert_close(loaded(inputs[:2]), answers[1][:2])
    assert str(traced.inlined_graph).count("aten::_convolution") < len([m for m in network.modules() if _is_conv(m)])


def _is_conv(module):
    return isinstance(module, nn.Conv2d)


@pytest.mark.slow
def test_an_onnx_file_answers_the_same(tmp_path):
    pytest.importorskip("onnxscript")  # what PyTorch exports with
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    network, inputs, answers = _with_exits("mlp")
    torch.onnx.export(SubNetwork(network, 0), (inputs,), tmp_path / "exit.onnx", dynamo=True, verbose=False)
    [logits] = reference.ReferenceEvaluator(str(tmp_path / "exit.onnx")).run(None, {"inputs_0": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), answers[0], atol=1e-4, rtol=1e-4)
    weights = {entry.name for entry in onnx.load(tmp_path / "exit.onnx").graph.initializer}
    assert not any("body.4" in name for name in weights)


@pytest.mark.parametrize("position", [-1, 2])
def test_an_exit_that_there_is_not(position):
    network, _, _ = _with_exits("convnet", layers=LAYERS)
    with pytest.raises(ValueError, match=f"`position` must be from 0 to 1, got {position}"):
        SubNetwork(network, position)


def test_a_network_without_exits():
    with pytest.raises(ValueError, match=r"`network` must have exits.*Linear has none"):
        SubNetwork(nn.Linear(2, 2), 0)


def test_a_copy_has_no_exits():
    network, inputs, _ = _with_exits()
    with pytest.raises(ValueError, match="A copy of one with exits has none"):
        SubNetwork(copy.deepcopy(network), 0)
    with pytest.raises(RuntimeError, match="A copy of a network has no exits"):
        copy.deepcopy(SubNetwork(network, 0))(inputs)


def test_it_is_its_network_in_mode_device_and_precision():
    network, inputs, answers = _with_exits()
    exported = SubNetwork(network, 0).double()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    torch.testing.assert_close(exported(inputs.double()).float(), answers[0])
    exported.train()
    assert network.training
    assert not exported.eval().training
    assert not network.training


def test_a_network_in_training_mode_does_not_answer():
    network, inputs, _ = _with_exits()
    exported = SubNetwork(network, 0)
    network.train()
    with pytest.raises(RuntimeError, match="training mode"):
        exported(inputs)
