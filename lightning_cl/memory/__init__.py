"""Memories of past samples, and the policies that decide who stays in them."""

from lightning_cl.memory.replay_memory import ReplayMemory
from lightning_cl.memory.selection import Selection

__all__ = ["ReplayMemory", "Selection"]
