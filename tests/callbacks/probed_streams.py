"""Streams whose accuracy on fixed probes is measured step by step, and the same accuracy computed by hand."""

import torch
from lightning.pytorch import Callback
from nearest_means import VAL_IMAGES, VAL_LABELS, MeansByHand
from numbered_streams import LABELS, fit_stream

from lightning_cl.callbacks import StabilityGapTracker
from lightning_cl.tasks.probes import choose
from tests.modules import DigitsData, Plain

SIZE = 10  # of the 20 validation images of each task
SEED = 1  # of `fit_stream`
STEPS = 3  # of each epoch


def fit_tracked(tracker=None, others=(), module=Plain, data=None, **settings):
    """Train on digits with a tracker, and return tracker, Trainer and module."""
    tracker = tracker or StabilityGapTracker(probe_size=SIZE)
    trainer, module = fit_stream([*others, tracker], module, data or DigitsData(), **settings)
    return tracker, trainer, module


def probes_of(task, seed=SEED, size=SIZE):
    """Images and labels of the validation samples of a task that have the smallest keys."""
    numbers = 20 * task + choose(size, 20, seed, task)
    return VAL_IMAGES[numbers], VAL_LABELS[numbers]


class Snapshots(Callback):
    """Keeps weights, memory and task after each step."""

    def __init__(self):
        self.states, self.tasks, self.memories = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        step = trainer.global_step
        self.states[step] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.tasks[step] = trainer.datamodule.current_task.index
        if trainer.datamodule.replay is not None:
            memory = trainer.datamodule.replay.memory
            self.memories[step] = memory.tasks.clone(), memory.indices.clone()

    def module(self, step, like):
        """Return a module as it stood after a step."""
        like.load_state_dict(self.states[step])
        return like.eval()

    def remembered(self, step, current=False):
        """Samples that stand for past tasks at a step, or for all in the memory: their weights by their numbers."""
        tasks, indices = self.memories[step]
        sample = {}
        for task in sorted(set(tasks.tolist()) - (set() if current else {self.tasks[step]})):
            sample.update(sampled(task, indices[tasks == task]))
        return sample

    def current(self, step):
        """Samples that stand for the task in training at a step: their weights by their numbers."""
        return sampled(self.tasks[step], torch.arange(48))


def sampled(task, indices, size=SIZE):
    """Choose from each class its share of ``size`` samples, 16 at least, and say for how many each of them stands."""
    numbers, sample = 48 * task + indices, {}
    for label in (2 * task, 2 * task + 1):
        members = numbers[LABELS[numbers] == label]
        share = max(16, round(size * len(members) / len(numbers)))
        chosen = members[choose(share, len(members), SEED, task)].tolist()
        sample.update(dict.fromkeys(chosen, len(members) / max(1, len(chosen))))
    return sample


def predict(module, images):
    """Return the predicted classes of images."""
    with torch.no_grad():
        return module.eval()(images).argmax(1)


def curve_by_hand(snapshots, predict_at, size=SIZE, num_tasks=3):
    """Accuracies of shape (steps, tasks), with ``predict_at(step, images)`` for what is predicted after a step."""
    rows = torch.full((len(snapshots.tasks), num_tasks), torch.nan)
    for row, (step, current) in enumerate(snapshots.tasks.items()):
        for task in range(current + 1):
            images, labels = probes_of(task, size=size)
            rows[row, task] = (predict_at(step, images) == labels).float().mean()
    return rows


def nearest_curve_by_hand(snapshots, like, refreshed_at=lambda step: step, past=None):
    """The same for a nearest-mean head whose prototypes were taken after the step ``refreshed_at(step)``."""

    def predict_at(step, images):
        when = refreshed_at(step)
        means = MeansByHand() if past is None else past(when)
        module = snapshots.module(when, like)
        sample = snapshots.current(when) | (snapshots.remembered(when) if past is None else {})
        means.add(module, list(sample), weights=list(sample.values()))
        prototypes = means.prototypes  # before the module changes
        return nearest(snapshots.module(step, like), prototypes, images)

    return curve_by_hand(snapshots, predict_at)


def nearest(module, prototypes, images):
    """Return the class of the nearest prototype for each image."""
    labels = sorted(prototypes)
    with torch.no_grad():
        features = module.eval().net[:4](images).double()
    features = features / features.norm(dim=1, keepdim=True)
    return torch.tensor(labels)[torch.cdist(features, torch.stack([prototypes[k] for k in labels])).argmin(1)]


def assert_same_curve(first, second):
    """Compare accuracies, NaN with NaN."""
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0, equal_nan=True)
