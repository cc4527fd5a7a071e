"""Elastic Weight Consolidation pulls back the weights that mattered."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import IMAGES, LABELS, AnyBatch, DataOf, Judge, Watch, fit_stream, same, same_weights
from regularised_streams import Batches, Frozen, Notes, hidden
from torch import nn

from lightning_cl.callbacks import (
    EarlyExits,
    ElasticWeightConsolidation,
    LearningWithoutForgetting,
    NearestMeanClassifier,
    Replay,
)
from lightning_cl.hashing import mix
from lightning_cl.tasks.fisher import _SALT
from tests.modules import CLASSIFIERS, BoringClassifier, DigitsData, Manual, Plain, TwoHeads, quiet_trainer

NAME = "elastic_weight_consolidation"
BODY = ["net.0.weight", "net.0.bias"]


def _reference_fisher(net, task, kind="empirical", classes=None):
    """The mean of squared gradients, sample by sample."""
    net = copy.deepcopy(net).eval()
    chosen = (task == LABELS // 2).nonzero().squeeze(1)
    totals = [torch.zeros_like(part) for part in net[0].parameters()]
    for place, number in enumerate(chosen.tolist()):
        logits = net(IMAGES[number][None])
        scores = hidden(logits, classes or [2 * task, 2 * task + 1]).log_softmax(1)[0]
        label = int(LABELS[number])
        if kind == "true":
            draw = (mix(5, _SALT, task, place) >> 40) / 2**23
            label = int((scores.detach().exp().cumsum(0) < draw).sum())
        for total, gradient in zip(totals, torch.autograd.grad(scores[label], list(net[0].parameters())), strict=True):
            total += gradient.square() / len(chosen)
    return dict(zip(BODY, totals, strict=True))


def _close(got, wanted):
    assert got.keys() == wanted.keys()
    for name, part in wanted.items():
        torch.testing.assert_close(got[name], part, rtol=1e-4, atol=1e-8)
        assert bool((part > 0).any())


class Keeps(Notes):
    """Keeps what EWC knows after each task."""

    def __init__(self, callback):
        super().__init__(NAME)
        self.callback = callback
        self.states = []

    def on_task_end(self, trainer, pl_module, task):
        super().on_task_end(trainer, pl_module, task)
        self.states.append(self.callback.state_dict())


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_the_fisher_information_is_that_of_a_slow_reference(kind, norm):
    callback = ElasticWeightConsolidation(fisher=kind)
    keeps = Keeps(callback)
    module = lambda: AnyBatch(dropout=0.4, batch_norm=norm)  # noqa: E731
    fit_stream([callback, keeps], module, DataOf(), stream={"seed": 5, "num_tasks": 3})
    wanted = _reference_fisher(keeps.networks[0], 0, kind)
    got = {name: keeps.states[0]["importance"][name] for name in BODY}
    _close(got, wanted)
    assert set(keeps.states[0]["importance"]) - set(BODY) == ({"net.1.weight", "net.1.bias"} if norm else set())


def test_a_run_that_is_only_tried_out_looks_at_a_few_samples():
    looked = []

    class Counts(AnyBatch):
        def forward(self, images):
            looked.append(len(images))
            return super().forward(images * (1.0 if float(images.sum()) > -1 else 2.0))  # sample by sample

    with pytest.warns(UserWarning, match="sample by sample"):
        fit_stream([ElasticWeightConsolidation()], Counts, DataOf(), fast_dev_run=1)
    assert looked.count(1) < 3 * 24


def test_the_two_kinds_differ():
    got = []
    for kind in ("empirical", "true"):
        callback = ElasticWeightConsolidation(fisher=kind)
        fit_stream([callback], AnyBatch, DataOf())
        got.append(callback.importance["net.0.weight"])
    assert not torch.allclose(*got)


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_tasks_are_fused(alpha):
    callback = ElasticWeightConsolidation(alpha=alpha, weight=1.0)
    keeps = Keeps(callback)
    fit_stream([callback, keeps], AnyBatch, DataOf())
    fused = _reference_fisher(keeps.networks[0], 0)
    for task in (1, 2):
        new = _reference_fisher(keeps.networks[task], task)
        fused = {name: alpha * fused[name] + (1 - alpha) * new[name] for name in BODY}
        _close(keeps.states[task]["importance"], fused)
        weights = dict(zip(BODY, keeps.networks[task][0].parameters(), strict=True))
        assert same(keeps.states[task]["anchor"], {name: part.detach() for name, part in weights.items()})


def test_beside_a_memory_the_likelihood_is_of_all_classes_so_far():
    callback = ElasticWeightConsolidation(alpha=0.0)
    keeps = Keeps(callback)
    fit_stream([callback, Replay(20), keeps], AnyBatch, DataOf())
    _close(keeps.states[1]["importance"], _reference_fisher(keeps.networks[1], 1, classes=[0, 1, 2, 3]))


def test_a_module_that_vmap_does_not_go_through_takes_samples_one_by_one():
    class Decides(AnyBatch):
        def forward(self, images):
            return super().forward(images) * (1.0 if float(images.sum()) > -1 else 2.0)

    at_once, one_by_one = ElasticWeightConsolidation(weight=0), ElasticWeightConsolidation(weight=0)
    fit_stream([at_once], AnyBatch, DataOf())
    with pytest.warns(UserWarning, match=r"sample by sample, since `torch.func.vmap` does not go .* Decides: Runtime"):
        fit_stream([one_by_one], Decides, DataOf())
    _close(one_by_one.importance, at_once.importance)


def test_an_unchanged_network_has_loss_zero():
    notes = Notes(NAME)
    fit_stream([ElasticWeightConsolidation(), notes], Frozen, DigitsData())
    assert notes.terms == [None] * 3 + [0.0] * 6


def test_gradients_are_those_of_a_hand_written_loop():
    callback, batches = ElasticWeightConsolidation(weight=300.0), Batches()
    notes = Keeps(callback)
    fit_stream([callback, batches, notes], Plain, DigitsData())
    for step, (images, labels) in enumerate(batches.steps):
        task, net = step // 3, notes.before[step]
        loss = F.cross_entropy(hidden(net(images), [2 * task, 2 * task + 1]), labels)
        for name, part in zip(BODY, net[0].parameters(), strict=True):
            if task > 0:
                state = notes.states[task - 1]
                loss = loss + 150 * (state["importance"][name] * (part - state["anchor"][name]) ** 2).sum()
        expected = torch.autograd.grad(loss, list(net.parameters()))
        for got, wanted in zip(notes.gradients[step], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_look_at_the_data_leaves_the_run_as_it_was():
    runs = []
    for callbacks in ([], [ElasticWeightConsolidation(weight=0, task_classes_only=False, fisher="true")]):
        _, module = fit_stream(callbacks, lambda: Plain(dropout=0.4, batch_norm=True), DigitsData())
        runs.append((dict(module.state_dict()), torch.get_rng_state(), [m.training for m in module.modules()]))
    assert same(*runs)


def test_no_gradient_is_left_where_there_was_none():
    class Looks(Notes):
        def on_train_epoch_end(self, trainer, pl_module):
            self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters()]

        def on_task_end(self, trainer, pl_module, task):
            assert same(self.gradients, [parameter.grad for parameter in pl_module.parameters()])

    fit_stream([ElasticWeightConsolidation(), Looks()], Plain, DigitsData())


def test_weights_move_less():
    moved = []
    for weight in (0.0, 3000.0):
        callback = ElasticWeightConsolidation(weight=weight)
        notes = Keeps(callback)
        _, module = fit_stream([callback, notes], lambda: Plain(lr=0.05), DigitsData(), max_epochs=4)
        moved.append(float((notes.networks[0][0].weight - module.net[0].weight).detach().norm()))
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.filterwarnings("ignore:.*has nothing to hold")
@pytest.mark.parametrize(("module", "base"), CLASSIFIERS)
def test_any_classifier_is_held_to_its_past(module, base):
    callback = ElasticWeightConsolidation(weight=1.0)
    _, trained = fit_stream([callback], module, base())
    head = {"BoringClassifier": "layer", "WithoutValidation": "net", "HuggingFaceLike": "classifier"}
    name = head.get(module.__name__, "classifier" if "HuggingFace" in module.__name__ else "net.4")
    assert set(callback.importance) == {n for n, _ in trained.named_parameters() if not n.startswith(f"{name}.")}
    assert all(bool((part > 0).any()) for part in callback.importance.values())


def test_a_module_that_is_nothing_but_its_classification_layer_is_told_so():
    with pytest.warns(UserWarning, match="nothing to hold: BoringClassifier trains nothing but"):
        fit_stream([ElasticWeightConsolidation()], BoringClassifier, DigitsData())


def test_frozen_layers_are_left_out():
    def module():
        made = Plain()
        made.net[0].bias.requires_grad_(False)
        return made

    callback = ElasticWeightConsolidation()
    fit_stream([callback], module, DigitsData())
    assert set(callback.importance) == {"net.0.weight"}


def test_an_ordinary_fit_is_left_alone():
    callback, modules = ElasticWeightConsolidation(), []
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        modules.append(Plain())
        quiet_trainer(callbacks=callbacks).fit(modules[-1], datamodule=DigitsData())
    assert same_weights(*modules)
    assert callback.importance == {}


def test_others_go_with_it_in_any_order():
    runs = []
    for turn in (1, -1):
        callbacks = [
            ElasticWeightConsolidation(),
            LearningWithoutForgetting(),
            NearestMeanClassifier(),
            Replay(20),
            Watch(),
        ]
        _, module = fit_stream(callbacks[::turn], AnyBatch, DataOf())
        runs.append((dict(module.state_dict()), callbacks[0].state_dict(), callbacks[1].state_dict()))
    assert same(*runs)


def test_two_that_hide_classes_distil_what_the_layer_says():
    runs = []
    for other in ([], [ElasticWeightConsolidation(weight=0)]):
        _, module = fit_stream([LearningWithoutForgetting(), *other], Plain, DigitsData())
        runs.append(module)
    assert same_weights(*runs)


def test_a_refused_task_leaves_no_trace():
    class Looks(Notes):
        def on_task_start(self, trainer, pl_module, task):
            states[task.index] = copy.deepcopy(callback.state_dict())

    callback, states = ElasticWeightConsolidation(), {}
    fit_stream([callback, Judge(1), Looks(NAME)], Plain, DigitsData())
    assert states[2]["classes"] == [0, 1]
    assert same(states[1], states[2])


@pytest.mark.parametrize(
    ("callbacks", "module", "message"),
    [
        ([], TwoHeads, r"ElasticWeightConsolidation: Cannot tell.*`head="),
        ([EarlyExits(["net.0"])], Plain, r"ElasticWeightConsolidation knows one classification layer, and early exits"),
        ([], Manual, r"ElasticWeightConsolidation adds a loss.*added_loss"),
    ],
    ids=["no head", "early exits", "manual optimisation"],
)
def test_what_does_not_go_is_refused(callbacks, module, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit_stream([ElasticWeightConsolidation(), *callbacks], module, DigitsData())


def test_a_layer_that_changes_its_shape_is_refused():
    class Widens(Plain):
        def on_task_start(self, task):
            if task.index == 1:
                self.net[0], self.net[4] = nn.Linear(64, 30), nn.Linear(30, 6)

    with pytest.raises(MisconfigurationException, match=r"'net.0.weight'.*\(24, 64\), has the shape \(30, 64\) now"):
        fit_stream([ElasticWeightConsolidation()], Widens, DigitsData())


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_layer_that_goes_during_a_task_is_refused(hook):
    class Loses(Plain):
        pass

    def lose(module, *_):
        if module.trainer.datamodule.current_task.index == 1:
            module.net[0] = nn.Linear(64, 24, bias=False)

    setattr(Loses, hook, lose)
    with pytest.raises(MisconfigurationException, match=r"'net.0.bias' of Loses, .*\(24,\), is gone"):
        fit_stream([ElasticWeightConsolidation()], Loses, DigitsData())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1}, ValueError, "`weight` must be 0 or more and finite, got -1"),
        ({"weight": float("inf")}, ValueError, "`weight` must be 0 or more and finite, got inf"),
        ({"alpha": 1.5}, ValueError, "`alpha` must be from 0 to 1, got 1.5"),
        ({"alpha": float("nan")}, ValueError, "`alpha` must be from 0 to 1, got nan"),
        ({"alpha": None}, TypeError, "`alpha` must be a number, got None"),
        ({"fisher": "exact"}, ValueError, "`fisher` must be one of 'empirical', 'true', got 'exact'"),
    ],
    ids=str,
)
def test_values_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        ElasticWeightConsolidation(**arguments)
