"""Exits in a fit: what each phase trains, what a run is resumed with, what is left of it, and who answers."""

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from exit_streams import LAYERS, Deep, Weights
from exit_streams import fit_exits as _fit
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from nearest_means import TEST_IMAGES, DigitsToPredict, predictions
from numbered_streams import Judge, SaveAfterSteps, fit_stream, same, same_weights
from torch import nn

from lightning_cl.callbacks import (
    ContinualMetrics,
    DarkExperienceReplay,
    EarlyExits,
    NearestMeanClassifier,
    Replay,
    StabilityGapTracker,
)
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.heads.exit_rules import confidence_of, first_confident
from lightning_cl.tasks.exit_phases import depth_weights
from tests.modules import CLASSIFIERS, DigitsData, quiet_trainer

REGIMES = ["joint", "mixed", "disjoint"]


# ------------------------------------------------------------------ regimes


def test_disjoint_heads_are_trained_on_a_network_that_stands_still_to_the_bit():
    weights = Weights()
    _fit("disjoint", others=[weights, Replay(20)], max_epochs=4)
    for task in range(3):
        first = 4 * task + 1  # the second of two epochs of the network
        for epoch in (first + 1, first + 2):
            assert same(weights.network[epoch], weights.network[first])
            assert not same(weights.heads[epoch], weights.heads[epoch - 1])
        assert not same(weights.network[first], weights.network[first - 1])


@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_the_network_alone_is_trained_as_if_there_were_no_exits(regime):
    weights, plain = Weights(), Weights()
    _fit(regime, others=[weights, Replay(20)], max_epochs=4)
    fit_stream([Replay(20), plain], Deep, DigitsData(), max_epochs=2)
    for epoch in (0, 1):
        assert same(weights.network[epoch], plain.network[epoch])
    assert same(weights.heads[0], weights.heads[1])


def test_mixed_trains_both_after_the_network():
    weights = Weights()
    _fit("mixed", others=[weights], max_epochs=3, exits=EarlyExits(LAYERS, "mixed", phase_epochs=[1, 2]))
    for epoch in (1, 2):
        assert not same(weights.heads[epoch], weights.heads[epoch - 1])
        assert not same(weights.network[epoch], weights.network[epoch - 1])


class Losses(Callback):
    """Keeps the loss of each step, and each module's mode."""

    def __init__(self):
        self.values, self.modes = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.values.append(float(outputs["loss"]))
        self.modes.append({name for name, layer in pl_module.named_modules() if layer.training})


@pytest.mark.parametrize(
    ("loss_weights", "expected"),
    [("uniform", [1 / 3] * 3), ("sdn", [0.01, 0.01, 1.0]), ([0.5, 0.0, 2.0], [0.5, 0.0, 2.0])],
    ids=["uniform", "sdn", "given"],
)
def test_the_loss_is_the_weighed_sum_of_the_heads(loss_weights, expected):
    by_hand = []

    class First(Losses):
        """Computes by hand what the first step's loss should be, on a copy of the network, which has no exits."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not by_hand:
                images, labels = batch
                network = copy.deepcopy(pl_module).net
                features = [network[:2](images), None]
                features[1] = network[2:5](features[0].clone())
                heads = pl_module.early_exits.heads
                logits = [head(rows) for head, rows in zip(heads, features, strict=True)] + [network(images)]
                by_hand.extend(float(F.cross_entropy(rows, labels)) for rows in logits)

    losses = First()
    _fit(
        exits=EarlyExits(LAYERS, "joint", loss_weights=loss_weights), module=lambda: Deep(dropout=0.0), others=[losses]
    )
    assert losses.values[0] == pytest.approx(sum(w * loss for w, loss in zip(expected, by_hand, strict=True)), rel=1e-5)


class OnlyItsNet(Deep):
    """Makes its optimizer, and a schedule, for its own layers."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]


@pytest.mark.parametrize("regime", REGIMES)
def test_heads_join_an_optimizer_that_was_made_without_them(regime, tmp_path):
    """Also where it is resumed."""
    keeper = SaveAfterSteps(tmp_path, STEPS)
    named, _, module = _fit(regime, OnlyItsNet, others=[Replay(20), keeper])
    whole, _, expected = _fit(regime, others=[Replay(20)])
    resumed, _, again = _fit(regime, OnlyItsNet, others=[Replay(20)], ckpt_path=tmp_path / "10.ckpt")
    assert same_weights(module, expected)
    assert same_weights(again, expected)
    assert same(named.state_dict(), whole.state_dict())
    assert same(resumed.state_dict(), whole.state_dict())


def test_weights_grow_with_depth_and_epochs():
    by_epoch = [depth_weights(6, epoch, 200) for epoch in (0, 100, 199)]
    assert by_epoch[0] == [0.01] * 6 + [1.0]
    assert by_epoch[1] == pytest.approx([0.0804, 0.1557, 0.2311, 0.3065, 0.3819, 0.4572, 1.0], abs=5e-5)
    assert by_epoch[2] == pytest.approx([0.15, 0.30, 0.45, 0.60, 0.75, 0.90, 1.0])


def test_the_network_stands_in_eval_mode_while_the_heads_are_trained_and_in_its_own_else():
    class PartlyStill(Deep):
        def on_train_epoch_start(self):
            self.net[3].eval()

    losses = Losses()
    _fit("disjoint", module=PartlyStill, others=[losses], max_epochs=2)
    for step, modes in enumerate(losses.modes):
        network = {name for name in modes if name.startswith("net.")}
        assert network == ({"net.0", "net.1", "net.2", "net.4", "net.5", "net.6"} if step % 6 < 3 else set())
        assert {name for name in modes if name.startswith("early_exits")} >= {
            "early_exits.heads.0",
            "early_exits.heads.1",
        }


# ------------------------------------------------------------------ resume and undo

STEPS = [1, 4, 6, 7, 9, 10, 12, 14, 17]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @lru_cache
    def run(regime):
        folder = tmp_path_factory.mktemp("exits")
        keeper = ModelCheckpoint(folder, "end-{epoch}", save_top_k=-1)
        others = [Replay(20), SaveAfterSteps(folder, STEPS), keeper]
        return *_fit(regime, others=others, enable_checkpointing=True), folder

    return run


@pytest.mark.parametrize(
    "place",
    [4, 10, "end-epoch=1", *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 6, 7, 9, 12, 14, 17))],
)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_resumed_run_ends_the_same_to_the_bit(regime, place, saved):
    exits, _, module, folder = saved(regime)
    resumed, _, again = _fit(regime, others=[Replay(20)], ckpt_path=folder / f"{place}.ckpt")
    assert same_weights(module, again)
    assert same(exits.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("regime", REGIMES)
def test_a_rejected_task_leaves_no_trace(regime):
    rejected, _, module = _fit(regime, others=[Replay(20), Judge(2)])
    weights = Weights()
    _fit(regime, others=[Replay(20), weights])
    assert same(weights.network[3], dict(module.state_dict()))
    heads = {f"early_exits.{name}": tensor for name, tensor in rejected.state_dict()["heads"].items()}
    assert same(weights.heads[3], heads)


def _bare(module):
    names = {name for layer in module.modules() for name in ("forward", "setup") if name in vars(layer)}
    return (
        not names and not any(layer._forward_hooks for layer in module.modules()) and "early_exits" not in str(module)
    )


@pytest.mark.parametrize("regime", REGIMES)
def test_after_the_fit_nothing_is_left_on_the_module(regime):
    _, trainer, module = _fit(regime)
    assert _bare(module)
    assert all(layer.training for layer in module.modules())
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert _bare(module)


@pytest.mark.parametrize("step", [1, 4, 10])
def test_after_an_exception_nothing_is_left_on_the_module(step):
    kept = []

    class Fails(Deep):
        def training_step(self, batch, batch_idx):
            kept.append(self)
            if self.trainer.global_step == step:
                raise RuntimeError("the lights went out")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="lights"):
        _fit("disjoint", module=Fails)
    assert _bare(kept[-1])
    assert all(layer.training for layer in kept[-1].modules())


def test_building_heads_draws_nothing_and_moves_no_buffer():
    states = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            buffers = {name: tensor.clone() for name, tensor in pl_module.named_buffers()}
            states.append([torch.get_rng_state(), buffers])

    for exits in ([], [EarlyExits(LAYERS, "joint")]):
        seed_everything(3, verbose=False)
        fit_stream([*exits, Looks()], Deep, DigitsData())
    assert same(*states)


# ------------------------------------------------------------------ who answers


def test_samples_leave_where_the_rule_says():
    exits, trainer, module = _fit(exits=EarlyExits(LAYERS, "joint"), others=[Replay(30)], max_epochs=4)
    exits.network.attach(module.eval())
    with torch.no_grad(), exits.hooks.collecting():
        module(TEST_IMAGES)
        logits = torch.stack(exits.hooks.logits, dim=1)
    exits.network.detach()
    threshold = float(confidence_of(logits).median())
    taken = first_confident(confidence_of(logits), threshold)
    assert len(taken.unique()) > 1
    final = predictions(trainer, module)
    exits.threshold = threshold
    mixed = predictions(trainer, module)
    torch.testing.assert_close(mixed, logits[torch.arange(len(taken)), taken], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, logits[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_validation_in_the_fit_sees_the_exits_once_they_are_trained(threshold):
    accuracies = []

    class Keeps(Deep):
        def on_validation_epoch_end(self):
            hooks = next(c for c in self.trainer.callbacks if isinstance(c, EarlyExits)).hooks
            accuracies.append((hooks.threshold, float(self.trainer.callback_metrics.get("val_acc", -1))))

    exits = EarlyExits(LAYERS, "mixed", threshold=threshold)
    _fit(exits=exits, module=Keeps, limit_val_batches=1.0, num_sanity_val_steps=0)
    assert [value for value, _ in accuracies] == [None] + [threshold] * 5


def test_a_checkpoint_is_tested_by_a_callback_that_has_seen_no_fit(tmp_path):
    _, trainer, module = _fit(exits=EarlyExits(LAYERS, "joint", threshold=0.6), others=[Replay(30)])
    expected = predictions(trainer, module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # heads are off the module by now
    keeper = ModelCheckpoint(tmp_path, "in", every_n_epochs=6)
    again = EarlyExits(LAYERS, "joint", threshold=0.6)
    _fit(exits=again, others=[Replay(30), keeper], enable_checkpointing=True)
    for name in ("after", "in"):
        fresh = EarlyExits(LAYERS, threshold=0.6)
        other = quiet_trainer(callbacks=[fresh])
        scores = torch.cat(
            other.predict(
                Deep(), datamodule=ClassIncremental(DigitsToPredict(), num_tasks=3), ckpt_path=tmp_path / f"{name}.ckpt"
            )
        )
        assert torch.equal(scores, expected)


@pytest.mark.parametrize(("module", "data"), CLASSIFIERS, ids=lambda part: part.__name__)
def test_every_kind_of_module_can_have_exits(module, data):
    probe = module()
    names = [name for name, layer in probe.named_modules() if isinstance(layer, nn.Linear)]
    if len(names) < 2:
        pytest.skip("a single layer has no place for an exit")
    exits = EarlyExits(names[:1], "joint", threshold=0.5)
    metrics = ContinualMetrics(print_table=False)
    _fit(exits=exits, module=module, data=data(), others=[Replay(20), metrics])
    assert not metrics.matrix.tril().isnan().all()
    assert exits.network.mixing_layer is None


# ------------------------------------------------------------------ beside others


@pytest.mark.parametrize("regime", REGIMES)
def test_observers_do_not_disturb(regime):
    def observers():
        return [ContinualMetrics(print_table=False), StabilityGapTracker(probe_size=10)]

    ends = []
    for others in ([], observers()):
        exits = EarlyExits(LAYERS, regime, threshold=0.6)
        exits, _, module = _fit(exits=exits, others=[Replay(20), *others], limit_val_batches=1.0)
        ends.append([dict(module.state_dict()), exits.state_dict()])
    assert same(*ends)


@pytest.mark.parametrize("replay", [lambda: Replay(20, weight=0.5), lambda: DarkExperienceReplay(20, start="online")])
@pytest.mark.parametrize("regime", REGIMES)
def test_replay_goes_with_exits_in_any_order(regime, replay):
    ends = []
    for first in (True, False):
        exits = EarlyExits(LAYERS, regime)
        callbacks = [replay(), exits] if first else [exits, replay()]
        _, module = fit_stream(callbacks, Deep, DigitsData(), max_epochs=2)
        ends.append([dict(module.state_dict()), exits.state_dict()])
    assert same(*ends)


def test_a_nearest_mean_head_answers_for_a_network_whose_exits_are_trained():
    """No exit head is taken for the classification layer."""
    ends = []
    for exits in ([], [EarlyExits(LAYERS, "disjoint", phase_epochs=[1, 1], print_table=False)]):
        head, metrics = NearestMeanClassifier(), ContinualMetrics(print_table=False, compare_heads=True)
        callbacks = [Replay(20), head, metrics, *exits, StabilityGapTracker(probe_size=10)]
        fit_stream(callbacks, Deep, DigitsData(), max_epochs=1 + len(exits))
        ends.append([metrics.matrix[0, 0], head.state_dict()["layer"]])
    assert ends[0][1] == ends[1][1] == "net.6"
    assert ends[0][0] == ends[1][0]  # one epoch of the network in both


def test_losses_of_each_row_are_weighed_by_replay():
    class PerRow(Deep):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    ends = []
    for weight in (None, 0.9):
        _, _, module = _fit("joint", module=PerRow, others=[Replay(20, weight=weight)])
        ends.append(dict(module.state_dict()))
    assert not same(*ends)
    mean, _, _ = _fit("joint", others=[Replay(20)])
    rows, _, _ = _fit("joint", module=PerRow, others=[Replay(20)])
    for name, tensor in mean.state_dict()["heads"].items():
        torch.testing.assert_close(tensor, rows.state_dict()["heads"][name])
