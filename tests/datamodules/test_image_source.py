import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_cl.datamodules.digits import Digits


class _Recorder(BoringModel):
    """Keeps what each stage got from the DataModule."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.layer(batch[0].flatten(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)


def _trainer(**kwargs):
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, max_epochs=1, **settings, **kwargs)


def _inputs(batches):
    return torch.cat([batch[0] for batch in batches])


def _plain_val_inputs(source):
    images = torch.cat([images for images, _ in source.val_dataloader()]).float() / 255
    return (images - source.mean[0]) / source.std[0]


def test_batches_are_normalised_floats_on_arrival():
    digits = Digits()
    digits.setup("fit")
    images, labels = next(iter(digits.train_dataloader()))
    inputs, same_labels = digits.on_after_batch_transfer((images, labels), 0)
    expected = (images.double() / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(inputs, expected.float(), atol=1e-6, rtol=1e-5)
    assert same_labels is labels
    assert images.dtype == torch.uint8


def test_inputs_that_are_floats_already_pass_through():
    floats = torch.rand(4, 1, 8, 8)
    batch = Digits().on_after_batch_transfer([floats, torch.zeros(4)], 0)
    assert isinstance(batch, list)
    assert batch[0] is floats


@pytest.mark.parametrize("augment", ["flip", "crop", "crop_flip"])
def test_only_training_batches_are_augmented(augment):
    torch.manual_seed(0)
    model, digits = _Recorder(), Digits(augment=augment)
    _trainer(num_sanity_val_steps=2).fit(model, datamodule=digits)
    expected = _plain_val_inputs(digits)
    # The sanity check sees the first batch or batches, then validation sees all of them.
    val = _inputs(model.seen["val"])
    torch.testing.assert_close(val[-len(expected) :], expected)
    torch.testing.assert_close(val[: -len(expected)], expected[: len(val) - len(expected)])
    plain = {row.numpy().round(3).tobytes() for row in digits.on_after_batch_transfer(_all_training_images(digits), 0)}
    train = [row.numpy().round(3).tobytes() for row in _inputs(model.seen["train"])]
    assert sum(row not in plain for row in train) > len(train) / 3


def test_without_augmentation_training_sees_the_images_as_they_are():
    model, digits = _Recorder(), Digits()
    _trainer().fit(model, datamodule=digits)
    plain = digits.on_after_batch_transfer(_all_training_images(digits), 0)
    torch.testing.assert_close(
        _inputs(model.seen["train"]).flatten(1).sum(0), plain.flatten(1).sum(0), rtol=1e-4, atol=1e-2
    )


def _all_training_images(digits):
    subset = digits.train_dataloader().dataset
    return subset.__getitems__(range(len(subset)))[0]


def test_validation_is_disjoint_from_training_and_has_every_class_alike():
    digits = Digits(val_fraction=0.1)
    digits.setup("fit")
    train, val = digits.train_dataloader().dataset, digits.val_dataloader().dataset
    assert not set(train.indices) & set(val.indices)
    assert len(train) + len(val) == 1438
    shares = val.dataset.targets[val.indices].bincount() / val.dataset.targets.bincount()
    assert shares.min() > 0.09
    assert shares.max() < 0.11


def test_the_seed_decides_the_split():
    def indices(seed):
        digits = Digits(seed=seed)
        digits.setup("fit")
        return digits.val_dataloader().dataset.indices

    assert indices(5) == indices(5)
    assert indices(5) != indices(6)


def test_a_val_fraction_of_zero_trains_on_everything_without_validation():
    model, digits = _Recorder(), Digits(val_fraction=0.0)
    _trainer().fit(model, datamodule=digits)
    assert len(_inputs(model.seen["train"])) == 1438
    assert model.seen["val"] == []


def test_setup_for_a_second_run_keeps_the_arrays():
    digits = Digits()
    digits.setup("fit")
    before = digits.train_dataloader().dataset
    digits.setup("fit")
    assert digits.train_dataloader().dataset is before


def test_on_device_moves_the_arrays_to_the_trainers_device_and_trains():
    model, digits = _Recorder(), Digits(on_device=True)
    trainer = _trainer()
    trainer.fit(model, datamodule=digits)
    trainer.test(model, datamodule=digits, verbose=False)
    assert model.seen["train"][0][0].device == trainer.strategy.root_device
    assert len(_inputs(model.seen["test"])) == 359


def test_true_half_precision_gets_half_inputs():
    model, digits = _Recorder(), Digits()
    _trainer(precision="bf16-true", limit_train_batches=1).fit(model, datamodule=digits)
    assert model.seen["train"][0][0].dtype == torch.bfloat16


def test_loader_workers_give_the_same_validation_batches():
    plain, workers = Digits(), Digits(num_workers=2)
    for digits in (plain, workers):
        digits.setup("fit")
    for (images, labels), (worker_images, worker_labels) in zip(
        plain.val_dataloader(), workers.val_dataloader(), strict=True
    ):
        assert images.equal(worker_images)
        assert labels.equal(worker_labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "`eval_batch_size` must be at least 1, got -1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"val_fraction": 1.0}, "`val_fraction` must be at least 0 and below 1, got 1.0"),
        ({"augment": "rotate"}, "`augment` must be 'none', 'flip', 'crop' or 'crop_flip', got 'rotate'"),
        ({"on_device": True, "num_workers": 2}, "`on_device=True` needs `num_workers=0`, got 2"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_a_loader_before_setup_says_what_to_call():
    with pytest.raises(Exception, match=r'Call `setup\("fit"\)` on Digits'):
        Digits().val_dataloader()
