import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from plain_bases import LABELS, PIXELS, FullData, IterableData, PlainData, Stream, digits, ready, samples_in
from torch.utils.data import DataLoader

from lightning_cl.datamodules import TaskList


class Shifted(LightningDataModule):
    """Its transfer hooks write their own number into every batch."""

    def __init__(self, number, iterable=False):
        super().__init__()
        self.number, self.iterable = number, iterable
        self.hooks = []

    def train_dataloader(self):
        data = Stream(pixel=1.0) if self.iterable else [(torch.ones(64), 0)] * 4
        return DataLoader(data, batch_size=2)

    def val_dataloader(self):
        return DataLoader([(torch.ones(64), 0)] * 4, batch_size=2)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.hooks.append("before")
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.hooks.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.hooks.append("after")
        return [batch[0] * self.number, batch[1]]


class Listener(BoringModel):
    """Remembers which DataModule's number the batches bear."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 2)
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(int(batch[0][0, 0]))
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(int(batch[0][0, 0]))


class ListenerWithLoaders(Listener):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


def _fit(sequence, module=None, **arguments):
    module = module or Listener()
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0, **arguments}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", **settings, **quiet).fit(module, datamodule=sequence)
    return module


def test_each_data_module_is_a_task():
    sequence = ready(TaskList([PlainData(digits(0, 100)), FullData(digits(100, 300))]))
    assert [task.name for task in sequence.tasks] == ["0: PlainData", "1: FullData"]
    assert [task.classes for task in sequence.tasks] == [tuple(range(10))] * 2
    assert len(samples_in(sequence.train_dataloader())[1]) == 100
    sequence.enter_task(1)
    assert samples_in(sequence.train_dataloader())[1].sort().values.tolist() == LABELS[100:300].sort().values.tolist()


def test_tasks_can_be_given_names():
    assert [task.name for task in ready(TaskList([PlainData(), PlainData()], names=["old", "new"])).tasks] == [
        "old",
        "new",
    ]


def test_each_data_module_keeps_its_own_loader_settings():
    sequence = ready(TaskList([PlainData(batch_size=10, shuffle=False), PlainData(batch_size=25, drop_last=True)]))
    assert len(next(iter(sequence.train_dataloader()))[1]) == 10
    assert torch.equal(samples_in(sequence.train_dataloader())[1], LABELS[:600])
    sequence.enter_task(1)
    assert len(next(iter(sequence.train_dataloader()))[1]) == 25
    assert not torch.equal(samples_in(sequence.train_dataloader())[1], LABELS[:600])


def test_a_task_without_validation_data_is_left_out_of_the_validation():
    sequence = ready(TaskList([PlainData(), FullData()]))
    assert torch.equal(samples_in(sequence.val_dataloader())[0], PIXELS[600:900])


def test_unknown_attributes_are_those_of_the_current_tasks_data_module():
    sequence = ready(TaskList([Shifted(1), Shifted(2)]))
    assert sequence.number == 1
    sequence.enter_task(1)
    assert sequence.number == 2


def test_every_data_module_gets_its_hooks_called():
    bases = [PlainData(), PlainData()]
    sequence = TaskList(bases)
    sequence.prepare_data()
    ready(sequence).teardown("fit")
    for base in bases:
        assert base.calls == ["prepare_data", "setup fit", "teardown fit"]


def test_every_data_module_gets_its_state_back():
    class Counting(PlainData):
        count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state_dict):
            self.count = state_dict["count"]

    bases = [Counting(), Counting()]
    bases[0].count, bases[1].count = 3, 4
    state = ready(TaskList(bases)).state_dict()
    resumed = [Counting(), Counting(), Counting()]
    ready(TaskList(resumed)).load_state_dict(state)
    assert [base.count for base in resumed] == [3, 4, 0]


@pytest.mark.parametrize("eval_tasks", ["seen", "current", "all"])
def test_each_batch_goes_through_the_hooks_of_its_own_data_module(eval_tasks):
    bases = [Shifted(1), Shifted(2), Shifted(3)]
    module = _fit(TaskList(bases, eval_tasks=eval_tasks), max_epochs=2)
    assert module.trained == [1] * 4 + [2] * 4 + [3] * 4
    served = {"seen": [[1], [1, 2], [1, 2, 3]], "current": [[1], [2], [3]], "all": [[1, 2, 3]] * 3}[eval_tasks]
    assert module.validated == [number for task in served for _ in range(2) for number in task for _ in range(2)]
    assert bases[0].hooks[:3] == ["before", "transfer", "after"]


def test_each_batch_goes_through_its_own_hooks_with_a_loader_for_each_task():
    module = _fit(TaskList([Shifted(1), Shifted(2)], eval_loaders="per_task"), ListenerWithLoaders())
    assert module.validated == [1, 1, 1, 1, 2, 2]


def test_validation_in_the_middle_of_an_epoch_does_not_change_whose_hooks_training_goes_through():
    module = _fit(TaskList([Shifted(1), Shifted(2)], eval_tasks="all"), val_check_interval=1)
    assert module.trained == [1, 1, 2, 2]


@pytest.mark.parametrize("eval_tasks", ["seen", "all"])
def test_iterable_training_data_go_through_their_own_hooks_too(eval_tasks):
    bases = [Shifted(1, iterable=True), Shifted(2, iterable=True)]
    module = _fit(TaskList(bases, eval_tasks=eval_tasks), max_epochs=2)
    assert module.trained == [1] * 4 + [2] * 4


def test_iterable_data_pass_through_task_by_task():
    module = _fit(TaskList([IterableData(1.0), PlainData([(torch.full((64,), 7.0), 0)] * 4), IterableData(3.0)]))
    assert module.trained == [1, 1, 7, 3, 3]


def test_iterable_data_have_no_classes():
    assert ready(TaskList([IterableData(), IterableData()])).num_classes is None


def test_iterable_validation_data_pass_through_their_own_hooks():
    class Iterated(Shifted):
        def val_dataloader(self):
            return DataLoader(Stream(pixel=1.0), batch_size=2)

    module = _fit(TaskList([Iterated(1), Iterated(2)], eval_loaders="per_task"), ListenerWithLoaders())
    assert module.validated == [1, 1, 1, 1, 2, 2]


def test_only_what_a_data_module_offers_is_called_on_it():
    module = _fit(TaskList([PlainData([(torch.ones(64), 0)] * 4), Shifted(5)]))
    assert module.trained == [1, 5, 5]
