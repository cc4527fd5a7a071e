"""Data: sources of samples, and sequences that cut any DataModule into tasks."""

from lightning_cl.datamodules.array_data import ArrayData
from lightning_cl.datamodules.class_incremental import ClassIncremental
from lightning_cl.datamodules.digits import Digits
from lightning_cl.datamodules.domain_incremental import DomainIncremental
from lightning_cl.datamodules.joint import Joint
from lightning_cl.datamodules.poisoned_task import PoisonedTask
from lightning_cl.datamodules.sequence import TaskSequence
from lightning_cl.datamodules.task_list import TaskList
from lightning_cl.datamodules.torchvision_data import TorchvisionData
from lightning_cl.datamodules.transforms import Permute, Rotate

__all__ = [
    "ArrayData",
    "ClassIncremental",
    "Digits",
    "DomainIncremental",
    "Joint",
    "Permute",
    "PoisonedTask",
    "Rotate",
    "TaskList",
    "TaskSequence",
    "TorchvisionData",
]
