import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_cl.datamodules.digits import Digits
from lightning_cl.models import ImageClassifier


def _trainer(**kwargs):
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 3, **settings, **kwargs})


def _run_cli(tmp_path, config, *args):
    path = tmp_path / "run.yaml"
    path.write_text(config)
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "fast_dev_run": True}
    return LightningCLI(
        ImageClassifier, Digits, args=["fit", "--config", str(path), *args], trainer_defaults=trainer,
        save_config_callback=None,
    )  # fmt: skip


@pytest.mark.parametrize(("backbone", "least"), [("mlp", 0.9), ("convnet", 0.95)])
def test_it_learns_the_digits(backbone, least):
    torch.manual_seed(0)
    model = ImageClassifier(backbone, input_shape=(1, 8, 8))
    trainer = _trainer()
    trainer.fit(model, datamodule=Digits(batch_size=32))
    assert trainer.test(model, datamodule=Digits(), verbose=False)[0]["test_acc"] > least


def test_it_logs_what_its_docstring_names():
    model = ImageClassifier(input_shape=(1, 8, 8))
    trainer = _trainer(max_epochs=1)
    trainer.fit(model, datamodule=Digits())
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss", "val_acc"}
    trainer.test(model, datamodule=Digits(), verbose=False)
    assert set(trainer.callback_metrics) == {"test_loss", "test_acc"}


def test_validation_accuracy_weighs_samples_not_batches():
    model = ImageClassifier(input_shape=(1, 8, 8))
    results = [
        _trainer().validate(model, datamodule=Digits(eval_batch_size=size), verbose=False)[0] for size in (97, 1000)
    ]
    assert results[0]["val_acc"] == pytest.approx(results[1]["val_acc"])
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"])


def test_predict_gives_the_logits_of_each_batch():
    logits = _trainer().predict(ImageClassifier(input_shape=(1, 8, 8)), datamodule=Digits())
    assert torch.cat(logits).shape == (359, 10)


def test_a_module_of_ones_own_is_the_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model = ImageClassifier(network)
    _trainer(fast_dev_run=True).fit(model, datamodule=Digits())
    assert model.model is network


def test_the_schedule_is_stepped_once_each_epoch():
    model = ImageClassifier(
        input_shape=(1, 8, 8), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    )
    trainer = _trainer(max_epochs=2)
    trainer.fit(model, datamodule=Digits())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)


def test_a_schedule_on_a_plateau_watches_the_validation_loss():
    model = ImageClassifier(input_shape=(1, 8, 8), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    trainer = _trainer(max_epochs=1)
    trainer.fit(model, datamodule=Digits())
    assert trainer.lr_scheduler_configs[0].monitor == "val_loss"


def test_a_checkpoint_loads_with_weights_only_and_without_arguments(tmp_path):
    model = ImageClassifier("convnet", num_classes=10, input_shape=(1, 8, 8))
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trainer = _trainer(max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(model, datamodule=Digits())
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    inputs = torch.randn(2, 1, 8, 8)
    assert loaded.eval()(inputs).equal(model.eval()(inputs))


@pytest.mark.parametrize(
    ("backbone", "shape", "data"),
    [("mlp", (1, 28, 28), (1, 8, 8)), ("convnet", (3, 8, 8), (1, 8, 8))],
)
def test_data_of_another_shape_than_announced_are_an_error(backbone, shape, data):
    model = ImageClassifier(backbone, input_shape=shape)
    with pytest.raises(ValueError, match=r"`input_shape` of ImageClassifier is .* inputs of shape \(1, 8, 8\)"):
        model.validation_step((torch.zeros(2, *data), torch.zeros(2, dtype=torch.long)), 0)


def test_weights_for_a_module_of_ones_own_are_refused():
    with pytest.raises(ValueError, match="`weights` goes with the name of a torchvision model"):
        ImageClassifier(nn.Linear(2, 2), weights="DEFAULT")


def test_it_can_be_sent_to_spawned_processes():
    model = pickle.loads(pickle.dumps(ImageClassifier(input_shape=(1, 8, 8))))
    assert model.configure_optimizers().param_groups[0]["lr"] == 0.05


@pytest.mark.filterwarnings("ignore")
class TestCommandLine:
    def test_the_default_optimizer_is_sgd(self, tmp_path):
        cli = _run_cli(tmp_path, "model: {input_shape: [1, 8, 8]}")
        assert isinstance(cli.model, LightningModule)
        optimizer = cli.trainer.optimizers[0]
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.param_groups[0]["lr"] == 0.05

    def test_optimizer_and_schedule_come_from_yaml(self, tmp_path):
        config = """
        model:
          backbone: convnet
          input_shape: [1, 8, 8]
          optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01, weight_decay: 0.1}}
          lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 5}}
        data: {batch_size: 32, augment: crop}
        """
        cli = _run_cli(tmp_path, config)
        assert isinstance(cli.trainer.optimizers[0], torch.optim.AdamW)
        assert cli.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1
        assert cli.trainer.lr_scheduler_configs[0].scheduler.T_max == 5
        assert cli.datamodule.batch_size == 32

    def test_a_network_comes_from_yaml_by_class_path(self, tmp_path):
        config = """
        model:
          backbone: {class_path: lightning_cl.models.MLP, init_args: {in_features: 64, num_classes: 10, hidden: [16]}}
        """
        cli = _run_cli(tmp_path, config, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1")
        assert cli.model.model.head.in_features == 16
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.1

    def test_one_argument_of_the_default_optimizer_can_be_changed(self, tmp_path):
        cli = _run_cli(tmp_path, "model: {input_shape: [1, 8, 8]}", "--model.optimizer.lr", "0.3")
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.3

    def test_a_checkpoint_of_the_command_line_loads_with_weights_only(self, tmp_path):
        flags = ["--trainer.fast_dev_run=false", "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"]
        cli = _run_cli(tmp_path, "model: {input_shape: [1, 8, 8]}", *flags)
        path = cli.trainer.checkpoint_callback.best_model_path
        torch.load(path, weights_only=True)
        loaded = ImageClassifier.load_from_checkpoint(path, map_location="cpu")
        inputs = torch.randn(2, 1, 8, 8)
        assert loaded(inputs).equal(cli.model(inputs))


def test_a_bottleneck_goes_with_a_backbone_by_name():
    assert ImageClassifier("mlp", 10, (1, 8, 8), bottleneck=4)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="`bottleneck` goes with a backbone by name, got 4 and a module"):
        ImageClassifier(nn.Linear(2, 2), bottleneck=4)
