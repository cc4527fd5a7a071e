"""Metrics of a stream of tasks in torchmetrics' form, with their functional twins in `functional` and `stability`."""

from lightning_cl.metrics.accuracy_matrix import AccuracyMatrix
from lightning_cl.metrics.continual import (
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
)
from lightning_cl.metrics.recency import TaskRecencyBias
from lightning_cl.metrics.stability import (
    GapMatrices,
    min_accuracy,
    normalized_recovery,
    normalized_stability_gap,
    recovery,
    stability_gap,
    stability_gaps,
    task_minimum_accuracy,
    task_recency_bias,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
from lightning_cl.metrics.stability_metrics import (
    MinAccuracy,
    NormalizedRecovery,
    NormalizedStabilityGap,
    Recovery,
    StabilityGap,
    TaskMinimumAccuracy,
    WindowedForgetting,
    WindowedPlasticity,
    WorstCaseAccuracy,
)

__all__ = [
    "AccuracyMatrix",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
    "GapMatrices",
    "MinAccuracy",
    "NormalizedRecovery",
    "NormalizedStabilityGap",
    "Recovery",
    "StabilityGap",
    "TaskMinimumAccuracy",
    "TaskRecencyBias",
    "WindowedForgetting",
    "WindowedPlasticity",
    "WorstCaseAccuracy",
    "min_accuracy",
    "normalized_recovery",
    "normalized_stability_gap",
    "recovery",
    "stability_gap",
    "stability_gaps",
    "task_minimum_accuracy",
    "task_recency_bias",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]
