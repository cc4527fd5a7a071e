"""Frozen layers keep every bit from a task on, whatever the optimizer does; the others are trained."""

from contextlib import nullcontext

import pytest
import torch
from frozen_streams import HEAD, Decays, States, fit_frozen
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from numbered_streams import Judge, fit_stream, same, same_weights

from lightning_cl.callbacks import (
    ElasticWeightConsolidation,
    Freeze,
)
from tests.modules import (
    CLASSIFIERS,
    DigitsData,
    Manual,
    PredictsLabels,
    TorchvisionModule,
    TwoHeads,
)


def _traces(module):
    modes = {name: layer.training for name, layer in module.named_modules()}
    return modes, {name: parameter.requires_grad for name, parameter in module.named_parameters()}


# ------------------------------------------------------------------ what stands still


@pytest.mark.parametrize("reset_optimizer", [True, False])
@pytest.mark.parametrize("others", [[], [ElasticWeightConsolidation]], ids=["no gradients", "gradients dropped"])
def test_all_but_the_classification_layer_keep_every_bit_after_the_first_task(others, reset_optimizer):
    callbacks = [kind() for kind in others]
    moved, _ = fit_frozen(Freeze(), *callbacks, stream={"reset_optimizer": reset_optimizer})
    assert moved == [HEAD, HEAD]


@pytest.mark.parametrize(
    ("layers", "still"),
    [
        ("net.0", ["net.0."]),
        (["net.0", "net.[34]"], ["net.0.", "net.4."]),
        ("*.1", ["net.1."]),
        ("net", ["net."]),
        ("*", ["net."]),
    ],
    ids=str,
)
def test_patterns_choose_layers_with_all_inside_them(layers, still):
    moved, module = fit_frozen(Freeze(layers))
    expected = {name for name in module.state_dict() if not name.startswith(tuple(still))}
    assert moved == [expected, expected]


@pytest.mark.parametrize(
    ("after_task", "tasks"), [(None, [True] * 3), (0, [False, True, True]), (1, [False] * 2 + [True])]
)
def test_they_are_trained_until_their_task_is_over(after_task, tasks):
    torch.manual_seed(1)
    before, states = Decays(), States()
    states.epochs.append({name: tensor.clone() for name, tensor in before.state_dict().items()})
    fit_stream([Freeze(after_task=after_task), states], before, DigitsData())
    assert [moved == HEAD for moved in states.moved] == tasks


def test_parameters_of_layers_around_the_classification_layer_stand_still_too():
    class Token(Decays):
        def __init__(self):
            super().__init__()
            self.net.register_parameter("token", torch.nn.Parameter(torch.ones(64)))
            self.scale = torch.nn.Parameter(torch.ones(64))

        def forward(self, images):
            return super().forward(images * self.scale + self.net.token)

    assert fit_frozen(Freeze(), module=Token)[0] == [HEAD, HEAD]


def test_a_run_equals_one_with_the_layers_frozen_by_hand():
    class ByHand(Decays):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.datamodule.current_task.index > 0:
                self.net[:4].eval().requires_grad_(False)

    assert same_weights(fit_frozen(Freeze())[1], fit_frozen(module=ByHand)[1])


def test_the_backward_pass_leaves_them_out():
    class Looks(Callback):
        def on_after_backward(self, trainer, pl_module):
            graded.append([parameter.grad is not None for parameter in pl_module.parameters()])

    graded = []
    fit_frozen(Freeze(), Looks())
    assert graded == [[True] * 6] * 3 + [[False] * 4 + [True] * 2] * 6


@pytest.mark.parametrize("own", [False, True], ids=["usual", "sets its layers to train"])
def test_they_are_in_eval_mode_while_a_batch_is_trained(own):
    class Looks(Decays):
        def on_train_batch_start(self, batch, batch_idx):
            if own:
                self.train()

        def forward(self, images):
            modes.append([layer.training for layer in (self, *self.net)])
            return super().forward(images)

    modes = []
    fit_frozen(Freeze(), module=Looks)
    assert modes == [[True] * 6] * 3 + [[True, False, False, False, False, True]] * 6


def test_optimizers_get_all_parameters_in_every_task():
    class Filters(Decays):
        def configure_optimizers(self):
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            counts.append(len(trained))
            return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1)

    counts = []
    assert fit_frozen(Freeze(), module=Filters)[0] == [HEAD, HEAD]
    assert counts == [6, 6, 6]


def test_gradients_that_batches_gather_are_those_of_the_trained_layers_alone():
    assert fit_frozen(Freeze(), accumulate_grad_batches=2, gradient_clip_val=0.1)[0] == [HEAD, HEAD]


def test_manual_optimisation():
    class Steps(Manual):
        def __init__(self):
            super().__init__(dropout=0.3, batch_norm=True)

    assert fit_frozen(Freeze(), module=Steps)[0] == [HEAD, HEAD]


def test_a_layer_that_a_task_puts_in_stands_still_as_well():
    class Replaces(Decays):
        def on_task_start(self, task):
            if task.index == 2:
                self.net[0] = torch.nn.Linear(64, 24)
                self.trainer.strategy.setup_optimizers(self.trainer)
                self.new = self.net[0].weight.detach().clone()

    _, module = fit_frozen(Freeze(), module=Replaces)
    assert torch.equal(module.net[0].weight, module.new)


def test_two_of_them_freeze_layers_one_after_another():
    moved, module = fit_frozen(Freeze("net.[01]"), Freeze("net.[0134]", after_task=1))
    assert moved == [HEAD, set()]
    assert all(layer.training for layer in module.modules())


# ------------------------------------------------------------------ modules of all kinds


@pytest.mark.parametrize(("module", "base"), [*CLASSIFIERS, (Manual, DigitsData), (PredictsLabels, DigitsData)])
def test_any_classifier_trains_its_classification_layer_alone(module, base):
    moved, fitted = fit_frozen(Freeze(), module=module, data=base())
    *_, last = (name for name, _ in fitted.named_parameters())
    head = last.rpartition(".")[0]
    assert moved == [{f"{head}.weight", f"{head}.bias"}] * 2


def test_a_torchvision_classifier():
    moved, _ = fit_frozen(Freeze(), module=TorchvisionModule, limit_train_batches=1)
    assert moved == [{"net.fc.weight", "net.fc.bias"}] * 2


def test_the_classification_layer_by_name():
    moved, _ = fit_frozen(Freeze(head="main"), module=TwoHeads)
    assert moved == [{"main.weight", "main.bias"}] * 2


# ------------------------------------------------------------------ undone, undone tasks, resumed


class Breaks(Callback):
    """Raises in a later task, while its layers stand still."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.datamodule.current_task.index == 1:
            assert not pl_module.net[1].training
            raise RuntimeError("broken")


@pytest.mark.parametrize("others", [[], [Breaks()]], ids=["fit", "exception"])
@pytest.mark.parametrize("turn", [1, -1])
def test_nothing_is_left_on_the_module(others, turn):
    module = Decays()
    module.net[1].eval()  # as their owner wants them
    module.net[0].bias.requires_grad = False
    before = _traces(module)
    callbacks = [Freeze("net.[01]"), Freeze(), *others][::turn]
    with pytest.raises(RuntimeError, match="broken") if others else nullcontext():
        fit_stream(callbacks, module, DigitsData())
    assert _traces(module) == before
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("reset_optimizer", [True, False])
def test_a_resumed_run_ends_the_same(reset_optimizer, step, tmp_path):
    runs, path = [], tmp_path / f"step={step}.ckpt"
    for resumed in (None, path):
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        stream = {"reset_optimizer": reset_optimizer}
        settings = {"enable_checkpointing": True, "ckpt_path": resumed, "stream": stream}
        _, module = fit_stream([Freeze(), checkpoint], Decays, DigitsData(), **settings)
        runs.append((dict(module.state_dict()), torch.get_rng_state()))
    assert same(*runs)


def test_a_task_that_is_repeated_ends_as_if_it_had_been_trained_once():
    runs = [fit_stream([Freeze(), Judge(1, attempts)], Decays, DigitsData())[1] for attempts in ([], [1, 0])]
    assert same_weights(*runs)


def test_a_refused_task_leaves_the_layers_frozen():
    moved, _ = fit_frozen(Freeze(), Judge(1))
    assert moved == [HEAD, HEAD]


def test_where_their_task_is_refused_the_next_one_begins_with_frozen_layers():
    torch.manual_seed(1)
    module = Decays()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fit_stream([Freeze(), Judge(0)], module, DigitsData())
    assert {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])} == HEAD
