"""AdaGauss on a stream: what its adapter learns, its Gaussians, and what it predicts."""

import pytest
import torch
from feature_streams import WIDTH, Images, Narrow, ada_gauss, end_of, fit_images
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from numbered_streams import IMAGES, LABELS, same
from regularised_streams import Notes
from torch import nn

import lightning_cl
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, Joint, Permute
from lightning_cl.heads import ClassGaussians
from lightning_cl.tasks import ContinualCallback, added_loss
from lightning_cl.tasks.adapter_training import AdapterTraining
from tests.modules import quiet_trainer

ALL = IMAGES.view(-1, 1, 8, 8)


class Keeps(AdapterTraining):
    """Keeps what adapters are trained on, and the adapters."""

    def run(self, trainer, before, after, *args, **kwargs):
        adapter = super().run(trainer, before, after, *args, **kwargs)
        self.runs.append((before.clone(), after.clone(), adapter))
        return adapter


def _keeping(callback):
    keeps = Keeps(**vars(callback.adapter_training))
    object.__setattr__(keeps, "runs", [])
    callback.adapter_training = keeps
    return keeps.runs


def _gaussians_by_hand(net, flips=True, labels=range(6)):
    """Gaussians of the training images of some classes, sample by sample."""
    gaussians = ClassGaussians(6, WIDTH)
    chosen = torch.cat([(label == LABELS).nonzero().flatten() for label in labels])
    with torch.no_grad():
        for images in (ALL[chosen], ALL[chosen].flip(-1))[: 1 + flips]:
            gaussians.update(net[:-1].eval()(images), LABELS[chosen])
    return gaussians


def _close(got, wanted, classes):
    torch.testing.assert_close(got.means[classes], wanted.means[classes], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.covariances()[classes], wanted.covariances()[classes], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------ the adapter


@pytest.mark.parametrize("flips", [False, True])
def test_the_adapter_learns_from_features_before_the_task_to_those_after_it(flips):
    callback, notes = ada_gauss(flips=flips), Notes()
    runs = _keeping(callback)
    fit_images([callback, notes])
    images = ALL[48:96]
    views = torch.stack([images, images.flip(-1)], 1).flatten(0, 1) if flips else images
    with torch.no_grad():
        expected = [net[:-1](views) for net in notes.networks[:2]]
    for got, wanted in zip(runs[0][:2], expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_there_is_an_adapter_for_each_task_but_the_first():
    callback = ada_gauss()
    runs = _keeping(callback)
    fit_images([callback])
    assert len(runs) == 2


def test_the_adapters_training_is_shown_on_the_progress_bar(capfd):
    fit_images([ada_gauss(), TQDMProgressBar()], enable_progress_bar=True)
    assert "Adapter: " in "".join(capfd.readouterr())


def test_without_adaptation_no_adapter_is_trained():
    callback = ada_gauss(adapt="none")
    runs = _keeping(callback)
    fit_images([callback])
    assert runs == []


# ------------------------------------------------------------------ Gaussians


@pytest.mark.parametrize(
    ("adapt", "flips"), [("none", False), ("mean", True), ("diag", True), ("full", True), ("full", False)]
)
def test_classes_of_the_last_task_have_the_gaussians_of_their_images(adapt, flips):
    callback = ada_gauss(adapt=adapt, flips=flips)
    _, module = fit_images([callback])
    _close(callback.gaussians, _gaussians_by_hand(module.net, flips), [4, 5])


def test_without_adaptation_past_classes_stay_what_they_were_at_their_tasks_end():
    callback, notes = ada_gauss(adapt="none"), Notes()
    fit_images([callback, notes])
    for task in (0, 1):
        classes = [2 * task, 2 * task + 1]
        _close(callback.gaussians, _gaussians_by_hand(notes.networks[task]), classes)


def test_adapted_means_are_those_of_samples_that_went_through_the_adapter():
    callback, notes = ada_gauss(adapt="mean"), Notes()
    runs = _keeping(callback)
    fit_images([callback, notes], stream={"num_tasks": 2})
    before = _gaussians_by_hand(notes.networks[0], labels=[0, 1, 2])
    expected = runs[0][2](before.means[:3].float()).double()
    torch.testing.assert_close(callback.gaussians.means[:3], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapt", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mean", "diag")), "full"])
def test_adapted_gaussians_are_nearer_to_what_past_classes_look_like_now(adapt):
    distances = []
    for kind in ("none", adapt):
        callback = ada_gauss(adapt=kind, anti_collapse=0, adapter_epochs=300, samples=300)
        _, module = fit_images([callback], max_epochs=6)
        now = _gaussians_by_hand(module.net)
        distances.append((callback.gaussians.means - now.means)[:4].square().mean())
    assert distances[1] < 0.6 * distances[0]


def test_a_diverged_training_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"AdaGauss needs finite features, and those of task 0 .*diverged"):
        fit_images([ada_gauss()], lambda: Narrow(lr=1e30))


def test_samples_are_drawn_alike_whatever_else_is_drawn():
    ends = []
    for seed in (1, 2):
        callback = ada_gauss()
        torch.manual_seed(seed)
        _, module = fit_images([callback, _Draws(seed)])
        ends.append((dict(module.state_dict()), callback.state_dict()))
    assert same(*ends)


class _Draws(ContinualCallback):
    """Draws at the end of tasks."""

    def __init__(self, count):
        self.count = count

    def on_task_end(self, trainer, pl_module, task):
        torch.rand(self.count)


def test_the_ends_of_tasks_draw_no_random_numbers():
    states = []
    for callbacks in ([], [ada_gauss()]):
        fit_images(callbacks)
        states.append(torch.get_rng_state())
    assert same(*states)


def test_memory_per_class_is_a_mean_and_a_triangle():
    callback = ada_gauss()
    assert callback.memory_per_class == 0
    fit_images([callback])
    assert callback.memory_per_class == WIDTH + WIDTH * (WIDTH + 1) // 2
    saved = callback.state_dict()["gaussians"]
    numbers = saved["means"].numel() + saved["scatter"].numel()
    assert numbers == 6 * callback.memory_per_class


# ------------------------------------------------------------------ predictions


def _fitted(tmp_path, **options):
    callback, saved = ada_gauss(**options), ModelCheckpoint(tmp_path, save_last=True)
    trainer, module = fit_images([callback, saved], enable_checkpointing=True)
    return callback, trainer, module, tmp_path / "last.ckpt"


def _predictions(trainer, module, **settings):
    return torch.cat(trainer.predict(module, datamodule=ClassIncremental(Images(), num_tasks=3), **settings))


@pytest.mark.parametrize("classifier", ["bayes", "nearest_mean", "linear"])
def test_a_checkpoint_predicts_what_the_fit_did(classifier, tmp_path):
    _, trainer, module, path = _fitted(tmp_path, classifier=classifier)
    expected = _predictions(trainer, module)
    fresh = quiet_trainer(callbacks=[ada_gauss(classifier=classifier)])
    assert same(_predictions(fresh, Narrow(), ckpt_path=path), expected)


def test_a_test_with_a_checkpoint_gives_the_accuracy_of_the_fit(tmp_path):
    _, trainer, module, path = _fitted(tmp_path)
    expected = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    fresh, sequence = quiet_trainer(callbacks=[ada_gauss()]), ClassIncremental(Images(), num_tasks=3)
    assert fresh.test(Narrow(), datamodule=sequence, ckpt_path=path, verbose=False) == expected


def test_what_is_loaded_without_a_trainer_predicts_what_the_fit_did(tmp_path):
    _, trainer, module, path = _fitted(tmp_path)
    expected = _predictions(trainer, module)
    images = torch.cat([images for images, _ in trainer.datamodule.predict_dataloader()])
    loaded = lightning_cl.load(path, Narrow)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), expected)


def test_a_head_of_each_epoch_answers_for_the_classes_that_are_trained():
    class Looks(ContinualCallback):
        def on_validation_epoch_end(self, trainer, pl_module):
            known.append(callback.classifier.known.nonzero().flatten().tolist())

    callback, known = ada_gauss(refresh="epoch"), []
    fit_images([callback, Looks()], max_epochs=2, limit_val_batches=1.0)
    assert known == [[0, 1]] * 2 + [[0, 1, 2, 3]] * 2 + [list(range(6))] * 2


def test_heads_of_each_epoch_leave_no_trace_in_the_end():
    ends = []
    for refresh in ("task", "epoch"):
        callback = ada_gauss(refresh=refresh)
        _, module = fit_images([callback], max_epochs=2)
        ends.append(end_of(callback, module))
    assert same(*ends)


def test_a_stream_of_one_task_has_a_head_of_all_classes():
    callback = ada_gauss()
    _, module = fit_images([callback], sequence=Joint(Images()))
    assert callback.gaussians.known.all()
    _close(callback.gaussians, _gaussians_by_hand(module.net), list(range(6)))


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"max_epochs": -1, "max_steps": 4},
    ],
    ids=str,
)
def test_it_runs_with_the_trainers_settings(settings):
    callback = ada_gauss()
    fit_images([callback], **settings)
    assert callback.gaussians.means.isfinite().all()
    assert callback.gaussians.scatter.isfinite().all()


def test_a_dry_run_trains_each_adapter_for_one_epoch():
    callback = ada_gauss(adapter_epochs=10**9, samples=10**9)
    fit_images([callback], fast_dev_run=True)
    assert callback.gaussians.known.all()


# ------------------------------------------------------------------ kinds of modules and streams


class Convolutional(Narrow):
    """Its classification layer is a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, 6, 1))

    def forward(self, images):
        return self.net(images).mean((2, 3))


class TwoOptimizers(Narrow):
    """Optimises by hand, backbone and head apart."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) + added_loss(self, batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.net[:-1], self.net[-1])]


class WithoutOptimizer(Narrow):
    """Is not trained at all."""

    def configure_optimizers(self):
        return None


class Dead(Narrow):
    """Has a feature that is always zero."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 6))
        with torch.no_grad():
            self.net[1].bias[0] = -100


@pytest.mark.parametrize("module", [Convolutional, TwoOptimizers, WithoutOptimizer, Dead])
def test_it_has_gaussians_of_every_class_for_every_kind_of_module(module, tmp_path):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit_images([ada_gauss(), saved], module, enable_checkpointing=True)
    callback = ada_gauss()
    fit_images([callback], module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.gaussians.known.all()
    assert callback.gaussians.scatter.isfinite().all()


def test_a_class_that_comes_again_is_merged_into_its_gaussian():
    callback = ada_gauss()
    fit_images([callback], sequence=DomainIncremental(Images(), transforms=[None, Permute(1)]))
    assert callback.gaussians.counts.tolist() == [2 * 48.0] * 6
