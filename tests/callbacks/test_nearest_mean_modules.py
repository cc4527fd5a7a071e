"""A nearest-mean head on modules and beside callbacks of all kinds, and what is left of it."""

import copy
import pickle

import pytest
import torch
import torchvision
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nearest_means import (
    TEST_IMAGES,
    AtTaskEnds,
    DigitsToPredict,
    MeansByHand,
    NoisyNet,
    PredictingNet,
    assert_prototypes,
    features_of,
    fit_nearest,
    numbers_of_task,
    predictions,
    remembered,
    unit,
)
from numbered_streams import IMAGES, LABELS, AnyBatch, DataOf, Judge, Numbered, fit_stream, same, same_weights
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from vanishing_data import Vanishing, run_copied

from lightning_cl.callbacks import ContinualMetrics, DarkExperienceReplay, NearestMeanClassifier, Replay
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, Joint, TaskList
from lightning_cl.tasks import ContinualCallback
from tests.modules import (
    CLASSIFIERS,
    DigitsData,
    Manual,
    Plain,
    PredictsLabels,
    TorchvisionModule,
    TrainingDigits,
    TwoHeads,
    WithoutValidation,
    quiet_trainer,
)

# ------------------------------------------------------------------ the zoo


@pytest.mark.parametrize(
    ("module", "base"),
    [*CLASSIFIERS, (WithoutValidation, TrainingDigits), (Manual, DigitsData), (PredictsLabels, DigitsData)],
)
def test_the_head_tells_classes_apart_whatever_the_module(module, base):
    """After one step a layer knows a sixth of the samples: the rest is what only the head can do."""
    seed_everything(0, verbose=False)
    metrics, nearest = ContinualMetrics(print_table=False), NearestMeanClassifier(refresh="task")
    validated = {} if base is not TrainingDigits else {"val_fraction": 0.2}
    sequence = ClassIncremental(base(), num_tasks=3, **validated)
    trainer = quiet_trainer(callbacks=[metrics, nearest, Replay(60)], max_epochs=1, limit_train_batches=1)
    trainer.fit(module(), datamodule=sequence)
    assert nearest.classifier.known.all()
    assert metrics.matrix[2].mean() > 0.6


class ResNet(TorchvisionModule):
    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=6)


def test_a_torchvision_resnet_has_the_head_in_place_of_its_last_layer():
    nearest = NearestMeanClassifier(refresh="task")
    sequence = ClassIncremental(DigitsData(), num_tasks=2)
    trainer = quiet_trainer(callbacks=[nearest, Replay(12)], max_epochs=1, limit_train_batches=1)
    module = ResNet()
    trainer.fit(module, datamodule=sequence)
    assert nearest.classifier.prototypes.shape == (6, 512)
    module.eval()
    attached = nearest.attach(module)
    with torch.no_grad():
        scores = module(IMAGES[:4])
        module.net.fc.weight.zero_()
        assert torch.equal(module(IMAGES[:4]), scores)
    attached.remove()


class Convolutional(PredictingNet):
    """A 1x1 convolution gives each position scores, and their mean is the answer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))

    def forward(self, images):
        return self.net(images.view(-1, 1, 8, 8)).mean((2, 3))


def test_a_pointwise_convolution_is_a_classification_layer():
    nearest, trainer, module = fit_nearest(module=Convolutional, replay=144)
    module.eval()
    with torch.no_grad():
        images = torch.cat([IMAGES, TEST_IMAGES]).view(-1, 1, 8, 8)
        rows = unit(module.net[:2](images).mean((2, 3)).double())
    means = unit(torch.stack([rows[:144][label == LABELS].mean(0) for label in range(6)]))
    torch.testing.assert_close(nearest.classifier.prototypes.double(), means, atol=1e-6, rtol=0)
    expected = torch.cdist(rows[144:], means).argmin(1)
    assert torch.equal(predictions(trainer, module).argmax(1), expected)


class WeightNormed(PredictingNet):
    def __init__(self):
        super().__init__()
        self.net[4] = weight_norm(self.net[4])


def test_a_weight_normed_layer_is_replaced_too():
    nearest, trainer, module = fit_nearest(module=WeightNormed, replay=144)
    by_hand = MeansByHand().add(module, list(range(144)))
    assert_prototypes(nearest, by_hand)
    assert torch.equal(predictions(trainer, module).argmax(1), by_hand.predict(module, TEST_IMAGES))


def test_a_named_layer_is_replaced_where_two_fit():
    nearest, _, module = fit_nearest(NearestMeanClassifier(head="main"), module=TwoHeads)
    attached, images = nearest.attach(module), TEST_IMAGES[:5]
    with torch.no_grad():
        answers = module.eval()(images)
        attached.remove()
        own = module(images)
    assert torch.equal(answers["auxiliary"], own["auxiliary"])
    assert torch.equal(answers["main"], nearest.classifier(module.net(images)))


def test_manual_optimisation_gives_the_head_that_the_automatic_one_does():
    heads = [fit_nearest(module=module)[0].state_dict() for module in (Plain, Manual)]
    assert same(*heads)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_head_answers_under_any_precision(precision):
    _, trainer, module = fit_nearest(replay=144, precision=precision)
    exact = MeansByHand().add(module.float(), list(range(144)))
    right = predictions(trainer, module).argmax(1) == exact.predict(module.float(), TEST_IMAGES)
    assert right.float().mean() > 0.9


# ------------------------------------------------------------------ streams of all kinds


def test_domains_share_their_classes():
    """A class that comes again has past samples in the memory, and all of the current task's."""

    def compare(trainer, module, task):
        sign = (1, -1)
        memory, by_class = replay.memory, {}
        parts = [(task, list(range(144)))]
        parts += [(p, memory.indices[memory.tasks == p].tolist()) for p in range(task)]
        for domain, numbers in parts:
            rows = unit(features_of(module, sign[domain] * IMAGES[numbers]))
            for label, row in zip(LABELS[numbers].tolist(), rows, strict=True):
                by_class.setdefault(label, []).append(row)
        means = unit(torch.stack([torch.stack(by_class[label]).mean(0) for label in range(6)]))
        torch.testing.assert_close(nearest.classifier.prototypes.double(), means, atol=1e-6, rtol=0)

    nearest, replay, ends = NearestMeanClassifier(), Replay(20), AtTaskEnds(compare)
    fit_nearest(nearest, replay, others=[ends], sequence=DomainIncremental(DigitsToPredict(), [None, torch.Tensor.neg]))
    assert len(ends.seen) == 2


@pytest.mark.parametrize("prototypes", ["memory+current", "all"])
def test_a_class_that_comes_again_is_the_mean_of_all_its_samples_where_no_memory_has_them(prototypes):
    nearest, sequence = NearestMeanClassifier(prototypes=prototypes), DomainIncremental(DigitsToPredict(), [None, _dim])
    _, _, module = fit_nearest(nearest, None, lambda: PredictingNet(lr=0.0), sequence=sequence)
    rows = unit(features_of(module, torch.cat([IMAGES, _dim(IMAGES)])))
    labels = torch.cat([LABELS, LABELS])
    means = unit(torch.stack([rows[labels == label].mean(0) for label in range(6)]))
    torch.testing.assert_close(nearest.classifier.prototypes.double(), means, atol=1e-6, rtol=0)


def _dim(image):
    return 0.5 - image


def test_one_task_of_all_data_needs_no_memory():
    nearest, _, module = fit_nearest(replay=None, sequence=Joint(DigitsToPredict()))
    assert_prototypes(nearest, MeansByHand().add(module, list(range(144))))


def test_tasks_of_different_data_sets():
    halves = [torch.utils.data.Subset(Numbered(), range(first, first + 72)) for first in (0, 72)]
    nearest = NearestMeanClassifier()
    fit_stream([Replay(20), nearest], sequence=TaskList([DataOf(half) for half in halves]))
    assert nearest.classifier.known.all()


@pytest.mark.parametrize("refresh", ["epoch", "task", 2])
@pytest.mark.parametrize("prototypes", ["memory+current", "memory", "all"])
def test_past_data_may_be_gone_where_exemplars_are_copied(prototypes, refresh, tmp_path):
    heads = []
    for storage, data in (("reference", Numbered()), ("copy", Vanishing())):
        nearest = NearestMeanClassifier(prototypes=prototypes, refresh=refresh)
        run_copied(tmp_path / storage, Replay(20, storage=storage), data, others=[nearest])
        heads.append(nearest.state_dict())
    assert same(*heads)


def test_without_a_memory_past_data_may_be_gone(tmp_path):
    nearest = NearestMeanClassifier()
    data = Vanishing()

    class Clear(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            data.first = task.index

    fit_stream([nearest, Clear()], data=DataOf(data))
    assert nearest.classifier.known.all()


# ------------------------------------------------------------------ a task is a transaction


@pytest.mark.parametrize("replay", [None, 20])
@pytest.mark.parametrize("refresh", ["epoch", 2])
def test_a_refused_task_leaves_the_head_as_it_was(replay, refresh):
    start = {}

    class Looks(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            start[task.index] = copy.deepcopy(nearest.state_dict())

        def on_task_rejected(self, trainer, pl_module, task):
            assert same(nearest.state_dict(), start[task.index])
            module.eval()
            with torch.no_grad():
                assert module(TEST_IMAGES)[:, 2:].eq(-float("inf")).all()
            module.train()

    nearest, module = NearestMeanClassifier(refresh=refresh), PredictingNet()
    fit_nearest(nearest, replay, module, others=[Judge(task=1), Looks()])
    assert same(start[1], start[2])
    assert nearest.classifier.known.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("replay", [None, 20])
def test_a_task_that_is_repeated_ends_with_the_head_of_one_training(replay):
    heads = [
        fit_nearest(replay=replay, module=NoisyNet, others=[Judge(1, attempts)])[0].state_dict()["classifier"]
        for attempts in ([], [1, 0])
    ]
    assert same(*heads)


def test_a_first_task_that_is_refused_leaves_no_head():
    nearest, trainer, _ = fit_nearest(others=[Judge(task=0)], stream={"num_tasks": 2, "epochs_per_task": 1})
    assert not nearest.classifier.known[:3].any()
    assert trainer.global_step == 10


# ------------------------------------------------------------------ nothing is left


def _hooks(module):
    return {name: len(layer._forward_hooks) for name, layer in module.named_modules() if layer._forward_hooks}


def test_nothing_is_left_after_any_trainer_call():
    _, trainer, module = fit_nearest()
    sequence, callbacks = trainer.datamodule, list(trainer.callbacks)
    assert _hooks(module) == {}
    for call in (trainer.validate, trainer.test, trainer.predict):
        call(module, datamodule=sequence, **({} if call == trainer.predict else {"verbose": False}))
        assert _hooks(module) == {}
    assert trainer.callbacks == callbacks
    assert "classifier" not in dict(module.named_modules())


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end", "on_validation_end", "on_task_end"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(hook, error):
    class Breaks(ContinualCallback):
        pass

    def break_down(trainer, *args):
        if hook == "on_train_start" or trainer.datamodule.current_task.index == 1:
            raise error("broken")

    breaks, module = Breaks(), PredictingNet()
    setattr(breaks, hook, break_down)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit_nearest(module=module, others=[breaks], limit_val_batches=1.0)
    assert _hooks(module) == {}


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_nothing_is_left_after_an_exception_in_an_evaluation(call):
    class Breaks(PredictingNet):
        broken = False

        def forward(self, images):
            if self.broken:
                raise RuntimeError("broken")
            return super().forward(images)

    _, trainer, module = fit_nearest(module=Breaks, limit_val_batches=1.0)
    module.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        getattr(trainer, call)(module, datamodule=trainer.datamodule)
    assert _hooks(module) == {}


def test_the_callback_can_be_copied_and_pickled_after_a_fit():
    nearest, _, _ = fit_nearest()
    for again in (copy.deepcopy(nearest), pickle.loads(pickle.dumps(nearest))):
        assert same(again.state_dict(), nearest.state_dict())


# ------------------------------------------------------------------ by hand, and among others


def test_attached_by_hand_the_head_answers_until_it_is_removed():
    nearest, trainer, module = fit_nearest()
    expected = predictions(trainer, module)
    module.eval()
    with torch.no_grad():
        own = module(TEST_IMAGES)
        attached = nearest.attach(module)
        scores = module(TEST_IMAGES)
        attached.remove()
        assert torch.equal(module(TEST_IMAGES), own)
    torch.testing.assert_close(scores, expected)
    assert not torch.equal(own, scores)
    assert _hooks(module) == {}


def test_a_head_that_learnt_nothing_cannot_be_attached():
    with pytest.raises(RuntimeError, match="NearestMeanClassifier has learnt no head yet"):
        NearestMeanClassifier().attach(PredictingNet())


class AnotherHead(NearestMeanClassifier):
    pass


@pytest.mark.parametrize("order", [1, -1])
def test_two_heads_in_one_run_are_one_error_that_names_both(order):
    heads = [NearestMeanClassifier(), AnotherHead()][::order]
    with pytest.raises(MisconfigurationException, match="One head can stand in") as error:
        fit_stream(heads, PredictingNet, DigitsToPredict())
    assert "NearestMeanClassifier" in str(error.value)
    assert "AnotherHead" in str(error.value)


def _companions(folder):
    return [
        ContinualMetrics(print_table=False),
        EarlyStopping("val_acc", mode="max", patience=1),
        ModelCheckpoint(folder, save_top_k=-1),
        Replay(20),
        NearestMeanClassifier(),
    ]


def test_callbacks_in_any_order_give_the_same_run(tmp_path):
    runs = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]):
        callbacks = [_companions(tmp_path / str(order))[place] for place in order]
        settings = {"enable_checkpointing": True, "limit_val_batches": 1.0, "max_epochs": 3}
        trainer, module = fit_stream(callbacks, NoisyNet, DigitsToPredict(), **settings)
        metrics = next(callback for callback in callbacks if isinstance(callback, ContinualMetrics))
        nearest = next(callback for callback in callbacks if isinstance(callback, NearestMeanClassifier))
        runs.append((dict(module.state_dict()), metrics.matrix, nearest.state_dict(), trainer.global_step))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_replayed_logits_are_the_modules_own():
    """Dark experience replay asks the module in evaluation, where the head would answer."""
    replays = [DarkExperienceReplay(20), DarkExperienceReplay(20)]
    _, with_head = fit_stream([replays[0], NearestMeanClassifier()], AnyBatch)
    _, without = fit_stream([replays[1]], AnyBatch)
    assert replays[0].memory.extras["logits"].isfinite().all()
    assert same(replays[0].memory.state_dict(), replays[1].memory.state_dict())
    assert same_weights(with_head, without)


def test_what_the_memory_holds_is_what_past_prototypes_are_means_of():
    """Not what it held before the task's end: the memory is filled first, whatever the order of the callbacks."""

    def compare(trainer, module, task):
        by_hand = MeansByHand().add(module, remembered(replay.memory, without=task))
        assert_prototypes(nearest, by_hand.add(module, numbers_of_task(task)))
        return sorted(remembered(replay.memory))

    nearest, replay, ends = NearestMeanClassifier(), Replay(20), AtTaskEnds(compare)
    fit_stream([ends, nearest, replay], PredictingNet, DigitsToPredict())
    assert len({tuple(numbers) for numbers in ends.seen}) == 3
