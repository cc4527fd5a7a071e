"""Learning without Memorizing distils what the network said, and where it looked, at the end of the last task."""

import copy

import pytest
import torch
import torch.nn.functional as F
from numbered_streams import fit_stream
from regularised_streams import Batches, Convolved, Notes, hidden
from torch import nn

from lightning_cl.callbacks import LearningWithoutForgetting, LearningWithoutMemorizing
from tests.modules import DigitsData

NAME = "learning_without_memorizing"


class Still(Convolved):
    """Does not move."""

    def __init__(self):
        super().__init__(lr=0.0)


def _map(features, rest, image, label, create_graph):
    """Grad-CAM of one image, channel by channel."""
    activation = features(image[None])
    if not activation.requires_grad:
        activation.requires_grad_()
    (slopes,) = torch.autograd.grad(rest(activation)[0, label], activation, create_graph=create_graph)
    total = 0
    for channel, slope in zip(activation[0], slopes[0], strict=True):
        total = total + slope.sum() / slope.numel() * channel
    total = total.clamp(min=0)
    length = (total**2).sum().sqrt()
    return total if float(length.detach()) == 0 else total / length


def _split(net, layer):
    """A network as two functions, neither of which works in place."""
    net = nn.Sequential(*(nn.ReLU() if isinstance(part, nn.ReLU) else part for part in net))
    return net[: layer + 1], net[layer + 1 :]


def _distance(student, teacher, images, classes, layer):
    features, rest = _split(student, layer)
    teacher = copy.deepcopy(teacher).requires_grad_(False)
    known, after = _split(teacher, layer)
    total = 0
    for image in images:
        label = int(teacher(image[None])[0, classes].argmax())
        wanted = _map(known, after, image, label, create_graph=False).detach()
        total = total + (wanted - _map(features, rest, image, label, create_graph=True)).abs().sum()
    return total / len(images)


def _divergence(student, teacher, classes, temperature):
    wanted = (teacher[:, classes] / temperature).softmax(1)
    return (wanted * (wanted.log() - (student[:, classes] / temperature).softmax(1).log())).sum(1).mean()


def test_an_unchanged_network_has_loss_zero():
    notes = Notes(NAME)
    fit_stream([LearningWithoutMemorizing(), notes], Still, DigitsData())
    assert notes.terms == [None] * 3 + [0.0] * 6


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({}, 4),
        ({"weight": 0.0, "gamma": 5.0}, 4),
        ({"weight": 0.5, "gamma": 2.0, "temperature": 3.0, "task_classes_only": False}, 4),
        ({"layer": "net.1", "gamma": 3.0}, 1),  # what follows works in place
        ({"layer": "net.4", "gamma": 0.0}, 4),
    ],
    ids=str,
)
def test_gradients_are_those_of_a_hand_written_loop(options, layer):
    notes, batches = Notes(NAME), Batches()
    fit_stream([LearningWithoutMemorizing(**options), batches, notes], Convolved, DigitsData())
    chosen = {"weight": 1.0, "gamma": 1.0, "temperature": 2.0, "task_classes_only": True, **options}
    for step, (images, labels) in enumerate(batches.steps):
        task, net = step // 3, notes.before[step]
        logits = net(images)
        loss = F.cross_entropy(
            hidden(logits, [2 * task, 2 * task + 1]) if chosen["task_classes_only"] else logits, labels
        )
        if task > 0:
            teacher, past = notes.networks[task - 1], list(range(2 * task))
            term = chosen["weight"] * _divergence(logits, teacher(images).detach(), past, chosen["temperature"])
            term = term + chosen["gamma"] * _distance(net, teacher, images, past, layer)
            assert notes.terms[step] == pytest.approx(float(term), rel=1e-4, abs=1e-5)
            loss = loss + term
        expected = torch.autograd.grad(loss, list(net.parameters()))
        for got, wanted in zip(notes.gradients[step], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_without_maps_it_is_learning_without_forgetting():
    runs = []
    for callback in (LearningWithoutForgetting(weight=3.0), LearningWithoutMemorizing(weight=3.0, gamma=0.0)):
        notes = Notes()
        fit_stream([callback, notes], Convolved, DigitsData())
        runs.append(notes.gradients)
    for first, second in zip(*runs, strict=True):
        assert all(map(torch.equal, first, second))
