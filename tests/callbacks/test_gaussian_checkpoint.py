"""Gaussian heads in checkpoints: evaluated later, resumed to the bit, undone with a refused task, and exported."""

import copy
import io
from functools import partial

import pytest
import torch
from gaussian_streams import FrozenNet, fit_gaussian
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nearest_means import TEST_IMAGES, DigitsToPredict, NoisyNet, PredictingNet, predictions
from numbered_streams import Judge, SaveAfterSteps, same, same_weights
from vanishing_data import Vanishing, run_copied

import lightning_cl
from lightning_cl.callbacks import GaussianClassifier, Replay
from lightning_cl.datamodules import ClassIncremental, DomainIncremental
from lightning_cl.tasks import ContinualCallback
from tests.modules import quiet_trainer

OPTIONS = {
    "shared": {},
    "full": {"covariance": "full", "shrinkage": 1.0, "correlation": True, "normalize": True},
    "diagonal": {"covariance": "diagonal", "prior": "counts", "log_determinant": False},
    "nearest mean": {"classifier": "nearest_mean", "normalize": True},
    "linear": {"classifier": "linear", "samples_per_class": 20},
    "after epochs": {"refresh": "epoch"},
    "linear, after epochs": {"refresh": "epoch", "classifier": "linear", "samples_per_class": 20},
}


def _made(name):
    return GaussianClassifier(**OPTIONS[name])


SLOW = ("diagonal", "nearest mean", "linear, after epochs")
PARAMS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OPTIONS]


@pytest.fixture(scope="module", params=PARAMS)
def through(request, tmp_path_factory):
    """A fit of two epochs of three steps a task: the end of it, its checkpoints, and the scores it predicts."""
    folder = tmp_path_factory.mktemp("fit")
    saves = SaveAfterSteps(folder, [1, 8, 9, 12, 15, 17])
    settings = {"max_epochs": 2, "limit_val_batches": 1.0}
    gaussian, trainer, module = fit_gaussian(_made(request.param), NoisyNet, [saves], **settings)
    end = gaussian.state_dict(), dict(module.state_dict()), float(trainer.callback_metrics["val_acc"])
    trainer.save_checkpoint(folder / "end.ckpt")
    return partial(_made, request.param), folder, copy.deepcopy(end), predictions(trainer, module)


def _predict(gaussian, path, module=NoisyNet):
    sequence = ClassIncremental(DigitsToPredict(), num_tasks=3)
    return torch.cat(quiet_trainer(callbacks=[gaussian]).predict(module(), datamodule=sequence, ckpt_path=path))


# ------------------------------------------------------------------ resumed and evaluated later


@pytest.mark.parametrize("step", [8, 9, 12, 15], ids=["in an epoch", "end of an epoch", "end of a task", "in a task"])
def test_a_resumed_run_ends_with_the_same_head(step, through):
    make, folder, end, _ = through
    settings = {"max_epochs": 2, "limit_val_batches": 1.0, "ckpt_path": folder / f"{step}.ckpt"}
    gaussian, trainer, module = fit_gaussian(make(), NoisyNet, **settings)
    assert same((gaussian.state_dict(), dict(module.state_dict()), float(trainer.callback_metrics["val_acc"])), end)


def test_predicting_with_a_checkpoint_gives_the_scores_of_the_fit(through):
    make, folder, _, scores = through
    assert torch.equal(_predict(make(), folder / "end.ckpt"), scores)


def test_a_loaded_module_gives_the_scores_of_the_fit(through):
    _, folder, _, scores = through
    module = lightning_cl.load(folder / "end.ckpt", NoisyNet)
    with torch.no_grad():
        torch.testing.assert_close(module(TEST_IMAGES), scores)
    assert not any(part._forward_hooks for part in module.modules())


def test_a_checkpoint_of_an_epochs_end_has_the_head_that_answered(through):
    make, folder, _, _ = through
    gaussian = make()
    known = _predict(gaussian, folder / "9.ckpt").isfinite()
    assert known.all(0).tolist() == [True] * (4 if gaussian.refresh == "epoch" else 2) + [False] * (
        2 if gaussian.refresh == "epoch" else 4
    )


def test_before_the_first_head_the_layer_answers(through):
    make, folder, _, _ = through
    with pytest.warns(UserWarning, match="GaussianClassifier has no head yet"):
        assert _predict(make(), folder / "1.ckpt").isfinite().all()


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    assert value is None or isinstance(value, (bool, int, float, str))
    return []


@pytest.mark.parametrize("file", ["1.ckpt", "17.ckpt", "end.ckpt"])
def test_the_state_is_plain(file, through):
    state = torch.load(through[1] / file, weights_only=True)["callbacks"]["GaussianClassifier"]
    for tensor in _tensors(state):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.device.type == "cpu"


def test_a_checkpoint_holds_no_more_numbers_of_a_class_than_it_says():
    gaussian, _, _ = fit_gaussian(GaussianClassifier(covariance="full"))
    held = sum(tensor.numel() for tensor in _tensors(gaussian.state_dict()))
    assert gaussian.memory_per_class == 10 + 55
    assert held == 6 * (gaussian.memory_per_class + 2)  # its number, and how many samples


def test_a_saved_state_is_not_moved_by_the_run_that_goes_on():
    states = []

    class Keeps(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states.append((gaussian.state_dict(), copy.deepcopy(gaussian.state_dict())))

    gaussian = GaussianClassifier(refresh="epoch")
    fit_gaussian(gaussian, others=[Keeps()], max_epochs=2)
    assert all(same(*pair) for pair in states)


def test_a_resumed_run_knows_the_gaussians_of_past_domains(tmp_path):
    ends = []
    for others, ckpt_path in (([SaveAfterSteps(tmp_path, [12])], None), ([], tmp_path / "12.ckpt")):
        sequence = DomainIncremental(DigitsToPredict(), [None, torch.Tensor.neg])  # tasks of nine steps
        ends.append(fit_gaussian(sequence=sequence, others=others, ckpt_path=ckpt_path)[0].state_dict())
    assert same(*ends)


def test_a_run_without_past_data_is_resumed_with_the_same_head(tmp_path):
    heads, resume = [], None
    for name in ("through", "resumed"):
        gaussian, data = GaussianClassifier(), Vanishing()
        data.first = 1 if resume else 0
        run_copied(tmp_path / name, Replay(20, storage="copy"), data, resume=resume, others=[gaussian], every=1)
        heads.append(gaussian.state_dict())
        resume = tmp_path / name / "step=5.ckpt"
    assert same(*heads)


# ------------------------------------------------------------------ other options than the run's


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"covariance": "full"}, "`covariance='shared'`, this GaussianClassifier has `covariance='full'`"),
        ({"normalize": True}, "`normalize=False`, this GaussianClassifier has `normalize=True`"),
        ({"classifier": "linear"}, "`classifier='bayes'`, this GaussianClassifier has `classifier='linear'`"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["fit", "test"])
def test_a_checkpoint_with_gaussians_of_another_kind_is_refused(call, other, message, tmp_path):
    fit_gaussian(others=[SaveAfterSteps(tmp_path, [4])])
    trainer, sequence = quiet_trainer(callbacks=[GaussianClassifier(**other)]), DigitsToPredict()
    with pytest.raises(MisconfigurationException, match=f"The checkpoint's Gaussians were taken with {message}"):
        getattr(trainer, call)(
            FrozenNet(), datamodule=ClassIncremental(sequence, num_tasks=3), ckpt_path=tmp_path / "4.ckpt"
        )


def test_a_checkpoint_may_be_evaluated_with_another_shrinkage_and_temperature(tmp_path):
    _, trainer, module = fit_gaussian(GaussianClassifier(shrinkage=3.0, temperature=2.0), NoisyNet)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    _, other, _ = fit_gaussian(GaussianClassifier(), NoisyNet)
    other.save_checkpoint(tmp_path / "shrunk.ckpt")
    scores = _predict(GaussianClassifier(shrinkage=3.0, temperature=2.0), tmp_path / "shrunk.ckpt")
    assert torch.equal(scores, predictions(trainer, module))


def test_a_run_with_a_head_can_be_resumed_without_one(tmp_path):
    _, _, through = fit_gaussian(others=[SaveAfterSteps(tmp_path, [4])])
    trainer = quiet_trainer(callbacks=[], max_epochs=1, limit_val_batches=0)
    resumed = FrozenNet()
    sequence = ClassIncremental(DigitsToPredict(), num_tasks=3)
    trainer.fit(resumed, datamodule=sequence, ckpt_path=tmp_path / "4.ckpt")
    assert same_weights(resumed, through)


# ------------------------------------------------------------------ a task is a transaction


@pytest.mark.parametrize("name", PARAMS)
def test_a_refused_task_leaves_everything_as_it_was(name):
    start = {}

    class Looks(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            start[task.index] = copy.deepcopy(gaussian.state_dict())

        def on_task_rejected(self, trainer, pl_module, task):
            assert same(gaussian.state_dict(), start[task.index])
            module.eval()
            with torch.no_grad():
                assert module(TEST_IMAGES)[:, 2:].eq(-float("inf")).all()
            module.train()

    gaussian, module = _made(name), PredictingNet()
    fit_gaussian(gaussian, module, [Judge(task=1), Looks()])
    assert same(start[1], start[2])
    assert gaussian.gaussians.known.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("name", ["shared", "after epochs", "linear"])
def test_a_task_that_is_repeated_ends_with_the_head_of_one_training(name):
    ends = [fit_gaussian(_made(name), NoisyNet, [Judge(1, attempts)])[0].state_dict() for attempts in ([], [1, 0])]
    assert same(*ends)


def test_a_first_task_that_is_refused_leaves_no_head():
    gaussian, _, _ = fit_gaussian(others=[Judge(task=0)], stream={"num_tasks": 2, "epochs_per_task": 1})
    assert gaussian.gaussians.known.tolist() == [False] * 3 + [True] * 3


# ------------------------------------------------------------------ nothing is left


def _hooks(module):
    return {name: len(layer._forward_hooks) for name, layer in module.named_modules() if layer._forward_hooks}


def test_nothing_is_left_after_any_trainer_call():
    _, trainer, module = fit_gaussian()
    sequence, callbacks = trainer.datamodule, list(trainer.callbacks)
    assert _hooks(module) == {}
    for call in (trainer.validate, trainer.test, trainer.predict):
        call(module, datamodule=sequence, **({} if call == trainer.predict else {"verbose": False}))
        assert _hooks(module) == {}
    assert trainer.callbacks == callbacks


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end", "on_validation_end", "on_task_end"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(hook, error):
    class Breaks(ContinualCallback):
        pass

    def break_down(trainer, *args):
        if hook == "on_train_start" or trainer.datamodule.current_task.index == 1:
            raise error("broken")

    breaks, module = Breaks(), FrozenNet()
    setattr(breaks, hook, break_down)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit_gaussian(GaussianClassifier(refresh="epoch"), module, [breaks], limit_val_batches=1.0)
    assert _hooks(module) == {}


def test_a_second_fit_begins_without_gaussians():
    gaussian, trainer, module = fit_gaussian()
    before = gaussian.gaussians.counts.tolist()
    trainer.fit(module, datamodule=ClassIncremental(DigitsToPredict(), num_tasks=3))
    assert gaussian.gaussians.counts.tolist() == before


# ------------------------------------------------------------------ export


@pytest.fixture(
    scope="module",
    params=["shared", "full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("diagonal", "linear"))],
)
def exported(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "end.ckpt"
    _, trainer, module = fit_gaussian(_made(request.param))
    trainer.save_checkpoint(path)
    return path, predictions(trainer, module)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_scripted_network_gives_the_same_scores(how, exported):
    network, file = lightning_cl.load(exported[0], FrozenNet).net, io.BytesIO()
    with torch.no_grad():
        script = torch.jit.script(network) if how == "script" else torch.jit.trace(network, TEST_IMAGES)
        torch.jit.save(script, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(TEST_IMAGES[:7]), exported[1][:7])


def test_a_network_is_exported_with_torch_export(exported):
    network = lightning_cl.load(exported[0], FrozenNet).net
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (TEST_IMAGES,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(TEST_IMAGES[:7]), exported[1][:7])


def test_an_onnx_file_gives_the_same_scores(exported, tmp_path):
    pytest.importorskip("onnxscript")  # what PyTorch exports with
    reference = pytest.importorskip("onnx.reference")
    module = lightning_cl.load(exported[0], FrozenNet)
    module.to_onnx(tmp_path / "module.onnx", TEST_IMAGES, input_names=["images"])
    session = reference.ReferenceEvaluator(str(tmp_path / "module.onnx"))
    (scores,) = session.run(None, {"images": TEST_IMAGES.numpy()})
    # whitening multiplies the last digits of features, which another program rounds in its own way
    torch.testing.assert_close(torch.as_tensor(scores), exported[1], rtol=1e-4, atol=1e-3)
