"""Small memories, and offers of made-up samples to them."""

import torch

from lightning_cl.memory import ReplayMemory

SELECTIONS = ["class_balanced", "reservoir", "random", "herding"]
HASHED = ["class_balanced", "reservoir", "random"]
SLOT_TENSORS = ("tasks", "indices", "keys", "labels")


def offer_samples(memory, task, count, classes, start=0):
    """Offer samples ``start`` to ``start + count`` of a task, their classes in turn."""
    indices = torch.arange(start, start + count)
    labels = torch.as_tensor(classes)[indices % len(classes)]
    features = torch.stack([torch.cos(indices * 1.7 + task), torch.sin(indices * 0.9), indices % 5 / 5.0], dim=1)
    memory.add(task, indices, labels, features if memory.selection == "herding" else None)


def samples_in(memory):
    return list(zip(memory.tasks.tolist(), memory.indices.tolist(), strict=True))


def assert_same_slots(one, other):
    for name in SLOT_TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def filled_memory(selection="class_balanced", size=50, seed=0):
    memory = ReplayMemory(size, selection, seed=seed)
    offer_samples(memory, 0, 200, [0, 1, 2])
    offer_samples(memory, 1, 100, [3, 4])
    return memory
