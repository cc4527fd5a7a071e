"""Prints what 100,000 online updates of a replay memory add to this process: bytes, objects, and the slots held."""

import gc
import sys
from pathlib import Path

import torch

from lightning_cl.memory import ReplayMemory


def update(memory, steps):
    for step in steps:
        memory.add(step // 20_000, torch.arange(step % 20_000 * 10, step % 20_000 * 10 + 10), torch.arange(10))
        memory.sample(10)


def footprint():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096, len(gc.get_objects())


def main(selection):
    memory = ReplayMemory(1000, selection)
    update(memory, range(2_000))
    resident, objects = footprint()
    update(memory, range(2_000, 102_000))
    resident_after, objects_after = footprint()
    sys.stdout.write(f"{resident_after - resident} {objects_after - objects} {len(memory)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
