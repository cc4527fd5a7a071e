"""How past samples join the batches of a task: a pure function of the memory and of where the run stands."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_cl.hashing import mix
from lightning_cl.memory import ReplayMemory
from lightning_cl.tasks.sampler import Cursor, Draw, Replayed, TaskSampler

Mix = Literal["append", "joint"]


@dataclass
class ReplayPlan:
    """What a task sequence has to know to put past samples into its batches.

    Args:
        memory: The memory, which the callback that made this plan keeps up to date.
        batch_size: Past samples of each step over all ranks; as many as the task's own if ``None``.
        mix: "append" adds them to each batch; "joint" shuffles the memory among the task's data.
        online: Whether each batch is offered to the memory.
        copies: Returns the copied samples of a task, or ``None`` where they are fetched from the task's own data.
        labels: Returns the labels of a task's samples, or ``None`` where the selection needs none.
    """

    memory: ReplayMemory
    batch_size: int | None
    mix: Mix
    online: bool
    copies: Callable[[int], Any]
    labels: Callable[[int], Tensor | None]

    def tasks_before(self, task: int) -> list[int]:
        """Return the tasks before this one that have samples in the memory."""
        return [number for number in self.memory.task_counts if number < task]

    def length_before(self, task: int, samples: Sequence[int | None]) -> int:
        """Return how many samples the memory will have when a task begins, if no task before it is refused.

        Args:
            task: Index of the task.
            samples: Training samples of each task.
        """
        bound = math.inf if self.memory.size is None else self.memory.size
        seen = sum(count or 0 for count in samples[:task])
        if self.memory.per_class is not None and task > 0:
            labels = [self.labels(number) for number in range(task)]
            counts = torch.cat([some for some in labels if some is not None]).bincount()
            seen = int(counts.clamp(max=self.memory.per_class).sum())
        return int(min(seen, bound))

    def offer(self, memory: ReplayMemory, task: int, indices: Sequence[int]) -> None:
        """Offer samples of a task to a memory: to the plan's own, or to a fork that looks ahead."""
        labels, positions = self.labels(task), torch.as_tensor(indices)
        memory.add(task, positions, None if labels is None else labels[positions])


class ReplaySampler(TaskSampler):
    """Add samples of a memory to each batch of one task.

    The draws are the same on every rank, and each rank takes its share, as it does of the task's own samples. Where
    the memory learns within the task, the sampler looks ahead in a copy of it, so that loader workers may prefetch.

    Args:
        data: The task's data.
        plan: How past samples join.
        **settings: Those of `TaskSampler`; ``stream_key`` is the task's index.
    """

    def __init__(self, data: "Dataset[object] | Sequence[object]", plan: ReplayPlan, **settings: Any) -> None:
        self._plan = plan
        self._own = len(data)  # type: ignore[arg-type]
        joined = len(plan.memory) if plan.mix == "joint" else 0
        super().__init__([range(self._own + joined)], **settings)

    @override
    def start_pass(self, cursor: Cursor) -> Callable[[int, int, int, Sequence[int]], Draw]:
        memory = self._plan.memory.fork() if self._plan.online else self._plan.memory
        return partial(self._joint_draw if self._plan.mix == "joint" else self._appended_draw, memory)

    def _joint_draw(self, memory: ReplayMemory, part: int, key: int, step: int, batch: Sequence[int]) -> Draw:
        rows = self.share(batch)
        slots = torch.tensor([row - self._own for row in rows if row >= self._own], dtype=torch.long)
        own = [row for row in rows if row < self._own]
        return Draw(part, key, own, _replayed(memory, mix(key, step, memory.seed), slots))

    def _appended_draw(self, memory: ReplayMemory, part: int, key: int, step: int, batch: Sequence[int]) -> Draw:
        step_key = mix(key, step, memory.seed)
        slots = memory.sample(len(batch) if self._plan.batch_size is None else self._plan.batch_size, step_key)
        if self.num_replicas > 1:
            slots = torch.tensor(self.share(slots.tolist()), dtype=torch.long)
        draw = Draw(part, key, self.share(batch), _replayed(memory, step_key, slots))
        if not self._plan.online:
            return draw
        self._plan.offer(memory, self.stream_key, batch)
        return draw._replace(offered=list(batch))


def _replayed(memory: ReplayMemory, key: int, slots: Tensor) -> Replayed | None:
    if len(slots) == 0:
        return None
    tasks, order = memory.tasks[slots].sort(stable=True)
    slots = slots[order]
    pairs = zip(tasks.tolist(), memory.indices[slots].tolist(), strict=True)
    groups = [(task, [index for _, index in group]) for task, group in groupby(pairs, key=itemgetter(0))]
    return Replayed(key, slots.tolist(), groups)
