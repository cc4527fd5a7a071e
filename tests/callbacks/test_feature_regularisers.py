"""The anti-collapse loss and projected distillation on features in training, alone and as parts of AdaGauss."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from feature_streams import WIDTH, Images, Narrow, NarrowNoisy, ada_gauss, fit_images
from lightning.pytorch import Callback
from numbered_streams import same, same_weights
from regularised_streams import Batches, Notes, hidden
from torch.utils.data import DataLoader, Subset

from lightning_cl.callbacks import AntiCollapse, ProjectedDistillation
from lightning_cl.datamodules import ClassIncremental, Joint
from lightning_cl.tasks import added_loss
from tests.modules import Manual


def _anti_collapse(features, bound):
    """Minus the mean of the bounded diagonal of a Cholesky factor, by hand."""
    factor = torch.linalg.cholesky(features.T.cov())
    return -factor.diagonal().clamp(max=bound).mean()


class Projectors(Callback):
    """Keeps the projector's weights before each step and at the end."""

    def __init__(self, callback):
        self.callback, self.before = callback, []

    def on_train_batch_start(self, *args):
        self.before.append(copy.deepcopy(self.callback.projector.state_dict()))

    def on_train_end(self, *args):
        self.before.append(copy.deepcopy(self.callback.projector.state_dict()))


def _project(weights, features):
    wide = F.gelu(features @ weights["widen.weight"].T + weights["widen.bias"])
    return wide @ weights["narrow.weight"].T + weights["narrow.bias"]


KINDS = {
    "anti-collapse": (lambda: AntiCollapse(weight=0.7, bound=0.4), {"spread": 0.7, "bound": 0.4, "masked": False}),
    "distillation": (lambda: ProjectedDistillation(weight=3.0, expansion=4), {"distilled": 3.0}),
    "sum": (lambda: ProjectedDistillation(weight=0.5, expansion=4, reduction="sum"), {"distilled": 0.5 * WIDTH}),
    "both": (lambda: ada_gauss(distillation=3.0, anti_collapse=0.7), {"spread": 0.7, "distilled": 3.0}),
}


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_a_hand_written_loop(name):
    make, terms = KINDS[name]
    callback, notes, batches = make(), Notes(), Batches()
    part = getattr(callback, "regulariser", callback)
    others = [Projectors(part)] if "distilled" in terms else []
    fit_images([callback, batches, notes, *others])
    for step, (images, labels) in enumerate(batches.steps):
        task, net = step // 3, notes.before[step]
        features = net[:-1](images)
        logits = net[-1](features)
        masked = hidden(logits, [2 * task, 2 * task + 1]) if terms.get("masked", True) else logits
        loss = F.cross_entropy(masked, labels)
        if "spread" in terms:
            loss = loss + terms["spread"] * _anti_collapse(features, terms.get("bound", 1.0))
        if "distilled" in terms and task > 0:
            with torch.no_grad():
                wanted = notes.networks[task - 1][:-1](images)
            projected = _project(others[0].before[step], features)
            loss = loss + terms["distilled"] * F.mse_loss(projected, wanted)
        expected = torch.autograd.grad(loss, list(net.parameters()))
        for got, gradient in zip(notes.gradients[step], expected, strict=True):
            torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-5)


def test_gradient_accumulation_gives_the_mean_of_its_batches_gradients():
    class Steps(Notes):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            taken.append([parameter.grad.clone() for parameter in pl_module.parameters()])

    batches, notes, taken = Batches(), Steps(), []
    fit_images([AntiCollapse(weight=0.7), batches, notes], accumulate_grad_batches=3, stream={"num_tasks": 1})
    net = notes.before[0]
    losses = []
    for images, labels in batches.steps[:3]:
        features = net[:-1](images)
        losses.append(F.cross_entropy(net[-1](features), labels) + 0.7 * _anti_collapse(features, 1.0))
    expected = torch.autograd.grad(sum(losses) / 3, list(net.parameters()))
    for got, gradient in zip(taken[0], expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-5)


def test_a_rest_of_an_epoch_that_is_too_small_goes_without_the_term():
    class Rest(Images):
        def loader(self, split, **settings):
            rows = torch.arange(144).view(6, 24).t().flatten()[: 48 + WIDTH]  # of all classes
            return (
                super().loader(split, **settings)
                if split != "train"
                else DataLoader(Subset(self.sets["train"], rows), batch_size=16, **settings)
            )

    sizes, terms = [], []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sizes.append(len(batch[0]))
            terms.append(float(trainer.callback_metrics["loss/anti_collapse"]))

    fit_images([AntiCollapse(), Looks()], sequence=ClassIncremental(Rest(), num_tasks=1))
    assert sizes == [16, 16, 16, WIDTH]
    assert terms[3] == terms[2] < terms[0]  # the term that was logged last


def test_manual_optimisation_with_added_loss_equals_the_automatic_one():
    class ByHand(Manual):
        def __init__(self):
            super().__init__(extra_loss=added_loss)
            self.lr, self.net = 0.05, Narrow().net

    runs, start = [], Narrow().net.state_dict()
    for module in (Narrow(), ByHand()):
        module.net.load_state_dict(start)
        runs.append(fit_images([ada_gauss()], module)[1])
    assert same_weights(*runs)


# ------------------------------------------------------------------ the projector


def _moved(before, after):
    return [not torch.equal(before[name], after[name]) for name in before]


class Groups(Narrow):
    """Trains its head apart, with a schedule."""

    def configure_optimizers(self):
        groups = [{"params": self.net[:-1].parameters()}, {"params": self.net[-1].parameters(), "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.optim.lr_scheduler.ConstantLR(optimizer)]
        return [optimizer], schedulers


class Adam(Narrow):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Renews(Narrow):
    """Makes an optimizer of its own at the start of each task."""

    def on_task_start(self, task):
        self.trainer.strategy.setup_optimizers(self.trainer)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("module", [Narrow, Groups, Adam, Renews])
def test_the_modules_optimizer_trains_the_projector(module, reset):
    callback = ProjectedDistillation(expansion=4)
    weights = Projectors(callback)
    fit_images([callback, weights], module, stream={"reset_optimizer": reset})
    for step in (3, 4, 6, 7, 8):
        assert all(_moved(weights.before[step], weights.before[step + 1]))


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("module", [Narrow, Groups, Renews])
def test_an_optimizer_has_the_projector_once(module, reset):
    class Looks(Callback):
        def on_train_batch_end(self, trainer, *args):
            own = {id(parameter) for parameter in callback.projector.parameters()}
            trained = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
            counts.append(sum(parameter in own for parameter in trained))

    callback, counts = ProjectedDistillation(expansion=4), []
    fit_images([callback, Looks()], module, stream={"reset_optimizer": reset})
    assert counts == [4] * 9


@pytest.mark.parametrize("reset", [True, False])
def test_the_projector_begins_anew_with_each_task(reset):
    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            state = trainer.optimizers[0].state
            if batch_idx == 0:
                left.extend(p for p in callback.projector.parameters() if state.get(p))

    callback, left = ProjectedDistillation(expansion=4), []
    weights = Projectors(callback)
    fit_images([callback, weights, Looks()], stream={"reset_optimizer": reset})
    assert all(_moved(weights.before[3], weights.before[6]))
    assert all(_moved(weights.before[0], weights.before[3]))
    assert left == []


def test_projectors_of_a_task_begin_alike_whatever_was_drawn_before():
    starts = []
    for module in (Narrow, NarrowNoisy):
        callback = ProjectedDistillation(expansion=4)
        weights = Projectors(callback)
        fit_images([callback, weights], module)
        starts.append([weights.before[step] for step in (0, 3, 6)])
    assert same(*starts)


@pytest.mark.parametrize("make", [lambda: ProjectedDistillation(expansion=4), ada_gauss], ids=["piece", "AdaGauss"])
def test_nothing_of_it_is_in_the_module(make):
    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(
                [set(pl_module.state_dict()), *map(len, (list(pl_module.parameters()), list(pl_module.modules())))]
            )

    seen, plain = [], Narrow()
    fit_images([make(), Looks()])
    layers = len(list(plain.modules()))
    assert seen == [[set(plain.state_dict()), len(list(plain.parameters())), layers]] * 9


def test_the_teacher_is_the_network_of_the_last_tasks_end():
    callback = ProjectedDistillation(expansion=4)
    _, module = fit_images([callback], NarrowNoisy)
    assert same(dict(callback.teacher), dict(module.state_dict()))
    assert not any(tensor.requires_grad for tensor in callback.teacher.values())


def test_anti_collapse_keeps_no_teacher():
    callback = AntiCollapse()
    fit_images([callback])
    assert callback.teacher is None


def test_a_stream_of_one_task_distils_nothing():
    runs = []
    for callbacks in ([], [ProjectedDistillation(expansion=4)]):
        runs.append(fit_images(callbacks, sequence=Joint(Images()))[1])
    assert same_weights(*runs)


def test_without_weight_and_mask_the_run_is_that_without_it():
    runs = []
    for callbacks in ([], [AntiCollapse(weight=0)], [ProjectedDistillation(weight=0, task_classes_only=False)]):
        _, module = fit_images(callbacks, NarrowNoisy)
        runs.append((dict(module.state_dict()), torch.get_rng_state()))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_anti_collapse_hides_no_class_by_default():
    class Looks(Narrow):
        def training_step(self, batch, batch_idx):
            assert bool((self(batch[0]) > -1e4).all())
            return super().training_step(batch, batch_idx)

    fit_images([AntiCollapse()], Looks)


def test_features_keep_their_spread():
    spreads = []
    for callbacks in ([AntiCollapse(weight=5)], []):
        _, module = fit_images(callbacks, max_epochs=5, sequence=Joint(Images()))
        data = Images()
        data.setup("fit")
        with torch.no_grad():
            spreads.append(_anti_collapse(module.features(data.sets["train"].tensors[0]), 1.0))
    assert spreads[0] < spreads[1] - 0.1


# ------------------------------------------------------------------ warm-up


class Decays(Narrow):
    """Its optimizer moves weights that have no gradient of their own."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def test_a_warmup_trains_classification_layer_and_projector_alone():
    callback, notes = ada_gauss(warmup=0.5), Notes()
    weights = Projectors(callback.regulariser)
    fit_images([callback, weights, notes], Decays, max_epochs=4, stream={"num_tasks": 2})
    steps = len(notes.before) // 2
    for task in (0, 1):
        first, last = (notes.before[task * steps + step] for step in (0, steps // 2))
        assert same(dict(first[:-1].state_dict()), dict(last[:-1].state_dict()))
        assert not same(dict(first[-1].state_dict()), dict(last[-1].state_dict()))
    assert all(_moved(weights.before[steps], weights.before[steps + 1]))


@pytest.mark.parametrize(("warmup", "frozen"), [(0.0, 0), (0.24, 0), (0.25, 1), (0.99, 3), (1.0, 4)])
def test_a_warmup_is_a_share_of_a_tasks_epochs(warmup, frozen):
    notes = Notes()
    fit_images([ada_gauss(warmup=warmup, flips=False), notes], max_epochs=4, stream={"num_tasks": 1})
    epochs = [dict(net[:-1].state_dict()) for net in notes.before[::9]] + [dict(notes.networks[0][:-1].state_dict())]
    same_as_before = [same(*pair) for pair in pairwise(epochs)]
    assert same_as_before == [True] * frozen + [False] * (4 - frozen)
