"""Learning without Memorizing distils what the network said, and where it looked, at the end of the last task."""

import copy

import pytest
import torch
import torch.nn.functional as F
from command_line import OPTIONS, error_of, options_for
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import Judge, fit_stream, same, same_weights
from regularised_streams import Batches, Convolved, Notes, convolutions, hidden
from torch import nn

from lightning_cl.callbacks import (
    LearningWithoutForgetting,
    LearningWithoutMemorizing,
    NearestMeanClassifier,
    Replay,
    StabilityGapTracker,
    TaskEarlyStopping,
)
from tests.modules import DigitsData, Plain, TorchvisionModule, digits, quiet_trainer

NAME = "learning_without_memorizing"


class Still(Convolved):
    """Does not move."""

    def __init__(self):
        super().__init__(lr=0.0)


class Terms(Callback):
    """Keeps each term and nothing else."""

    def __init__(self):
        self.terms = []

    def on_train_batch_end(self, trainer, *args):
        self.terms.append(float(trainer.callback_metrics.get(f"loss/{NAME}", 0)))


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


def _distance_to_the_first_teacher(callback):
    """How far the maps of the first task's test images are from where the network looked when that task ended."""
    notes, images = Notes(), digits(24, 10, 2)[0]
    fit_stream([callback, notes], lambda: Convolved(lr=0.02), DigitsData(), max_epochs=8)
    return float(_distance(notes.networks[2], notes.networks[0], images, [0, 1], 4).detach())


def test_the_network_goes_on_looking_where_it_looked():
    said = _distance_to_the_first_teacher(LearningWithoutMemorizing(gamma=0.0))
    looked = _distance_to_the_first_teacher(LearningWithoutMemorizing(gamma=1.0))
    assert looked < 0.5 * said


def test_the_teacher_is_no_parameter_of_the_module():
    callback = LearningWithoutMemorizing()
    _, module = fit_stream([callback], Convolved, DigitsData())
    assert same(dict(callback.teacher), dict(module.state_dict()))
    assert not any(tensor.requires_grad for tensor in callback.teacher.values())
    assert set(dict(module.named_parameters())) == set(dict(Convolved().named_parameters()))


def test_neither_teacher_nor_dry_run_changes_statistics_or_draws():
    class Draws(Convolved):
        def __init__(self):
            super().__init__(dropout=0.3, batch_norm=True)

        def forward(self, images):
            return super().forward(images + 0 * torch.rand(1))

    ends = []
    for callbacks in ([], [LearningWithoutMemorizing()]):
        _, module = fit_stream(callbacks, Draws, DigitsData())
        ends.append((torch.get_rng_state(), module.net[2].num_batches_tracked))
    assert same(*ends)


def test_memory_heads_observers_and_early_stopping_go_with_it_in_any_order():
    runs = []
    for turn in (1, -1):
        callback = LearningWithoutMemorizing()
        stopping = TaskEarlyStopping("val_acc", mode="max", patience=1)
        callbacks = [callback, NearestMeanClassifier(), Replay(20), stopping, StabilityGapTracker(probe_size=10)]
        _, module = fit_stream(callbacks[::turn], Convolved, DigitsData(), limit_val_batches=1.0, max_epochs=3)
        runs.append((dict(module.state_dict()), callback.state_dict(), torch.get_rng_state()))
    assert same(*runs)


def test_a_refused_task_leaves_teacher_and_classes_as_they_were():
    class Looks(Notes):
        def on_task_start(self, trainer, pl_module, task):
            states[task.index] = copy.deepcopy(callback.state_dict())

    callback, states = LearningWithoutMemorizing(), {}
    fit_stream([callback, Judge(1), Looks(NAME)], Convolved, DigitsData())
    assert states[2]["classes"] == [0, 1]
    assert same(states[1], states[2])


def test_a_body_that_is_not_trained_still_has_maps():
    class Head(Convolved):
        def __init__(self):
            super().__init__()
            self.net[:5].requires_grad_(False)

    callback, notes = LearningWithoutMemorizing(weight=0.0), Terms()
    fit_stream([callback, notes], Head, DigitsData())
    assert callback.map_layer == "net.4"
    assert notes.terms[3] == 0
    assert min(notes.terms[4:6]) > 0


def test_a_head_that_grows_is_compared_on_the_classes_that_the_teacher_has():
    class Grows(Convolved):
        def __init__(self):
            super().__init__()
            self.net[9] = nn.Linear(12, 2)

        def on_task_start(self, task):
            old, new = self.net[9], nn.Linear(12, 2 * task.index + 2)
            with torch.no_grad():
                new.weight[: old.out_features] = old.weight
                new.bias[: old.out_features] = old.bias
            self.net[9] = new
            self.trainer.strategy.setup_optimizers(self.trainer)

    callback, notes = LearningWithoutMemorizing(head="net.9"), Notes(NAME)
    fit_stream([callback, notes], Grows, DigitsData())
    assert callback.teacher["net.9.weight"].shape == (6, 12)
    assert notes.terms[3] == pytest.approx(0, abs=1e-5)
    assert notes.terms[4] > 0


class Compiled(Convolved):
    """Counts how often its network is compiled; the backward is not."""

    def __init__(self):
        super().__init__()
        self.graphs, self.graphs_by_step = 0, []
        self.compiled = torch.compile(self.answer, backend=self.count)

    def count(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def answer(self, images):
        features = self.net[4](self.net[3](self.net[1](self.net[0](images))))
        return self.net[9](self.net[8](self.net[7](self.net[5](features))))

    def forward(self, images):
        return self.compiled(images)

    def on_train_batch_end(self, *args):
        self.graphs_by_step.append(self.graphs)


@pytest.mark.slow
def test_a_compiled_network_is_not_compiled_again_for_each_step():
    torch.compiler.reset()
    runs = []
    for module in (Convolved(), Compiled()):
        runs.append(Terms())
        torch.manual_seed(0)
        module.net = convolutions()
        fit_stream([LearningWithoutMemorizing(), runs[-1]], module, DigitsData())
    assert runs[1].terms == pytest.approx(runs[0].terms, abs=1e-4)
    assert module.graphs_by_step[0] > 0
    assert len(set(module.graphs_by_step[3:])) == 1  # from the first step with a teacher on


def test_a_network_of_torchvision_is_held():
    class Slow(TorchvisionModule):
        def __init__(self):
            super().__init__()
            self.lr = 0.001

    callback, terms = LearningWithoutMemorizing(layer="net.stage3"), Terms()
    fit_stream([callback, terms], Slow, DigitsData(), limit_train_batches=1)
    assert min(terms.terms[1:]) > 0
    assert max(terms.terms) < 10


def test_an_ordinary_fit_is_left_alone():
    callback, modules = LearningWithoutMemorizing(), []
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        modules.append(Plain())
        quiet_trainer(callbacks=callbacks).fit(modules[-1], datamodule=DigitsData())
    assert same_weights(*modules)
    assert callback.teacher is None


# ------------------------------------------------------------------ what does not go


class Stepped(Convolved):
    """Notes whether it was trained."""

    stepped = False

    def training_step(self, batch, batch_idx):
        self.stepped = True
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("net.41", r"`layer='net.41'` names no layer of Stepped.*fit: .*'net.3', 'net.4'\."),
        ("net.7", r"`layer='net.7'` of Stepped puts out \(8, 12\).*fit: .*'net.3', 'net.4'\."),
    ],
)
def test_a_layer_without_maps_is_refused_before_the_first_step(layer, message):
    module = Stepped()
    with pytest.raises(MisconfigurationException, match=rf"LearningWithoutMemorizing: `layer` must.*{message}"):
        fit_stream([LearningWithoutMemorizing(layer=layer)], module, DigitsData())
    assert not module.stepped


def test_a_network_without_maps_is_refused_before_the_first_step():
    with pytest.raises(MisconfigurationException, match=r"`layer` must name .*No layer of Plain .*`head='net.4'`"):
        fit_stream([LearningWithoutMemorizing()], Plain, DigitsData())


def test_a_network_without_maps_is_refused_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = options_for("LearningWithoutMemorizing", weight=2, gamma=0.5, temperature=3, layer="null")
    error = error_of(capsys, *OPTIONS, "--model.backbone=mlp", *options)
    assert "`layer` must name a layer with outputs (batch, channels, height, width)" in error


class Around(Convolved):
    def training_step(self, batch, batch_idx):
        features = F.max_pool2d(self.net[:4](batch[0]), 2)
        return F.cross_entropy(self.net[5:](features), batch[1])


class Enlarges(Convolved):
    def __init__(self):
        super().__init__()
        self.net[5] = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())

    def training_step(self, batch, batch_idx):
        images = F.interpolate(batch[0].view(-1, 1, 8, 8), scale_factor=2)
        return F.cross_entropy(self.net[1:](images), batch[1])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Around, r"`layer='net.4'` puts out, and the step did not call it"),
        (Enlarges, r"`layer='net.4'` gave maps of 64 positions in `training_step`, and of 16"),
    ],
)
def test_a_step_whose_maps_cannot_be_compared_is_told_so(module, message):
    with pytest.raises(ValueError, match=message):
        fit_stream([LearningWithoutMemorizing(layer="net.4")], module, DigitsData())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1}, ValueError, "`weight` must be 0 or more and finite, got -1"),
        ({"gamma": -0.5}, ValueError, "`gamma` must be 0 or more and finite, got -0.5"),
        ({"gamma": float("inf")}, ValueError, "`gamma` must be 0 or more and finite, got inf"),
        ({"gamma": "1"}, TypeError, "`gamma` must be a number, got '1'"),
        ({"temperature": 0}, ValueError, "`temperature` must be above 0 and finite, got 0"),
        ({"layer": 4}, TypeError, "`layer` must be the name of a layer or None, got 4"),
    ],
    ids=str,
)
def test_values_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        LearningWithoutMemorizing(**arguments)
