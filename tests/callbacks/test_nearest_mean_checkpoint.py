"""The head in checkpoints: evaluated with a fresh callback, and resumed to the bit."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nearest_means import DigitsToPredict, NoisyNet, PredictingNet, fit_nearest, predictions
from numbered_streams import fit_stream, same, same_weights
from vanishing_data import Vanishing, run_copied

from lightning_cl.callbacks import NearestMeanClassifier, Replay
from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from tests.modules import quiet_trainer

PROTOTYPES = pytest.mark.parametrize("prototypes", ["memory+current", "memory", "all"])


class SaveAfterStep(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fit, the checkpoint of its end, and the scores that its Trainer predicted right afterwards."""
    path = tmp_path_factory.mktemp("fit") / "end.ckpt"
    nearest, trainer, module = fit_nearest()
    trainer.save_checkpoint(path)
    return nearest, trainer, path, predictions(trainer, module)


def _fresh(nearest=None):
    trainer = quiet_trainer(callbacks=[nearest or NearestMeanClassifier()])
    return trainer, ClassIncremental(DigitsToPredict(), num_tasks=3)


# ------------------------------------------------------------------ evaluated later


def test_predicting_with_a_checkpoint_gives_the_scores_of_the_fit(fitted):
    trainer, sequence = _fresh()
    scores = torch.cat(trainer.predict(PredictingNet(), datamodule=sequence, ckpt_path=fitted[2]))
    assert torch.equal(scores, fitted[3])


@pytest.mark.parametrize("call", ["validate", "test"])
def test_evaluating_a_checkpoint_gives_the_accuracy_of_the_fit(call, fitted):
    _, end, path, _ = fitted
    end.limit_val_batches = 1.0
    expected = getattr(end, call)(end.lightning_module, datamodule=end.datamodule, verbose=False)
    trainer, sequence = _fresh()
    assert getattr(trainer, call)(PredictingNet(), datamodule=sequence, ckpt_path=path, verbose=False) == expected


def test_a_checkpoint_may_be_evaluated_at_another_temperature(fitted):
    trainer, sequence = _fresh(NearestMeanClassifier(temperature=0.5))
    scores = torch.cat(trainer.predict(PredictingNet(), datamodule=sequence, ckpt_path=fitted[2]))
    torch.testing.assert_close(scores, fitted[3] * 2)


def test_a_checkpoint_is_not_evaluated_with_means_of_another_kind(fitted):
    trainer, sequence = _fresh(NearestMeanClassifier(normalize=False))
    with pytest.raises(MisconfigurationException, match=r"`normalize=True`.*`normalize=False`"):
        trainer.test(PredictingNet(), datamodule=sequence, ckpt_path=fitted[2], verbose=False)


def test_a_checkpoint_from_before_the_first_means_is_evaluated_with_the_modules_own_layer(tmp_path):
    path = tmp_path / "step=1.ckpt"
    fit_nearest(others=[SaveAfterStep(1, path)])
    trainer, sequence = _fresh()
    scores = torch.cat(trainer.predict(PredictingNet(), datamodule=sequence, ckpt_path=path))
    assert scores.isfinite().all()
    assert same(scores, torch.cat(quiet_trainer().predict(PredictingNet(), datamodule=sequence, ckpt_path=path)))


def test_the_state_is_plain(fitted):
    state = torch.load(fitted[2], weights_only=True)["callbacks"]["NearestMeanClassifier"]
    assert same(state, fitted[0].state_dict())
    prototypes = state["classifier"]["prototypes"]
    assert prototypes.untyped_storage().nbytes() == prototypes.numel() * prototypes.element_size()


def test_the_head_is_no_part_of_the_modules_weights(fitted):
    assert set(torch.load(fitted[2], weights_only=True)["state_dict"]) == set(PredictingNet().state_dict())


@pytest.mark.parametrize("replay", [None, 20])
def test_a_saved_state_is_not_moved_by_the_run_that_goes_on(replay):
    states = []

    class Keeps(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states.append((nearest.state_dict(), copy.deepcopy(nearest.state_dict())))

    nearest = NearestMeanClassifier(refresh=1)
    fit_nearest(nearest, replay, others=[Keeps()])
    assert all(same(*pair) for pair in states)


# ------------------------------------------------------------------ resumed


REPLAYS = {
    "replay": lambda: [Replay(20)],
    "online": lambda: [Replay(20, start="online")],
    "none": lambda: [],
}
CASES = [
    ("memory+current", "replay"),
    ("memory+current", "online"),
    ("memory+current", "none"),
    ("memory", "online"),
    ("memory", "replay"),
    ("all", "none"),
]
THROUGH = {}


def _run(prototypes, replay, refresh, others=(), ckpt_path=None):
    """Two epochs of three steps in each of three tasks, with validation."""
    nearest = NearestMeanClassifier(prototypes=prototypes, refresh=refresh)
    settings = {"max_epochs": 2, "limit_val_batches": 1.0, "enable_checkpointing": True, "ckpt_path": ckpt_path}
    trainer, module = fit_stream([*REPLAYS[replay](), nearest, *others], NoisyNet, DigitsToPredict(), **settings)
    return [nearest.state_dict(), dict(module.state_dict()), float(trainer.callback_metrics["val_acc"])]


def _through(case, factory):
    """Return the end of a run that went through, and the folder with the checkpoints that it left."""
    if case not in THROUGH:
        folder = factory.mktemp("through")
        saves = [SaveAfterStep(step, folder / f"step={step}.ckpt") for step in (8, 9, 12)]
        epochs = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        THROUGH[case] = _run(*case, others=[*saves, epochs]), folder
    return THROUGH[case]


PLACES = {
    "step=8": "in an epoch",
    "step=9": "last batch of an epoch",
    "step=12": "last batch of a task",
    "epoch=1": "end of a task",
    "epoch=2": "end of an epoch",
}
COMBINED = [("epoch", place) for place in PLACES] + [(refresh, "step=8") for refresh in ("task", 4)]


@pytest.mark.parametrize(("prototypes", "replay"), CASES)
@pytest.mark.parametrize(
    ("refresh", "place"), COMBINED, ids=[f"{refresh}, {PLACES[place]}" for refresh, place in COMBINED]
)
def test_a_resumed_run_ends_with_the_same_head(prototypes, replay, refresh, place, tmp_path_factory):
    case = prototypes, replay, refresh
    expected, folder = _through(case, tmp_path_factory)
    checkpoint = ModelCheckpoint(folder / "resumed", save_top_k=0)
    assert same(_run(*case, others=[checkpoint], ckpt_path=folder / f"{place}.ckpt"), expected)


@pytest.mark.parametrize("step", [9, 12], ids=["at a task's end", "in an epoch"])
def test_a_resumed_run_knows_the_sums_of_past_domains(step, tmp_path):
    path, heads = tmp_path / "saved.ckpt", []
    for others, ckpt_path in (([SaveAfterStep(step, path)], None), ([], path)):
        sequence = DomainIncremental(DigitsToPredict(), [None, torch.Tensor.neg])  # tasks of nine steps
        nearest, _, _ = fit_nearest(replay=None, sequence=sequence, others=others, ckpt_path=ckpt_path)
        heads.append(nearest.state_dict())
    assert same(*heads)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_checkpoint_has_the_means_of_its_step_wherever_the_saving_callback_stands(first, tmp_path):
    path, nearest = tmp_path / "step=4.ckpt", NearestMeanClassifier(refresh=4)
    kept = []

    class Keeps(Callback):
        def on_train_batch_start(self, trainer, *args):
            kept.append(nearest.state_dict())

    callbacks = [SaveAfterStep(4, path), nearest]
    fit_stream([Keeps(), *(callbacks if first else callbacks[::-1])], PredictingNet, DigitsToPredict())
    state = torch.load(path, weights_only=True)["callbacks"]["NearestMeanClassifier"]
    assert same(state["classifier"], kept[4]["classifier"])
    assert not same(state["classifier"], kept[3]["classifier"])


def test_a_run_without_past_data_is_resumed_with_the_same_head(tmp_path):
    heads, resume = [], None
    for name in ("through", "resumed"):
        nearest, data = NearestMeanClassifier(), Vanishing()
        data.first = 1 if resume else 0
        run_copied(tmp_path / name, Replay(20, storage="copy"), data, resume=resume, others=[nearest], every=1)
        heads.append(nearest.state_dict())
        resume = tmp_path / name / "step=5.ckpt"
    assert same(*heads)


def test_resuming_with_means_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit_nearest(others=[SaveAfterStep(4, path)])
    with pytest.raises(MisconfigurationException, match=r"`normalize=True`.*`normalize=False`"):
        fit_nearest(NearestMeanClassifier(normalize=False), ckpt_path=path)


def test_a_run_without_a_head_can_be_resumed_with_one(tmp_path):
    path = tmp_path / "saved.ckpt"
    _, through = fit_stream([Replay(20), SaveAfterStep(4, path)], PredictingNet, DigitsToPredict())
    nearest, _, resumed = fit_nearest(ckpt_path=path)
    assert same_weights(resumed, through)
    assert nearest.classifier.known.all()


def test_a_run_with_a_head_can_be_resumed_without_one(tmp_path):
    path = tmp_path / "saved.ckpt"
    _, _, through = fit_nearest(others=[SaveAfterStep(4, path)])
    _, resumed = fit_stream([Replay(20)], PredictingNet, DigitsToPredict(), ckpt_path=path)
    assert same_weights(resumed, through)


def test_the_best_checkpoint_is_tested_with_its_own_head(tmp_path):
    best = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    nearest, trainer, module = fit_nearest(others=[best], enable_checkpointing=True)
    first = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["NearestMeanClassifier"]
    scores = predictions(trainer, module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(nearest.state_dict()["classifier"], first["classifier"])
    assert scores[:, 2:].eq(-float("inf")).all()
