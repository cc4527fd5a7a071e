"""Mean outputs and weights of layers, and how far they are apart."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from lightning_cl.tasks import ContinualCallback
from lightning_cl.tasks.layer_shift import LayerStates, OutputSums, layer_weights, shifts_between
from tests.modules import (
    CLASSIFIERS,
    BrightnessData,
    DigitsData,
    HuggingFaceLike,
    Plain,
    PredictsLabels,
    Regression,
    TokenDigits,
    TorchvisionModule,
    TwoHeads,
    quiet_trainer,
)

ROWS = torch.arange(12.0).reshape(4, 3)


def _sums(layer, *batches):
    with OutputSums({"layer": layer}) as sums, torch.no_grad():
        for batch in batches:
            layer(batch)
    return sums


def test_outputs_are_summed_up_over_batches_of_any_size():
    sums = _sums(nn.Identity(), ROWS[:3], ROWS[3:])
    assert torch.equal(sums.totals["layer"] / sums.rows["layer"], ROWS.double().mean(0))


def test_a_layer_that_is_called_twice_counts_with_the_mean_of_its_calls():
    sums = _sums(nn.Identity(), ROWS, ROWS + 4)
    assert torch.equal(sums.totals["layer"] / sums.rows["layer"], ROWS.double().mean(0) + 2)


def test_outputs_of_low_precision_are_summed_up_in_double_precision():
    sums = _sums(nn.Identity(), *[torch.full((64, 1), 1.0078125, dtype=torch.bfloat16)] * 40)
    assert float(sums.totals["layer"]) == 64 * 40 * 1.0078125


@pytest.mark.parametrize("output", [(ROWS, ROWS), {"rows": ROWS}, None, torch.tensor(1.0), ROWS.long()], ids=str)
def test_what_is_no_tensor_of_numbers_is_left_out(output):
    class Odd(nn.Module):
        def forward(self, rows):
            return output

    assert _sums(Odd(), ROWS).totals == {}


def test_samples_of_different_shapes_have_no_mean():
    with pytest.raises(ValueError, match=r"'layer' puts out samples of different shapes, \(3,\) and \(2,\)"):
        _sums(nn.Identity(), ROWS, ROWS[:, :2])


def test_no_hook_is_left_on_a_layer_after_an_exception():
    layer = nn.Linear(3, 2)
    with pytest.raises(RuntimeError), OutputSums({"layer": layer}):
        layer(torch.zeros(1, 9))
    assert not layer._forward_hooks


# ------------------------------------------------------------------ distances


def test_the_shift_of_a_layer_is_the_distance_of_its_states():
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 2)}
    after = {"a": torch.tensor([4.0, 6.0]), "b": torch.full((2, 2), 0.5)}
    assert shifts_between(before, after) == {"a": 5.0, "b": 1.0}


def test_the_weights_of_a_layer_are_one_shift():
    layer = nn.Linear(2, 1)
    before = layer_weights({"fc": layer})
    with torch.no_grad():
        layer.weight += torch.tensor([[2.0, 3.0]])
        layer.bias += 6
    assert shifts_between(before, layer_weights({"fc": layer})) == {"fc": pytest.approx(7.0)}


def test_weights_that_are_kept_do_not_move_with_the_layer():
    layer = nn.Linear(2, 1)
    kept = layer_weights({"fc": layer})["fc:weight"]
    expected = kept.clone()
    with torch.no_grad():
        layer.weight += 1
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_of_a_state_that_has_grown_what_was_there_is_compared(shape):
    grown = torch.full([size + 2 for size in shape], 99.0)
    grown[tuple(slice(size) for size in shape)] = 1.0
    assert shifts_between({"head": torch.ones(shape)}, {"head": grown}) == {"head": 0.0}


def test_layers_that_are_new_are_not_compared():
    assert shifts_between({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}) == {"a": 0.0}


@pytest.mark.parametrize(
    ("after", "found"),
    [
        ({}, "is not called any more"),
        ({"head": torch.ones(3)}, r"now gives \(3,\)"),
        ({"head": torch.ones(4, 1)}, r"now gives \(4, 1\)"),
    ],
    ids=["gone", "smaller", "another rank"],
)
def test_states_that_cannot_be_compared_are_an_error(after, found):
    with pytest.raises(ValueError, match=rf"'head' gave \(4,\) when the task began and {found}.*`layers="):
        shifts_between({"head": torch.ones(4)}, after)


# ------------------------------------------------------------------ modules of all kinds


class Looks(ContinualCallback):
    """Takes the state of all layers once training begins."""

    def __init__(self, patterns=None, space="activation"):
        self.states = LayerStates(patterns, space, 8)

    def on_train_start(self, trainer, pl_module):
        stream = trainer.datamodule
        self.states.check(trainer, pl_module, stream)
        self.taken = self.states.take(trainer, pl_module, stream, stream.current_task)


def _look(looks, module, data=None, sequence=ClassIncremental, **options):
    trainer = quiet_trainer(callbacks=[looks], max_steps=1)
    trainer.fit(module, datamodule=sequence(data or DigitsData(), **(options or {"num_tasks": 2})))
    return looks.taken


@pytest.mark.parametrize(
    ("module", "data"),
    [pair for pair in CLASSIFIERS if pair[0].__name__ not in ("BoringClassifier", "WithoutValidation")],
)
def test_an_unchanged_module_is_looked_at(module, data):
    assert len(_look(Looks(), module(), data())) == 2


@pytest.mark.parametrize(
    ("module", "layers"),
    [(PredictsLabels, ["net.0", "net.4"]), (TwoHeads, ["net.0", "main", "auxiliary"])],
)
def test_a_module_without_class_scores_is_looked_at(module, layers):
    assert list(_look(Looks(), module())) == layers


def test_a_regression_is_looked_at():
    options = {"sequence": DomainIncremental, "transforms": [None, torch.Tensor.neg]}
    assert list(_look(Looks(), Regression(), BrightnessData(), **options)) == ["net.0", "net.2"]


def test_layers_of_a_torchvision_network_are_looked_at():
    taken = _look(Looks(["net.fc", "net.stage2.*.branch1.0", "net.conv?.0"]), TorchvisionModule())
    assert list(taken) == ["net.conv1.0", "net.stage2.0.branch1.0", "net.conv5.0", "net.fc"]
    assert taken["net.conv1.0"].shape == (24,)  # over positions, too


def test_of_a_network_with_norms_these_are_looked_at():
    taken = _look(Looks(), TorchvisionModule())
    assert len(taken) > 2
    norms = {name for name, layer in TorchvisionModule().named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert set(taken) == norms


def test_one_norm_alone_is_looked_at_beside_the_other_layers():
    assert list(_look(Looks(), Plain(batch_norm=True))) == ["net.0", "net.1", "net.4"]


class Silent(Plain):
    """With layers that are not called, and one whose output is no tensor."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.recurrent = nn.LSTM(24, 4)

    def forward(self, images):
        hidden = self.net[:4](images)
        self.recurrent(hidden)
        return self.net[4](hidden)


def test_layers_that_put_out_nothing_are_left_out_of_all_layers():
    assert list(_look(Looks(), Silent())) == ["net.0", "net.4"]


@pytest.mark.parametrize("layer", ["spare", "recurrent"])
def test_a_layer_by_name_that_puts_out_nothing_is_an_error(layer):
    with pytest.raises(MisconfigurationException, match=rf"put out a tensor.*these do not: '{layer}'"):
        _look(Looks(["net.0", "net.4", layer]), Silent())


@pytest.mark.parametrize("patterns", [["net.0", "net.2"], ["net.0", "net.2", "net.4"]])
def test_a_layer_by_name_without_weights_is_an_error_in_their_space(patterns):
    with pytest.raises(MisconfigurationException, match=r"that have weights.*these do not: 'net.2'"):
        _look(Looks(patterns, "parameter"), Plain())


def test_a_module_that_cannot_be_called_is_an_error_that_says_what_was_tried():
    class Shy(HuggingFaceLike):
        def forward(self, batch_of_mine, *, secret):
            raise NotImplementedError

        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(
        MisconfigurationException, match=r"how to call Shy .*Tried: forward\(batch\).*space='parameter'"
    ):
        _look(Looks(), Shy(), TokenDigits())
