"""Metrics of a stream of tasks in torchmetrics' form; `lightning_cl.metrics.functional` has their functional twins."""

from lightning_cl.metrics.accuracy_matrix import AccuracyMatrix
from lightning_cl.metrics.continual import (
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
)

__all__ = [
    "AccuracyMatrix",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
]
