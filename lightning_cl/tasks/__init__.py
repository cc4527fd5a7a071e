"""Tasks: the clock that moves a fit from one to the next, the hooks it sends, and loading that can be resumed."""

from lightning_cl.tasks.added_loss import added_loss
from lightning_cl.tasks.batches import BatchStructure
from lightning_cl.tasks.callback import ContinualCallback
from lightning_cl.tasks.clock import TaskClock
from lightning_cl.tasks.early_stopping import TaskEarlyStopping
from lightning_cl.tasks.loader import TaskDataset, TaskLoader
from lightning_cl.tasks.sampler import Cursor, Draw, TaskSampler
from lightning_cl.tasks.stream import SingleTask, TaskStream
from lightning_cl.tasks.task import Task

__all__ = [
    "BatchStructure",
    "ContinualCallback",
    "Cursor",
    "Draw",
    "SingleTask",
    "Task",
    "TaskClock",
    "TaskDataset",
    "TaskEarlyStopping",
    "TaskLoader",
    "TaskSampler",
    "TaskStream",
    "added_loss",
]
