"""A module out of a checkpoint predicts as its run did, without a Trainer."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import lightning_cl
from lightning_cl.callbacks import NearestMeanClassifier, Replay
from lightning_cl.datamodules import ClassIncremental
from tests.modules import DigitsData, HuggingFaceLike, Plain, TokenDigits, digits, quiet_trainer

IMAGES, LABELS = digits(34, 10)
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore::DeprecationWarning")


class DigitsToPredict(DigitsData):
    def predict_dataloader(self):
        return self.loader("test")


class Predicts(Plain):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Sized(Predicts):
    """Needs to be told its width, and does not save it."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 6))


class Saves(Sized):
    """Saves its width."""

    def __init__(self, width):
        super().__init__(width)
        self.save_hyperparameters()


class WeightNormed(Predicts):
    def __init__(self):
        super().__init__()
        self.net[4] = weight_norm(self.net[4])


class Convolutional(Predicts):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))

    def forward(self, images):
        return self.net(images.view(-1, 1, 8, 8)).mean((2, 3))


def _fit(folder, module=Predicts, callbacks=None, data=DigitsToPredict, **settings):
    """Return the checkpoint of a fit, and its Trainer and module."""
    seed_everything(1, verbose=False)
    callbacks = [Replay(20), NearestMeanClassifier()] if callbacks is None else callbacks
    trainer, module = quiet_trainer(callbacks=callbacks, max_epochs=1, **settings), module()
    trainer.fit(module, datamodule=ClassIncremental(data(), num_tasks=3))
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt", trainer, module


def _scores(trainer, module):
    return torch.cat(trainer.predict(module, datamodule=trainer.datamodule))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    path, trainer, module = _fit(tmp_path_factory.mktemp("fit"))
    return path, _scores(trainer, module)


@pytest.mark.parametrize("module", [Predicts, WeightNormed, Convolutional])
def test_a_loaded_module_predicts_what_its_run_did(module, tmp_path):
    path, trainer, trained = _fit(tmp_path, module)
    with torch.no_grad():
        scores = lightning_cl.load(path, module)(IMAGES)
    torch.testing.assert_close(scores, _scores(trainer, trained))
    assert scores[:, :6].isfinite().all()


def test_a_loaded_module_never_predicts_classes_that_were_not_seen(tmp_path):
    class StopsEarly(Predicts):
        def on_train_epoch_end(self):
            if self.trainer.datamodule.current_task.index == 1:
                self.trainer.should_stop = True

    path, _, _ = _fit(tmp_path, StopsEarly)
    with torch.no_grad():
        scores = lightning_cl.load(path, StopsEarly)(IMAGES)
    assert scores[:, 4:].eq(-float("inf")).all()
    assert scores[:, :4].isfinite().all()


@pytest.mark.parametrize("arguments", [{"temperature": 0.5}, {"normalize": False}, {"prototypes": "all"}], ids=str)
def test_a_loaded_head_has_the_options_of_its_run(arguments, tmp_path):
    path, trainer, trained = _fit(tmp_path, callbacks=[Replay(20), NearestMeanClassifier(**arguments)])
    with torch.no_grad():
        torch.testing.assert_close(lightning_cl.load(path, Predicts)(IMAGES), _scores(trainer, trained))


def test_a_loaded_module_is_in_eval_mode_and_answers_alike_in_training_mode(fitted):
    module = lightning_cl.load(fitted[0], Predicts)
    assert not any(part.training for part in module.modules())
    with torch.no_grad():
        assert torch.equal(module(IMAGES), module.train()(IMAGES))


def test_a_loaded_module_has_no_hooks(fitted):
    assert not any(part._forward_hooks for part in lightning_cl.load(fitted[0], Predicts).modules())


def test_a_loaded_module_predicts_under_a_trainer(fitted):
    module = lightning_cl.load(fitted[0], Predicts)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=16)
    assert torch.equal(torch.cat(quiet_trainer().predict(module, loader)), fitted[1])


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_loaded_module_can_be_cast(cast, fitted):
    module = getattr(lightning_cl.load(fitted[0], Predicts), cast)()
    with torch.no_grad():
        predicted = module(getattr(IMAGES, cast)()).argmax(1)
    assert (predicted == fitted[1].argmax(1)).float().mean() > 0.9


def test_a_path_may_be_a_string(fitted):
    with torch.no_grad():
        torch.testing.assert_close(lightning_cl.load(str(fitted[0]), Predicts)(IMAGES), fitted[1])


def test_the_state_of_a_loaded_module_brings_the_head_into_another(fitted):
    module = lightning_cl.load(fitted[0], Predicts)
    again = lightning_cl.load(fitted[0], Predicts)
    again.net[4].prototypes.zero_()
    again.load_state_dict(module.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), module(IMAGES))


def test_a_module_that_is_called_by_keyword_is_loaded_with_its_head(tmp_path):
    path, _, trained = _fit(tmp_path, HuggingFaceLike, data=TokenDigits)
    state = torch.load(path, weights_only=True)["callbacks"]["NearestMeanClassifier"]
    with torch.no_grad():
        logits = lightning_cl.load(path, HuggingFaceLike)(pixel_values=IMAGES).logits
        features = F.normalize(torch.relu(trained.encoder(IMAGES)), dim=1)
    assert torch.equal(logits.argmax(1), (features @ state["classifier"]["prototypes"].t()).argmax(1))


# ------------------------------------------------------------------ checkpoints without a head


@pytest.mark.parametrize("callbacks", [list, lambda: [Replay(20)]], ids=["no callbacks", "replay"])
def test_without_a_head_a_module_is_loaded_as_it_is(callbacks, tmp_path):
    path, _, trained = _fit(tmp_path, callbacks=callbacks())
    loaded = lightning_cl.load(path, Predicts)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), trained.eval()(IMAGES))


def test_before_the_first_means_a_module_is_loaded_with_its_own_layer(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    _fit(tmp_path, callbacks=[NearestMeanClassifier(), Saves()])
    own = Predicts.load_from_checkpoint(tmp_path / "first.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(lightning_cl.load(tmp_path / "first.ckpt", Predicts)(IMAGES), own(IMAGES))


def test_a_checkpoint_of_weights_alone_is_loaded(tmp_path):
    _, trainer, trained = _fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(lightning_cl.load(tmp_path / "weights.ckpt", Predicts)(IMAGES), trained.eval()(IMAGES))


def test_a_fit_without_tasks_is_loaded(tmp_path):
    trainer, module = quiet_trainer(max_epochs=1), Predicts()
    trainer.fit(module, datamodule=DigitsToPredict())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with torch.no_grad():
        assert torch.equal(lightning_cl.load(tmp_path / "end.ckpt", Predicts)(IMAGES), module.eval()(IMAGES))


# ------------------------------------------------------------------ modules with arguments


def test_arguments_of_the_constructor_are_handed_on(tmp_path):
    path, trainer, trained = _fit(tmp_path, lambda: Sized(12))
    with torch.no_grad():
        torch.testing.assert_close(lightning_cl.load(path, Sized, width=12)(IMAGES), _scores(trainer, trained))


def test_saved_arguments_of_the_constructor_are_known(tmp_path):
    path, trainer, trained = _fit(tmp_path, lambda: Saves(12))
    with torch.no_grad():
        torch.testing.assert_close(lightning_cl.load(path, Saves)(IMAGES), _scores(trainer, trained))


class Style:
    """Not a thing that loads without running code."""


class SavesObjects(Predicts):
    def __init__(self, style=None):
        super().__init__()
        self.save_hyperparameters()


def test_a_checkpoint_with_objects_is_loaded_where_the_user_trusts_it(tmp_path):
    path, trainer, trained = _fit(tmp_path, lambda: SavesObjects(Style()))
    loaded = lightning_cl.load(path, SavesObjects, weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), _scores(trainer, trained))


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        lightning_cl.load(tmp_path / "nothing.ckpt", Predicts)


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("how", ["script", "trace"])
def test_an_exported_module_gives_the_same_scores(how, fitted):
    module, file = lightning_cl.load(fitted[0], Predicts), io.BytesIO()
    with torch.no_grad():
        exported = module.to_torchscript(method=how, example_inputs=IMAGES)
        torch.jit.save(exported, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(IMAGES[:7]), fitted[1][:7])


@pytest.mark.parametrize("how", ["script", "trace"])
def test_the_network_in_a_module_is_exported_with_its_head(how, fitted):
    network = lightning_cl.load(fitted[0], Predicts).net
    with torch.no_grad():
        exported = torch.jit.script(network) if how == "script" else torch.jit.trace(network, IMAGES)
        torch.testing.assert_close(exported(IMAGES[:7]), fitted[1][:7])


def test_a_module_is_exported_with_torch_export(fitted):
    network = lightning_cl.load(fitted[0], Predicts).net
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (IMAGES,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(IMAGES[:7]), fitted[1][:7])


def test_an_onnx_file_gives_the_same_scores(fitted, tmp_path):
    pytest.importorskip("onnxscript")  # what PyTorch exports with
    reference = pytest.importorskip("onnx.reference")
    lightning_cl.load(fitted[0], Predicts).to_onnx(tmp_path / "module.onnx", IMAGES, input_names=["images"])
    session = reference.ReferenceEvaluator(str(tmp_path / "module.onnx"))
    (scores,) = session.run(None, {"images": IMAGES.numpy()})
    torch.testing.assert_close(torch.as_tensor(scores), fitted[1])


# ------------------------------------------------------------------ importing


def _imported(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_importing_the_package_does_not_import_lightning():
    modules = _imported("import lightning_cl; lightning_cl.__version__")
    assert "lightning_cl" in modules
    assert not any(name.partition(".")[0] in ("lightning", "pytorch_lightning", "torch") for name in modules)


def test_importing_the_heads_does_not_import_lightning():
    modules = _imported("import lightning_cl.heads")
    assert "torch" in modules
    assert not any(name.partition(".")[0] in ("lightning", "pytorch_lightning") for name in modules)


def test_load_is_found_at_its_first_use():
    assert lightning_cl.load.__module__ == "lightning_cl.loading"


def test_a_name_that_the_package_does_not_have_is_an_error():
    with pytest.raises(AttributeError, match=r"module 'lightning_cl' has no attribute 'lode'"):
        _ = lightning_cl.lode


def test_loading_does_not_warn(fitted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(lightning_cl.load(fitted[0], Predicts), LightningModule)


class NamedTwice(Predicts):
    """Knows its classification layer by two names, and calls it by the second."""

    def __init__(self):
        super().__init__()
        body, self.fc = self.net[:-1], self.net[-1]
        self.net = nn.Sequential(body, self.fc)


def test_a_layer_with_two_names_is_replaced_under_both(tmp_path):
    path, trainer, module = _fit(tmp_path, NamedTwice)
    loaded = lightning_cl.load(path, NamedTwice)
    (nearest,) = [callback for callback in trainer.callbacks if isinstance(callback, NearestMeanClassifier)]
    nearest.attach(module)
    assert torch.equal(loaded(IMAGES), module.eval()(IMAGES))
    assert loaded.fc is loaded.net[1]


def test_a_checkpoint_of_weights_alone_says_that_the_layer_answers(tmp_path):
    trainer = quiet_trainer(callbacks=[Replay(20), NearestMeanClassifier()], max_epochs=1)
    trainer.fit(Predicts(), datamodule=ClassIncremental(DigitsToPredict(), num_tasks=3))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="holds weights only.*classification layer answers"):
        module = lightning_cl.load(tmp_path / "weights.ckpt", Predicts)
    assert isinstance(module.net[4], nn.Linear)
