"""Exits that imitate, work together, or classify by nearest means."""

import pytest
import torch
import torch.nn.functional as F
from exit_streams import LAYERS, Deep
from exit_streams import fit_exits as _fit
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nearest_means import TEST_IMAGES, VAL_IMAGES, predictions
from numbered_streams import IMAGES, LABELS, Judge, SaveAfterSteps, same, same_weights

import lightning_cl
from lightning_cl.callbacks import EarlyExits, NearestMeanClassifier, Replay
from lightning_cl.cli import main
from lightning_cl.exits import SubNetwork
from lightning_cl.heads.exit_heads import pool_features
from lightning_cl.heads.exit_rules import confidence_of, first_confident
from lightning_cl.tasks import ContinualCallback
from lightning_cl.tasks.exit_losses import ExitLosses

OPTIONS = {
    "cascade": {"ensemble": "cascade"},
    "geometric": {"ensemble": "geometric"},
    "nearest": {"exit_classifier": "nearest_mean"},
    "distill": {"distill": "later"},
}


def _exits(regime="joint", **options):
    return EarlyExits(LAYERS, regime, print_table=False, **options)


def _offline(exits, module, images):
    """What every exit answers images, ``(images, exits, classes)``."""
    hooks = exits.network.attach(module.eval())
    hooks.correction = exits.record.corrects
    with torch.no_grad(), hooks.collecting():
        module(images)
        logits = torch.stack(hooks.logits, dim=1)
    exits.network.detach()
    return logits


# ------------------------------------------------------------------ imitation


@pytest.mark.parametrize(("distill", "teachers"), [("last", [2]), ("next", [1]), ("later", [1, 2])])
@pytest.mark.parametrize("by_row", [True, False])
def test_an_exit_imitates_later_ones_by_hand(distill, teachers, by_row):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 3, generator=generator).requires_grad_() for _ in range(3)]
    targets = torch.tensor([0, 1, 2, 0])
    loss = ExitLosses("uniform", distill).of_exits(logits, targets, [1.0, 0.0], by_row)
    softened = [(part.detach() / 2).softmax(1) for part in logits]
    distances = [(4 * softened[t] * (softened[t] / softened[0]).log()).sum(1) for t in teachers]
    expected = F.cross_entropy(logits[0], targets, reduction="none") + torch.stack(distances).mean(0)
    torch.testing.assert_close(loss, expected if by_row else expected.mean())
    loss.sum().backward()
    assert logits[0].grad.abs().sum() > 0
    assert all(part.grad is None or not part.grad.any() for part in logits[1:])


def test_imitation_is_trained_on_in_a_fit():
    runs = [_fit(exits=_exits(distill=distill))[2] for distill in (None, "last", "next")]
    assert not same_weights(runs[0], runs[1])
    assert not same_weights(runs[1], runs[2])


# ------------------------------------------------------------------ ensembles


def test_an_ensembles_weights_are_trained_and_nothing_else_by_them():
    ends = {e: _fit(exits=_exits(ensemble=e, threshold=1.0)) for e in ("none", "cascade", "geometric")}
    assert same_weights(ends["cascade"][2], ends["geometric"][2])
    assert not same_weights(ends["none"][2], ends["cascade"][2])
    cascade, geometric = (ends[name][0].network.heads for name in ("cascade", "geometric"))
    assert same(dict(cascade.heads.state_dict()), dict(geometric.heads.state_dict()))
    assert geometric.ensemble.bias.any()


def test_in_the_disjoint_regime_an_ensemble_leaves_the_network_as_it_is():
    plain, joined = (_fit(exits=_exits("disjoint", ensemble=e, threshold=1.0))[2] for e in ("none", "geometric"))
    assert same_weights(plain, joined)


@pytest.mark.parametrize("option", ["cascade", "geometric", "nearest"])
def test_predictions_are_those_of_the_rule_and_of_a_loaded_module(option, tmp_path):
    exits, trainer, module = _fit(exits=_exits(**OPTIONS[option], correction="tlc", threshold=0.3), max_epochs=4)
    logits = _offline(exits, module, TEST_IMAGES)
    exits.threshold = float(confidence_of(logits)[:, :-1].median())
    taken = first_confident(confidence_of(logits), exits.threshold)
    assert len(taken.unique()) > 1
    answers = logits[torch.arange(len(taken)), taken]
    torch.testing.assert_close(predictions(trainer, module), answers, atol=1e-5, rtol=1e-5)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(lightning_cl.load(tmp_path / "last.ckpt", Deep)(TEST_IMAGES), answers)


@pytest.mark.parametrize("option", ["cascade", "geometric", "nearest"])
def test_figures_are_of_what_the_exits_answer(option):
    exits, _, module = _fit(exits=_exits(**OPTIONS[option], threshold=0.3))
    right = _offline(exits, module, VAL_IMAGES).argmax(-1) == torch.arange(6).repeat_interleave(10)[:, None]
    torch.testing.assert_close(exits.figures["exit_accuracies"], right.float().mean(0))


# ------------------------------------------------------------------ nearest means


def test_prototypes_are_means_of_the_memory_and_of_the_current_tasks_data():
    replay = Replay(20)
    exits, trainer, module = _fit(exits=_exits(exit_classifier="nearest_mean"), others=[replay])
    rows = [
        *(number for number in range(len(LABELS)) if LABELS[number] >= 4),
        *_numbers(trainer, replay),
    ]
    hooks = exits.network.attach(module.eval())
    with torch.no_grad(), hooks.collecting("features"):
        module(IMAGES[rows])
        features = hooks.features
    exits.network.detach()
    assert len(features) == 3
    for head, part in zip(exits.network.heads.nearest, features, strict=True):
        lengths = F.normalize(part.double(), dim=1)
        means = torch.stack([lengths[LABELS[rows] == label].mean(0) for label in range(6)])
        torch.testing.assert_close(head.prototypes.double(), F.normalize(means, dim=1), atol=1e-5, rtol=1e-4)


def _numbers(trainer, replay):
    """Which digits the memory holds of past tasks."""
    memory, labels = replay.memory, LABELS
    for task, index in zip(memory.tasks.tolist(), memory.indices.tolist(), strict=True):
        if task < 2:
            own = ((labels // 2) == task).nonzero().squeeze(1)
            yield int(own[index])


def test_at_the_end_they_answer_as_a_nearest_mean_classifier_does():
    _, trainer, module = _fit(exits=_exits(), others=[Replay(20), NearestMeanClassifier()])
    expected = predictions(trainer, module)
    _, trainer, again = _fit(exits=_exits(exit_classifier="nearest_mean"), others=[Replay(20)])
    assert same_weights(module, again)
    torch.testing.assert_close(predictions(trainer, again), expected)


def test_images_are_compared_by_their_largest_values():
    features = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    assert torch.equal(pool_features(features), F.max_pool2d(features, 2).flatten(1))
    assert pool_features(torch.zeros(2, 5, 7)).shape == (2, 7)


def test_classes_to_come_are_never_predicted():
    seen = []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(predicted(pl_module))

    def predicted(pl_module):
        pl_module.eval()
        with torch.no_grad():
            labels = pl_module(TEST_IMAGES).argmax(1).unique()
        pl_module.train()
        return int(labels.max())

    _fit(exits=_exits(exit_classifier="nearest_mean", threshold=0.2), others=[Replay(20), Looks()])
    assert max(seen[:2]) < 2
    assert max(seen[2:4]) < 4
    assert max(seen) >= 4


@pytest.mark.parametrize("steps", [2, 4])
def test_a_task_that_ends_within_an_epoch_has_the_means_of_its_end(steps):
    exits, _, module = _fit(exits=_exits(exit_classifier="nearest_mean"), max_steps=steps, max_epochs=-1)
    head = exits.network.heads.nearest[-1]
    hooks = exits.network.attach(module.eval())
    with torch.no_grad(), hooks.collecting("features"):
        module(IMAGES[LABELS == 5])
        means = F.normalize(F.normalize(hooks.features[-1].double(), dim=1).mean(0), dim=0)
    exits.network.detach()
    assert head.known.all()
    torch.testing.assert_close(head.prototypes[5].double(), means, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"stream": {"eval_tasks": "all"}}, {"val_check_interval": 0.5}])
def test_early_stopping_on_a_loss_that_would_be_infinite(settings):
    stopping = EarlyStopping("val_loss", patience=50)
    with pytest.raises(MisconfigurationException, match="would end each task when it is infinite"):
        _fit(exits=_exits(exit_classifier="nearest_mean"), others=[stopping], limit_val_batches=1, **settings)


def test_means_keep_their_precision_in_a_network_of_half():
    exits, _, _ = _fit(exits=_exits(exit_classifier="nearest_mean", threshold=0.3), precision="bf16-true")
    assert {head.prototypes.dtype for head in exits.network.heads.nearest} == {torch.float32}


def test_what_the_end_costs_is_counted_for_nearest_means_too():
    exits = _fit(exits=_exits(exit_classifier="nearest_mean"))[0]
    first, second, end = (2 * 6 * width for width in exits.network.spec["widths"])
    total = 2 * (64 * 24 + 24 * 16 + 16 * 6)
    costs = [2 * 64 * 24 + first, 2 * (64 * 24 + 24 * 16) + first + second, total + first + second + end]
    assert exits.network.spec["costs"] == pytest.approx([cost / total for cost in costs])


def test_without_a_threshold_the_network_costs_what_it_does_without_exits():
    exits = _fit(exits=_exits())[0]
    assert exits.figures["cost"] == 1.0
    assert exits.figures["exit_costs"][-1] > 1.0


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "no memory"])
@pytest.mark.parametrize(("option", "regime"), [("geometric", "mixed"), ("nearest", "mixed"), ("nearest", "disjoint")])
def test_a_resumed_run_ends_the_same_to_the_bit(option, regime, replay, tmp_path):
    def fit(others=(), **settings):
        memory = [Replay(20)] if replay else []
        return _fit(
            exits=_exits(regime, **OPTIONS[option], threshold="auto:5pp"), others=[*memory, *others], **settings
        )

    whole, _, module = fit([SaveAfterSteps(tmp_path, (9, 15))])
    for place in (9, 15):
        resumed, _, again = fit(ckpt_path=tmp_path / f"{place}.ckpt")
        assert same_weights(module, again)
        assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("option", ["geometric", "nearest"])
def test_a_rejected_task_leaves_no_trace(option):
    kept = []

    class Keeps(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            kept.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    options = {**OPTIONS[option], "threshold": 0.5}
    rejected, _, module = _fit(exits=_exits(**options), others=[Replay(20), Judge(2)])
    _fit(exits=_exits(**options), others=[Replay(20), Keeps()])
    heads = {f"early_exits.{name}": tensor for name, tensor in rejected.state_dict()["heads"].items()}
    assert same({**module.state_dict(), **heads}, kept[2])


def test_a_second_fit_begins_afresh():
    exits = _exits(exit_classifier="nearest_mean")
    states = []
    for _ in range(2):
        _fit(exits=exits)
        states.append(exits.state_dict())
    assert same(*states)


# ------------------------------------------------------------------ bad input and YAML


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": "arithmetic"}, "`ensemble` must be one of 'none', 'cascade', 'geometric', got 'arithmetic'"),
        ({"distill": "first"}, "`distill` must be one of 'last', 'next', 'later', got 'first'"),
        ({"losses": "some"}, "`losses` must be one of 'last_head', 'all_exits', got 'some'"),
        ({"exit_classifier": "svm"}, "`exit_classifier` must be one of 'head', 'nearest_mean', got 'svm'"),
        ({"ensemble": "geometric"}, "`ensemble='geometric'` answers where samples may leave"),
        ({"exit_classifier": "nearest_mean", "ensemble": "cascade"}, "`ensemble='cascade'` joins what the heads say"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        _exits(**options)


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    _, trainer, _ = _fit(exits=_exits(ensemble="cascade"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="exits with ensemble=cascade, this EarlyExits with ensemble=none"):
        _fit(exits=_exits(), ckpt_path=tmp_path / "last.ckpt")


def test_options_come_from_the_command_line():
    chosen = ("layers=[model.body.1]", "ensemble=geometric", "threshold=0.9", "distill=last", "losses=all_exits")
    options = ["--trainer.fast_dev_run=1", "--trainer.callbacks+=EarlyExits"]
    options += [f"--trainer.callbacks.{name}" for name in chosen]
    model = ["--model=ImageClassifier", "--model.backbone=mlp", "--model.num_classes=10", "--model.input_shape=[1,8,8]"]
    data = ["--data=ClassIncremental", "--data.base=Digits", "--data.num_tasks=5"]
    cli = main(["fit", *model, *data, *options])
    [exits] = [callback for callback in cli.trainer.callbacks if isinstance(callback, EarlyExits)]
    assert exits.network.heads.ensemble is not None


@pytest.mark.slow
def test_each_exit_of_a_loaded_module_is_exported(tmp_path):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")  # what PyTorch exports with
    exits, trainer, module = _fit(exits=_exits(threshold=0.5, correction="tlc"))
    expected = _offline(exits, module, TEST_IMAGES)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lightning_cl.load(tmp_path / "last.ckpt", Deep)
    for position in range(2):
        exported = SubNetwork(loaded, position)
        with torch.no_grad():
            traced = torch.jit.trace(exported, (TEST_IMAGES,))
            torch.testing.assert_close(traced(TEST_IMAGES[:5]), expected[:5, position])
    torch.onnx.export(exported, (TEST_IMAGES,), tmp_path / "exit.onnx", dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(str(tmp_path / "exit.onnx"))
    [logits] = session.run(None, {session.input_names[0]: TEST_IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected[:, 1], atol=1e-4, rtol=1e-4)
