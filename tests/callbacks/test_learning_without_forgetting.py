"""Learning without Forgetting distils what the network said at the end of the last task."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import AnyBatch, DataOf, Judge, Watch, fit_stream, same, same_weights
from regularised_streams import Batches, Frozen, Notes, hidden
from torch import nn

from lightning_cl.callbacks import DarkExperienceReplay, LearningWithoutForgetting, NearestMeanClassifier, Replay
from lightning_cl.datamodules import DomainIncremental, Permute
from tests.modules import CLASSIFIERS, DigitsData, Manual, Plain, PredictsLabels, digits, quiet_trainer

NAME = "learning_without_forgetting"


def _divergence(student, teacher, classes, temperature=2.0):
    """FACIL's cross-entropy of softened predictions, less the teacher's entropy, by hand."""
    wanted = (teacher[:, classes] / temperature).exp()
    wanted = wanted / wanted.sum(1, keepdim=True)
    got = (student[:, classes] / temperature).exp()
    got = got / got.sum(1, keepdim=True)
    return (-(wanted * got.log()) + wanted * wanted.log()).sum(1).mean()


def test_an_unchanged_network_has_loss_zero():
    notes = Notes(NAME)
    fit_stream([LearningWithoutForgetting(), notes], Frozen, DigitsData())
    assert notes.terms == [None] * 3 + [0.0] * 6


def test_a_network_that_has_moved_has_a_loss():
    notes = Notes(NAME)
    fit_stream([LearningWithoutForgetting(), notes], Plain, DigitsData())
    assert notes.terms[:4] == [None] * 3 + [0.0]
    assert min(notes.terms[4:6]) > 0


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "weight": 1.5}, {"task_classes_only": False}], ids=str)
def test_gradients_are_those_of_a_hand_written_loop(options):
    notes, batches = Notes(NAME), Batches()
    fit_stream([LearningWithoutForgetting(**options), batches, notes], Plain, DigitsData())
    weight, temperature = options.get("weight", 10.0), options.get("temperature", 2.0)
    for step, (images, labels) in enumerate(batches.steps):
        task, net = step // 3, notes.before[step]
        logits = net(images)
        seen = hidden(logits, [2 * task, 2 * task + 1]) if options.get("task_classes_only", True) else logits
        loss = F.cross_entropy(seen, labels)
        if task > 0:
            with torch.no_grad():
                teacher = notes.networks[task - 1](images)
            loss = loss + weight * _divergence(logits, teacher, list(range(2 * task)), temperature)
        expected = torch.autograd.grad(loss, list(net.parameters()))
        for got, wanted in zip(notes.gradients[step], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_layers_of_classes_that_are_not_trained_get_no_gradient_in_the_first_task():
    notes = Notes(NAME)
    fit_stream([LearningWithoutForgetting(), notes], Plain, DigitsData())
    head = notes.gradients[0][-2]
    assert bool((head[:2] != 0).any())
    assert bool((head[2:] == 0).all())


def test_the_teacher_answers_in_eval_mode_and_leaves_the_module_as_it_was():
    class Sees(Plain):
        def __init__(self):
            super().__init__(dropout=0.5, batch_norm=True)
            self.modes = []

        def forward(self, images):
            self.modes.append(self.net[1].training)
            return super().forward(images)

    _, module = fit_stream([LearningWithoutForgetting()], Sees, DigitsData())
    plain = Plain(dropout=0.5, batch_norm=True)
    fit_stream([], lambda: plain, DigitsData())
    assert module.net[1].num_batches_tracked == plain.net[1].num_batches_tracked == 9
    assert module.modes[-12:] == [False, True] * 6  # a teacher, a student, and nobody else
    assert all(layer.training for layer in module.modules())


def test_the_teacher_draws_no_random_numbers():
    class Draws(Plain):
        def forward(self, images):
            return super().forward(images + 0 * torch.rand(1))

    states = []
    for callbacks in ([], [LearningWithoutForgetting(weight=0)]):
        fit_stream(callbacks, Draws, DigitsData())
        states.append(torch.get_rng_state())
    assert same(*states)


def test_the_teacher_is_no_parameter_of_the_module():
    callback = LearningWithoutForgetting()
    _, module = fit_stream([callback], Plain, DigitsData())
    assert set(callback.teacher) == set(module.state_dict()) == set(Plain().state_dict())
    assert not any(tensor.requires_grad for tensor in callback.teacher.values())
    assert same(dict(callback.teacher), dict(module.state_dict()))


@pytest.mark.parametrize("other", [lambda: Replay(20), lambda: DarkExperienceReplay(20)], ids=["Replay", "DER"])
def test_beside_a_memory_the_loss_sees_all_classes_so_far(other):
    class Keeps(AnyBatch):
        def training_step(self, batch, batch_idx):
            self.seen.append((self.trainer.datamodule.current_task.index, self(batch[0].flatten(1)), batch[1]))
            return F.cross_entropy(self.seen[-1][1], batch[1])

    module = Keeps()
    module.seen = []
    fit_stream([LearningWithoutForgetting(), other()], lambda: module, DataOf())
    for task, logits, _ in module.seen:
        shown = (logits > -1e4).all(0).nonzero().squeeze(1).tolist()
        assert shown == list(range(2 * task + 2))


def test_where_all_tasks_have_the_same_classes_none_is_hidden():
    class Keeps(Plain):
        def training_step(self, batch, batch_idx):
            assert bool((self(batch[0]) > -1e4).all())
            return super().training_step(batch, batch_idx)

    notes = Notes(NAME)
    sequence = DomainIncremental(DigitsData(), transforms=[None, Permute(1)])
    fit_stream([LearningWithoutForgetting(), notes], Keeps, sequence=sequence)
    assert notes.terms[-1] > 0


def test_a_head_that_grows_is_compared_on_the_classes_that_the_teacher_has():
    class Grows(Plain):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(24, 2)

        def on_task_start(self, task):
            old, new = self.net[4], nn.Linear(24, 2 * task.index + 2)
            with torch.no_grad():
                new.weight[: old.out_features] = old.weight
                new.bias[: old.out_features] = old.bias
            self.net[4] = new
            self.trainer.strategy.setup_optimizers(self.trainer)

    callback, notes = LearningWithoutForgetting(head="net.4"), Notes(NAME)
    fit_stream([callback, notes], Grows, DigitsData())
    assert callback.teacher["net.4.weight"].shape == (6, 24)
    assert notes.terms[3] == pytest.approx(0, abs=1e-6)
    assert notes.terms[4] > 0


@pytest.mark.parametrize(("module", "base"), [*CLASSIFIERS, (PredictsLabels, DigitsData)])
def test_any_classifier_is_held_to_its_past(module, base):
    callback = LearningWithoutForgetting(task_classes_only=False)  # or a single linear layer would not move for them
    trainer, _ = fit_stream([callback], module, base())
    assert callback.classes == tuple(range(6))
    assert float(trainer.callback_metrics[f"loss/{NAME}"]) > 0


def _accuracies(callbacks):
    """Of each task at the end, over all classes."""
    images, labels = digits(24, 10)
    _, module = fit_stream(callbacks, lambda: Plain(lr=0.05), DigitsData(), max_epochs=10)
    right = (module.eval()(images).argmax(1) == labels).float()
    return torch.stack([right[labels // 2 == task].mean() for task in range(3)])


def test_old_tasks_are_forgotten_less():
    assert _accuracies([])[:2].max() < 0.1
    held = _accuracies([LearningWithoutForgetting()])
    assert held[:2].min() > 0.6
    assert held.mean() > _accuracies([LearningWithoutForgetting(weight=0)]).mean() + 0.05


def test_an_ordinary_fit_is_left_alone():
    callback, modules = LearningWithoutForgetting(), []
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        modules.append(Plain())
        quiet_trainer(callbacks=callbacks).fit(modules[-1], datamodule=DigitsData())
    assert same_weights(*modules)
    assert callback.teacher is None


def test_a_memory_and_a_nearest_mean_head_go_with_it_in_any_order():
    runs = []
    for turn in (1, -1):
        callbacks = [LearningWithoutForgetting(), NearestMeanClassifier(), Replay(20), Watch()]
        _, module = fit_stream(callbacks[::turn], AnyBatch, DataOf())
        runs.append((dict(module.state_dict()), callbacks[0].state_dict()))
    assert same(*runs)


def test_a_refused_task_leaves_teacher_and_classes_as_they_were():
    class Looks(Notes):
        def on_task_start(self, trainer, pl_module, task):
            states[task.index] = copy.deepcopy(callback.state_dict())

    callback, states = LearningWithoutForgetting(), {}
    fit_stream([callback, Judge(1), Looks(NAME)], Plain, DigitsData())
    assert states[2]["classes"] == [0, 1]
    assert same(states[1], states[2])


def test_manual_optimisation_takes_the_term_by_name():
    with pytest.raises(MisconfigurationException, match=r"LearningWithoutForgetting adds a loss.*added_loss"):
        fit_stream([LearningWithoutForgetting()], Manual, DigitsData())


def test_a_step_that_goes_around_the_layer_is_told_so():
    class Around(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(F.linear(self.net[:4](batch[0]), self.net[4].weight), batch[1])

    with pytest.raises(ValueError, match=r"head='net.4'.*did not call that layer"):
        fit_stream([LearningWithoutForgetting()], Around, DigitsData())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1}, ValueError, "`weight` must be 0 or more and finite, got -1"),
        ({"weight": float("nan")}, ValueError, "`weight` must be 0 or more and finite, got nan"),
        ({"weight": "10"}, TypeError, "`weight` must be a number, got '10'"),
        ({"temperature": 0}, ValueError, "`temperature` must be above 0 and finite, got 0"),
        ({"temperature": float("nan")}, ValueError, "`temperature` must be above 0 and finite, got nan"),
    ],
    ids=str,
)
def test_values_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        LearningWithoutForgetting(**arguments)
