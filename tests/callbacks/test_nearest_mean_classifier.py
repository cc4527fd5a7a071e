"""A nearest-mean head beside a training that does not notice it: which samples it knows, and when it answers."""

from functools import lru_cache

import pytest
import torch
from lightning.pytorch import Callback
from nearest_means import (
    TEST_IMAGES,
    TEST_LABELS,
    VAL_IMAGES,
    VAL_LABELS,
    AfterSteps,
    AtTaskEnds,
    Augmented,
    DigitsToPredict,
    MeansByHand,
    NoisyNet,
    Photographs,
    PredictingNet,
    RestlessNet,
    assert_prototypes,
    features_of,
    fit_nearest,
    numbers_of_task,
    photograph,
    predictions,
    remembered,
)
from numbered_streams import fit_stream, same, same_weights

from lightning_cl.callbacks import ContinualMetrics, DarkExperienceReplay, NearestMeanClassifier, Replay
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import Manual, quiet_trainer

PROTOTYPES = pytest.mark.parametrize("prototypes", ["memory+current", "memory", "all"])
REFRESHES = pytest.mark.parametrize("refresh", ["epoch", "task", 3])

REPLAYS = {
    "replay": lambda: [Replay(20)],
    "dark, online": lambda: [DarkExperienceReplay(20, start="online")],
    "none": lambda: [],
}
MODULES = {"automatic": RestlessNet, "manual": lambda: Manual(dropout=0.3, batch_norm=True)}


# ------------------------------------------------------------------ training does not notice


def _run(callbacks, module="automatic", **settings):
    photographs = Photographs()
    settings = {"max_epochs": 2, "limit_val_batches": 1.0, "data": DigitsToPredict(), **settings}
    fit_stream([*callbacks, photographs], MODULES[module], **settings)
    return photographs.steps, photographs.end


@lru_cache
def _without_head(replay, module="automatic"):
    return _run(REPLAYS[replay](), module)


@PROTOTYPES
@REFRESHES
@pytest.mark.parametrize("replay", ["replay", "dark, online"])
def test_training_is_the_same_to_the_bit_with_and_without_the_head(replay, prototypes, refresh):
    head = NearestMeanClassifier(prototypes=prototypes, refresh=refresh)
    assert same(_run([*REPLAYS[replay](), head]), _without_head(replay))


@pytest.mark.parametrize("prototypes", ["memory+current", "all"])
def test_training_without_a_memory_is_the_same_to_the_bit(prototypes):
    head = NearestMeanClassifier(prototypes=prototypes, refresh=2)
    assert same(_run([head]), _without_head("none"))


def test_manual_optimisation_is_the_same_to_the_bit():
    assert same(_run([Replay(20), NearestMeanClassifier()], "manual"), _without_head("replay", "manual"))


@pytest.mark.parametrize("selection", ["herding", "class_balanced"])
def test_the_memory_is_that_of_a_run_without_the_head(selection):
    states = []
    for heads in ([], [NearestMeanClassifier(refresh=2)]):
        replay = Replay(20, selection)
        fit_stream([replay, *heads], NoisyNet, DigitsToPredict())
        states.append(replay.state_dict())
    assert same(*states)


def test_training_is_the_same_to_the_bit_with_loader_workers():
    def settings():
        return {"data": DigitsToPredict(num_workers=1), "max_epochs": 1}

    head = NearestMeanClassifier(refresh=2)
    assert same(_run([Replay(20), head], **settings()), _run([Replay(20)], **settings()))


def test_a_module_that_is_trained_in_eval_mode_is_trained_on_its_own_output():
    """Lightning leaves the mode to the user: one fine-tunes without dropout or with frozen statistics that way."""
    trained = []
    for heads in ([], [NearestMeanClassifier(refresh=2)]):
        torch.manual_seed(0)
        module = NoisyNet().eval()
        fit_stream([Replay(20), *heads], module, DigitsToPredict())
        trained.append(module)
    assert same_weights(*trained)


@PROTOTYPES
def test_taking_means_leaves_modes_generators_buffers_and_gradients(prototypes):
    class Before(ContinualCallback):
        def on_batch_trained(self, trainer, pl_module, batch_idx):
            self.photograph = photograph(pl_module)

    class Compares(Callback):
        pairs = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.pairs = (*self.pairs, (before.photograph, photograph(pl_module)))

    before, compares = Before(), Compares()
    fit_nearest(NearestMeanClassifier(prototypes=prototypes, refresh=1), module=RestlessNet, others=[before, compares])
    assert len(compares.pairs) == 9
    for first, second in compares.pairs:
        assert any(gradient is not None for gradient in first[3])
        assert same(first, second)


# ------------------------------------------------------------------ which samples


def _by_hand(nearest, replay, trainer, module, task, at_task_end, shifted=False):
    """Prototypes from the samples that the documentation names, under the weights of this moment."""
    means, memory = MeansByHand(), None if replay is None else replay.memory
    if nearest.prototypes == "memory":
        return means.add(module, remembered(memory), shifted)
    means.add(module, remembered(memory, without=task), shifted)
    return means.add(module, numbers_of_task(task), shifted)


@pytest.mark.parametrize("refresh", ["epoch", "task"])
@pytest.mark.parametrize("prototypes", ["memory+current", "memory"])
@pytest.mark.parametrize("data", [DigitsToPredict, Augmented])
@pytest.mark.parametrize("start", ["next_task", "online"])
def test_prototypes_at_a_tasks_end_are_means_of_the_samples_meant(prototypes, data, refresh, start):
    def compare(trainer, module, task):
        by_hand = _by_hand(nearest, replay, trainer, module, task, True, data is Augmented)
        assert_prototypes(nearest, by_hand)

    nearest = NearestMeanClassifier(prototypes=prototypes, refresh=refresh)
    replay, ends = Replay(20, start=start), AtTaskEnds(compare)
    fit_nearest(nearest, replay, data=data(), others=[ends], max_epochs=2)
    assert len(ends.seen) == 3


@pytest.mark.parametrize(("prototypes", "replay"), [("all", 20), ("all", None), ("memory+current", None)])
def test_means_of_past_tasks_stay_as_they_were_when_no_memory_has_their_samples(prototypes, replay):
    def compare(trainer, module, task):
        total.add(module, numbers_of_task(task))
        assert_prototypes(nearest, total)

    nearest, total = NearestMeanClassifier(prototypes=prototypes), MeansByHand()
    ends = AtTaskEnds(compare)
    fit_nearest(nearest, replay, module=NoisyNet, others=[ends], max_epochs=2)
    assert len(ends.seen) == 3


class _ValidatesByHand(Callback):
    """Keeps the accuracy that validation logged, and the one that prototypes by hand give at that moment."""

    def __init__(self, nearest, replay, shifted):
        self.nearest, self.replay, self.shifted = nearest, replay, shifted
        self.logged, self.by_hand = [], []

    def on_validation_end(self, trainer, pl_module):
        task = trainer.datamodule.current_task.index
        self.logged.append(float(trainer.callback_metrics["val_acc"]))
        if self.nearest.prototypes == "memory" and task == 0 and len(self.replay.memory) == 0:
            features = features_of(pl_module, _shift(VAL_IMAGES, self.shifted))
            with torch.no_grad():
                predicted = pl_module.net[4](features.float()).argmax(1)
        else:
            means = _by_hand(self.nearest, self.replay, trainer, pl_module, task, False, self.shifted)
            predicted = means.predict(pl_module, _shift(VAL_IMAGES, self.shifted))
        seen = 2 * (task + 1) > VAL_LABELS
        self.by_hand.append(float((predicted == VAL_LABELS)[seen].float().mean()))


def _shift(images, shifted):
    return images * 2 - 1 if shifted else images


@pytest.mark.parametrize("prototypes", ["memory+current", "memory"])
@pytest.mark.parametrize("data", [DigitsToPredict, Augmented])
def test_validation_in_the_fit_uses_the_prototypes_of_that_moment(prototypes, data):
    nearest, replay = NearestMeanClassifier(prototypes=prototypes), Replay(20)
    validates = _ValidatesByHand(nearest, replay, data is Augmented)
    fit_nearest(nearest, replay, data=data(), others=[validates], max_epochs=2, limit_val_batches=1.0)
    assert validates.logged == pytest.approx(validates.by_hand, abs=1e-6)
    assert len(validates.logged) == 6


@PROTOTYPES
@pytest.mark.parametrize("data", [DigitsToPredict, Augmented])
def test_every_evaluation_after_the_fit_uses_the_head(prototypes, data):
    shifted, total = data is Augmented, MeansByHand()
    nearest, replay = NearestMeanClassifier(prototypes=prototypes), Replay(20)
    ends = AtTaskEnds(lambda trainer, module, task: total.add(module, numbers_of_task(task), shifted))
    _, trainer, module = fit_nearest(nearest, replay, data=data(), others=[ends], limit_val_batches=1.0)
    means = total if prototypes == "all" else _by_hand(nearest, replay, trainer, module, 2, True, shifted)
    (validated,) = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    (tested,) = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    on_val, on_test = (means.predict(module, _shift(images, shifted)) for images in (VAL_IMAGES, TEST_IMAGES))
    assert validated["val_acc"] == pytest.approx(float((on_val == VAL_LABELS).float().mean()))
    assert tested["test_acc"] == pytest.approx(float((on_test == TEST_LABELS).float().mean()))
    assert torch.equal(predictions(trainer, module).argmax(1), on_test)


def test_the_matrix_of_accuracies_is_that_of_the_head():
    def by_hand(trainer, module, task):
        means = _by_hand(nearest, replay, trainer, module, task, True)
        right = means.predict(module, VAL_IMAGES) == VAL_LABELS
        return [float(right[past == VAL_LABELS // 2].float().mean()) for past in range(task + 1)]

    nearest, replay, metrics = NearestMeanClassifier(), Replay(20), ContinualMetrics(print_table=False)
    ends = AtTaskEnds(by_hand)
    fit_nearest(nearest, replay, others=[metrics, ends])
    for task, row in enumerate(ends.seen):
        assert metrics.matrix[task, : task + 1].tolist() == pytest.approx(row, abs=1e-6)


def test_a_memory_of_all_past_data_gives_the_means_of_all_data():
    """What the paper calls the oracle: nothing is approximated by exemplars."""
    nearest, _, module = fit_nearest(replay=144)
    assert_prototypes(nearest, MeansByHand().add(module, list(range(144))))


def test_with_a_frozen_backbone_running_sums_are_exact():
    nearest, _, module = fit_nearest(NearestMeanClassifier(prototypes="all"), None, lambda: PredictingNet(lr=0.0))
    assert_prototypes(nearest, MeansByHand().add(module, list(range(144))))


@pytest.mark.parametrize("prototypes", ["memory+current", "all"])
def test_taking_means_of_the_same_weights_again_changes_nothing(prototypes):
    nearest, after = (
        NearestMeanClassifier(prototypes=prototypes, refresh=1),
        AfterSteps(lambda _: nearest.state_dict()["classifier"]),
    )
    fit_nearest(nearest, None, lambda: PredictingNet(lr=0.0), others=[after])
    assert all(same(after.seen[3 * task], state) for task in range(3) for state in after.seen[3 * task :][:3])
    assert same(after.seen[-1], nearest.state_dict()["classifier"])


def test_a_second_fit_begins_without_a_head():
    nearest, trainer, module = fit_nearest()
    steps = AfterSteps(lambda _: nearest.classifier is None)
    trainer.callbacks.append(steps)
    trainer.fit(module, datamodule=ClassIncremental(DigitsToPredict(), num_tasks=3))
    assert steps.seen[:3] == [True, True, False]


# ------------------------------------------------------------------ when they are taken


def _changes(refresh, replay=20, prototypes="memory+current", **settings):
    """Return after which batches and at which tasks' ends there are other prototypes than before."""

    def look(event):
        states.append(nearest.state_dict()["classifier"])
        if not same(*states[-2:]):
            events.append(event)

    nearest, states, events = NearestMeanClassifier(refresh=refresh, prototypes=prototypes), [{}], []
    batches = AfterSteps(lambda _: look(len(batches.seen) + 1))
    ends = AtTaskEnds(lambda trainer, module, task: look(f"end of {task}"))
    fit_nearest(nearest, replay, others=[batches, ends], **settings)
    return events


@pytest.mark.parametrize(
    ("refresh", "expected"),
    [
        # at its end the first task has no past, so that nothing is left to change
        ("epoch", [3, 6, 9, 12, "end of 1", 15, 18, "end of 2"]),
        ("task", ["end of 0", "end of 1", "end of 2"]),
        (4, [4, "end of 0", 8, 12, "end of 1", 16, "end of 2"]),
        (100, ["end of 0", "end of 1", "end of 2"]),
    ],
    ids=str,
)
def test_means_are_taken_when_they_are_due(refresh, expected):
    assert _changes(refresh, max_epochs=2) == expected  # two epochs of three batches in each task


@pytest.mark.parametrize(("prototypes", "replay"), [("memory+current", None), ("memory", Replay(20, start="online"))])
def test_steps_are_counted_as_the_optimizer_makes_them(prototypes, replay):
    # each epoch has three batches, and the optimizer steps after the second and the third
    changes = _changes(4, replay, prototypes, accumulate_grad_batches=2)
    assert [change for change in changes if isinstance(change, int)] == [6]


# ------------------------------------------------------------------ who answers


def test_before_any_class_is_known_the_module_answers_for_itself():
    nearest, module = NearestMeanClassifier(), PredictingNet()
    trainer = quiet_trainer(callbacks=[nearest])
    (validated,) = trainer.validate(module, datamodule=ClassIncremental(DigitsToPredict(), num_tasks=3), verbose=False)
    with torch.no_grad():
        right = module.eval()(VAL_IMAGES).argmax(1) == VAL_LABELS
    assert validated["val_acc"] == pytest.approx(float(right.float().mean()))


def test_the_sanity_check_sees_the_modules_own_answer():
    class Checks(Callback):
        logged, own = (), ()

        def on_sanity_check_end(self, trainer, pl_module):
            self.logged = float(trainer.callback_metrics["val_acc"])
            features = features_of(pl_module, VAL_IMAGES[VAL_LABELS < 2])
            with torch.no_grad():
                right = pl_module.net[4](features.float()).argmax(1) == VAL_LABELS[VAL_LABELS < 2]
            self.own = float(right.float().mean())

    checks = Checks()
    fit_nearest(others=[checks], num_sanity_val_steps=-1, limit_val_batches=1.0)
    assert checks.logged == pytest.approx(checks.own)


def test_classes_that_were_not_seen_are_never_predicted():
    def predict(trainer, module, task):
        module.eval()
        with torch.no_grad():
            scores = module(torch.cat([TEST_IMAGES, torch.zeros(1, 64), -9 * TEST_IMAGES]))
        module.train()
        assert scores[:, 2 * task + 2 :].eq(-float("inf")).all()
        assert scores[:, : 2 * task + 2].isfinite().all()

    ends = AtTaskEnds(predict)
    fit_nearest(others=[ends])
    assert len(ends.seen) == 3


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_of_the_layer_never_influence_a_prediction(normalize):
    _, trainer, module = fit_nearest(NearestMeanClassifier(normalize=normalize))
    before = predictions(trainer, module)
    with torch.no_grad():
        for parameter in module.net[4].parameters():
            parameter.normal_(std=100)
    assert torch.equal(predictions(trainer, module), before)


def test_without_normalizing_prototypes_are_plain_means():
    nearest, _, module = fit_nearest(NearestMeanClassifier(normalize=False), 144)
    features = features_of(module, TEST_IMAGES)
    assert nearest.classifier.prototypes.norm(dim=1).max() > 1.1
    scores = nearest.classifier(features.float())
    distances = (features[:, None] - nearest.classifier.prototypes.double()).square().sum(2)
    torch.testing.assert_close(scores.double(), -distances, atol=1e-4, rtol=1e-4)


def test_the_temperature_divides_the_scores():
    scores = [
        predictions(*fit_nearest(NearestMeanClassifier(temperature=temperature))[1:]) for temperature in (1.0, 0.1)
    ]
    torch.testing.assert_close(scores[0] * 10, scores[1])
