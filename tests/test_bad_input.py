"""What is wrong is said before training starts: the argument, what was got, what is allowed."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import DigitsData, Plain, TrainingDigits, digits, quiet_trainer
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, Joint, TaskList

SIX = "the 6 classes of the data"


class NeverTrained(Plain):
    """Fails the test if a single batch is trained on: errors come before."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training had begun")


def _refused(error, match, sequence, module=None, **settings):
    with pytest.raises(error, match=match):
        quiet_trainer(**settings).fit(module or NeverTrained(), datamodule=sequence)


# ------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 7}, f"`num_tasks=7` is more than {SIX}"),
        ({"classes_per_task": [3, 4]}, "`classes_per_task` asks for 7 classes, the data has 6"),
        ({"num_tasks": 2, "first_task_classes": 9}, f"`first_task_classes=9` is more than {SIX}"),
        ({"classes_per_task": 1, "first_task_classes": 9}, f"`first_task_classes=9` is more than {SIX}"),
    ],
    ids=["num_tasks", "classes_per_task", "first-and-num", "first-and-size"],
)
def test_more_classes_than_there_are(arguments, message):
    _refused(ValueError, message, ClassIncremental(DigitsData(), **arguments))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_tasks": 4}, "6 of the 6 classes do not divide evenly by `num_tasks=4`"),
        ({"classes_per_task": 4}, "6 of the 6 classes do not divide evenly by `classes_per_task=4`"),
        ({"num_tasks": 3, "first_task_classes": 3}, "3 of the 6 .* by `num_tasks=3` after `first_task_classes=3`"),
        ({"num_tasks": 3, "first_task_classes": 6}, "0 of the 6 .* by `num_tasks=3` after `first_task_classes=6`"),
        ({"num_tasks": 1, "first_task_classes": 3}, "3 of the 6 .* by `num_tasks=1` after `first_task_classes=3`"),
    ],
    ids=str,
)
def test_classes_that_do_not_divide(arguments, named):
    message = named + r"\. Give the sizes as a list, such as `classes_per_task=\[4, 3, 3\]`"
    _refused(ValueError, message, ClassIncremental(DigitsData(), **arguments))


@pytest.mark.parametrize(
    ("order", "detail"),
    [
        ([0, 1, 2, 3, 4], r"missing \[5\], unknown \[\]"),
        ([0, 1, 2, 3, 4, 9], r"missing \[5\], unknown \[9\]"),
        ([0, 1, 2, 3, 4, 5, 5], "some twice"),
        ([], r"missing \[0, 1, 2, 3, 4, 5\]"),
    ],
    ids=["missing", "unknown", "twice", "empty"],
)
def test_a_class_order_that_is_no_permutation(order, detail):
    sequence = ClassIncremental(DigitsData(), num_tasks=2, class_order=order)
    _refused(ValueError, f"`class_order` must be a permutation of {SIX}: {detail}", sequence)


def test_neither_or_both_of_two_ways_to_count():
    with pytest.raises(ValueError, match="Give one of `num_tasks` and `classes_per_task`, got None and None"):
        ClassIncremental(DigitsData())
    with pytest.raises(ValueError, match="Give one of `num_tasks` and `classes_per_task`, got 2 and 3"):
        ClassIncremental(DigitsData(), num_tasks=2, classes_per_task=3)
    with pytest.raises(
        ValueError, match="`classes_per_task` as a list names the first task too; leave out `first_task"
    ):
        ClassIncremental(DigitsData(), classes_per_task=[2, 4], first_task_classes=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, "`num_tasks` must be at least 1, got 0"),
        ({"num_tasks": -2}, "`num_tasks` must be at least 1, got -2"),
        ({"classes_per_task": 0}, "`classes_per_task` must be at least 1, got 0"),
        ({"classes_per_task": [2, 0]}, r"`classes_per_task` must be at least 1, got \[2, 0\]"),
        ({"classes_per_task": []}, r"`classes_per_task` must be at least 1, got \[\]"),
        ({"num_tasks": 2, "first_task_classes": 0}, "`first_task_classes` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_counts_below_one(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassIncremental(DigitsData(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": "3"}, "`num_tasks` must count in whole numbers, got '3'"),
        ({"num_tasks": 2.5}, "`num_tasks` must count in whole numbers, got 2.5"),
        ({"num_tasks": True}, "`num_tasks` must count in whole numbers, got True"),
        ({"classes_per_task": [2, "4"]}, r"`classes_per_task` must count in whole numbers, got \[2, '4'\]"),
        ({"num_tasks": 2, "class_order": "reverse"}, "`class_order` must be a list of all labels or a seed, got 'rev"),
        ({"num_tasks": 2, "class_order": 0.5}, "`class_order` must be a list of all labels or a seed, got 0.5"),
        ({"num_tasks": 2, "epochs_per_task": "3"}, "`epochs_per_task` must count in whole numbers, got '3'"),
        (
            {"num_tasks": 2, "epochs_per_task": [1, 1.5]},
            r"`epochs_per_task` must count in whole numbers, got \[1, 1.5\]",
        ),
    ],
    ids=str,
)
def test_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        ClassIncremental(DigitsData(), **arguments)


@pytest.mark.parametrize(
    "make", [lambda base: ClassIncremental(base, num_tasks=2), Joint, lambda base: TaskList([base])]
)
@pytest.mark.parametrize("base", [digits(0, 2), TrainingDigits, None], ids=["tensors", "class", "None"])
def test_a_base_that_is_no_data_module(make, base):
    with pytest.raises(TypeError, match=f"made over a LightningDataModule, got {type(base).__name__}"):
        make(base)


def test_labels_that_are_no_labels():
    class Floats(TrainingDigits):
        def dataset(self, first, count):
            images, labels = digits(first, count)
            return TensorDataset(images, labels / 2)

    _refused(
        ValueError,
        "no class labels: expected one integer a sample.*`target_key=...`",
        ClassIncremental(Floats(), num_tasks=2),
    )


@pytest.mark.parametrize("classes", [4, 5])
def test_labels_outside_the_head(classes):
    module = NeverTrained()
    module.net[-1] = torch.nn.Linear(24, classes)
    message = "[Ll]abels .*up to 5, .*Linear layers.*|`head=.*` has . outputs"
    _refused(
        MisconfigurationException,
        message,
        ClassIncremental(DigitsData(), num_tasks=3),
        module,
        callbacks=[ContinualMetrics()],
    )


# ------------------------------------------------------------------ tasks and their lengths


def test_an_empty_task():
    class Empty(TrainingDigits):
        def loader(self, split, shuffle=False):
            return DataLoader(Subset(self.sets[split], []), batch_size=16)

    _refused(ValueError, r"Task 1 \(1: Empty\) is empty: it has no training sample", TaskList([DigitsData(), Empty()]))


def test_no_task_at_all():
    with pytest.raises(ValueError, match="`datamodules` must have one DataModule for each task, got an empty list"):
        TaskList([])
    with pytest.raises(ValueError, match="`transforms` must have one entry for each task, got an empty list"):
        DomainIncremental(DigitsData(), transforms=[])


def test_names_and_transforms_that_do_not_fit():
    with pytest.raises(ValueError, match="`names` has 2 entries for 1 `datamodules`"):
        TaskList([DigitsData()], names=["a", "b"])
    with pytest.raises(TypeError, match="`transforms` must be callables or None, got 90"):
        DomainIncremental(DigitsData(), transforms=[None, 90])


@pytest.mark.parametrize("epochs", [0, [1, 0, 1], -1])
def test_a_task_without_an_epoch(epochs):
    with pytest.raises(ValueError, match="`epochs_per_task` must be at least 1, got"):
        ClassIncremental(DigitsData(), num_tasks=3, epochs_per_task=epochs)


def test_epochs_for_another_number_of_tasks():
    _refused(
        ValueError,
        "`epochs_per_task` has 2 entries for 3 tasks",
        ClassIncremental(DigitsData(), num_tasks=3, epochs_per_task=[1, 2]),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_tasks": "past"}, "`eval_tasks` must be one of 'seen', 'current', 'all', got 'past'"),
        ({"eval_loaders": "many"}, "`eval_loaders` must be one of 'joined', 'per_task', got 'many'"),
        ({"val_fraction": 0.0}, "`val_fraction` must be between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "`val_fraction` must be between 0 and 1, got 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_choice_that_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        Joint(DigitsData(), **arguments) if "val_fraction" in arguments else TaskList([DigitsData()], **arguments)


# ------------------------------------------------------------------ bases


@pytest.mark.parametrize(
    "make", [lambda base: ClassIncremental(base, num_tasks=2), Joint, lambda base: TaskList([base])]
)
def test_a_base_without_a_train_loader(make):
    class OnlyVal(LightningDataModule):
        def val_dataloader(self):
            return []

    with pytest.raises(MisconfigurationException, match="OnlyVal has no `train_dataloader`"):
        make(OnlyVal())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"`Answering.train_dataloader\(\)` returned no loader|has no training data"),
        ([], r"`Answering.train_dataloader\(\)` returned no loader|has no training data"),
        ({"a": 1}, r"`Answering.train_dataloader\(\)` must return one DataLoader to be cut into tasks, got dict"),
        ([1, 2], r"`Answering.train_dataloader\(\)` must return one DataLoader to be cut into tasks, got list"),
    ],
    ids=["None", "empty", "dict", "list"],
)
@pytest.mark.parametrize("make", [lambda base: ClassIncremental(base, num_tasks=2), Joint])
def test_a_train_loader_that_is_not_one_loader(make, answer, message):
    class Answering(LightningDataModule):
        def train_dataloader(self):
            return answer

    _refused(MisconfigurationException, message, make(Answering()))


def test_a_train_loader_without_a_batch_size():
    class Unbatched(TrainingDigits):
        def loader(self, split, shuffle=False):
            return DataLoader(self.sets[split], batch_size=None)

    _refused(MisconfigurationException, r"`Unbatched.train_dataloader\(\)` has no batch size", Joint(Unbatched()))


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(64), 0)] * 4)


class IterableTraining(DigitsData):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


class IterableValidation(DigitsData):
    def val_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassIncremental(IterableTraining(), num_tasks=2),
        lambda: DomainIncremental(IterableTraining(), transforms=[None, None]),
        lambda: Joint(IterableTraining()),
    ],
    ids=["ClassIncremental", "DomainIncremental", "Joint"],
)
def test_iterable_training_data_where_indices_are_needed(make):
    _refused(TypeError, "IterableTraining has the iterable Endless.*`TaskList`", make())


@pytest.mark.parametrize("eval_tasks", ["current", "all"])
def test_iterable_validation_data_where_indices_are_needed(eval_tasks):
    sequence = ClassIncremental(IterableValidation(), num_tasks=2, eval_tasks=eval_tasks)
    message = "val data of IterableValidation can only be iterated.*`TaskList`"
    _refused(MisconfigurationException, message, sequence, num_sanity_val_steps=1)


def test_iterable_validation_data_of_several_tasks_in_one_loader():
    sequence = TaskList([IterableValidation(), IterableValidation()], eval_tasks="all")
    message = "val data of task 0 can only be iterated.*`eval_loaders='per_task'`, or `eval_tasks='current'`"
    _refused(MisconfigurationException, message, sequence, num_sanity_val_steps=1)


def test_a_transform_for_evaluation_that_has_no_place():
    sequence = Joint(TrainingDigits(), val_fraction=0.2, eval_transform=abs)
    _refused(
        MisconfigurationException, "`eval_transform` has no place: TensorDataset", sequence, num_sanity_val_steps=1
    )


# ------------------------------------------------------------------ combinations with the Trainer


def _three_tasks(**arguments):
    return ClassIncremental(DigitsData(), **{"num_tasks": 3, **arguments})


def test_overfit_batches():
    message = r"`Trainer\(overfit_batches=2\)` replaces the sampler.*`limit_train_batches`"
    _refused(MisconfigurationException, message, _three_tasks(), overfit_batches=2)


def test_stochastic_weight_averaging():
    message = "`StochasticWeightAveraging` plans its epochs before the fit.*`WeightAveraging`"
    _refused(MisconfigurationException, message, _three_tasks(), callbacks=[StochasticWeightAveraging(0.1)])


def test_tasks_that_never_end():
    message = r"A task would never end: got `Trainer\(max_epochs=-1, max_steps=-1\)` with 3 tasks.*`epochs_per_task`"
    _refused(MisconfigurationException, message, _three_tasks(), max_epochs=-1)


def test_renewing_the_optimizer_under_deepspeed(monkeypatch):
    # DeepSpeed's own package is not needed for the question which strategy there is
    monkeypatch.setattr("lightning_cl.tasks.clock.DeepSpeedStrategy", SingleDeviceStrategy)
    message = "DeepSpeed binds the optimizer.*Say `reset_optimizer=False`, or use `Trainer"
    _refused(MisconfigurationException, message, _three_tasks())
    quiet_trainer(fast_dev_run=1).fit(Plain(), datamodule=_three_tasks(reset_optimizer=False))


@pytest.mark.parametrize("sequence", [_three_tasks, lambda: TaskList([DigitsData(), DigitsData()])])
def test_what_was_refused_leaves_trainer_and_module_as_they_were(sequence):
    trainer, module = quiet_trainer(overfit_batches=2), Plain()
    before = list(trainer.callbacks), trainer.max_epochs, set(vars(module))
    with pytest.raises(MisconfigurationException):
        trainer.fit(module, datamodule=sequence())
    assert (list(trainer.callbacks), trainer.max_epochs) == before[:2]
    assert not {"configure_optimizers", "on_train_epoch_end", "training_step"} & set(vars(module))


class DropsLast(TrainingDigits):
    """Its last task has too few samples for a batch."""

    def train_dataloader(self):
        inputs, labels = self.sets["train"].tensors
        few = [(labels == 4).nonzero().squeeze(1)[:3], (labels == 5).nonzero().squeeze(1)[:2]]
        kept = torch.cat([(labels < 4).nonzero().squeeze(1), *few])
        return DataLoader(TensorDataset(inputs[kept], labels[kept]), batch_size=8, shuffle=True, drop_last=True)


def test_a_later_task_that_drop_last_leaves_no_batch_of():
    class NeverTrained(Plain):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training had begun")

    with pytest.raises(ValueError, match=r"`drop_last=True` leaves no batch.*5 samples.*`batch_size`"):
        quiet_trainer().fit(NeverTrained(), datamodule=ClassIncremental(DropsLast(), num_tasks=3))


def test_limiting_a_validation_that_goes_through_one_task_after_another_is_warned_of():
    with pytest.warns(UserWarning, match="leaves the last tasks out of the validation.*`eval_loaders='per_task'`"):
        quiet_trainer(limit_val_batches=1).fit(Plain(), datamodule=ClassIncremental(DigitsData(), num_tasks=2))
