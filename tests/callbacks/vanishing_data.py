"""Data that goes away when its task is over, and runs that copy what they need of it."""

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from numbered_streams import IMAGES, LABELS, AnyBatch, DataOf, Numbered, fit_stream

from lightning_cl.callbacks import DarkExperienceReplay, Replay
from lightning_cl.datamodules.array_dataset import ArrayDataset
from lightning_cl.tasks import ContinualCallback


class Vanishing(Numbered):
    """Samples of tasks before the current one are gone."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.first = 0

    def __getitem__(self, number):
        self.check([number])
        return super().__getitem__(number)

    def check(self, numbers):
        if min(numbers) < 48 * self.first:
            raise FileNotFoundError("the past data is gone")


class VanishingMany(Vanishing):
    """The same, where a list of samples is fetched at once."""

    def __getitems__(self, numbers):
        self.check(numbers)
        return [Numbered.__getitem__(self, number) for number in numbers]


class VanishingArrays(ArrayDataset):
    """The same, in memory."""

    def __init__(self):
        super().__init__(IMAGES.mul(16).to(torch.uint8), LABELS)
        self.first = 0

    def __getitems__(self, indices):
        Vanishing.check(self, torch.as_tensor(indices).tolist())
        return super().__getitems__(indices)


class Clear(ContinualCallback):
    """Takes away the data of past tasks when a task begins."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_task_start(self, trainer, pl_module, task):
        self.dataset.first = task.index


class Steps(Callback):
    """Counts the steps of a run."""

    def __init__(self):
        self.count = 0

    def on_train_batch_start(self, *args):
        self.count += 1


def run_copied(
    folder, replay, dataset=None, resume=None, others=(), every=None, clears=True, dataloader=None, **settings
):
    """Train with a checkpoint after each epoch, or each so many steps; the past goes away if it can."""
    dataset = dataset or Vanishing()
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=every)
    clear = [Clear(dataset)] if clears and hasattr(dataset, "first") else []
    _, module = fit_stream(
        [replay, checkpoint, *clear, *others],
        lambda: AnyBatch(dropout=0.2),
        data=DataOf(dataset, **(dataloader or {})),
        enable_checkpointing=True,
        ckpt_path=resume,
        **settings,
    )
    return dict(module.state_dict()), replay.memory.state_dict()


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REPLAYS = {
    "balanced": lambda storage: Replay(20, storage=storage),
    "reservoir, online": lambda storage: Replay(20, "reservoir", start="online", storage=storage),
    "herding": lambda storage: Replay(20, "herding", storage=storage),
    "joint": lambda storage: Replay(20, mix="joint", storage=storage),
    "DER": lambda storage: DarkExperienceReplay(20, storage=storage),
    "DER, online": lambda storage: DarkExperienceReplay(20, start="online", storage=storage),
}
