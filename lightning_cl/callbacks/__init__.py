"""Callbacks: behaviours that change training or prediction, and observers that measure."""

from lightning_cl.callbacks.ada_gauss import AdaGauss
from lightning_cl.callbacks.anti_collapse import AntiCollapse
from lightning_cl.callbacks.continual_metrics import ContinualMetrics
from lightning_cl.callbacks.dark_experience_replay import DarkExperienceReplay
from lightning_cl.callbacks.early_exits import EarlyExits
from lightning_cl.callbacks.elastic_weight_consolidation import ElasticWeightConsolidation
from lightning_cl.callbacks.freeze import Freeze
from lightning_cl.callbacks.gaussian_classifier import GaussianClassifier
from lightning_cl.callbacks.learning_without_forgetting import LearningWithoutForgetting
from lightning_cl.callbacks.learning_without_memorizing import LearningWithoutMemorizing
from lightning_cl.callbacks.nearest_mean_classifier import NearestMeanClassifier
from lightning_cl.callbacks.poison_detector import PoisonDetector
from lightning_cl.callbacks.projected_distillation import ProjectedDistillation
from lightning_cl.callbacks.replay import Replay
from lightning_cl.callbacks.sample_screen import SampleScreen
from lightning_cl.callbacks.stability_gap_tracker import StabilityGapTracker
from lightning_cl.callbacks.task_progress_bar import TaskProgressBar
from lightning_cl.tasks.early_stopping import TaskEarlyStopping

__all__ = [
    "AdaGauss",
    "AntiCollapse",
    "ContinualMetrics",
    "DarkExperienceReplay",
    "EarlyExits",
    "ElasticWeightConsolidation",
    "Freeze",
    "GaussianClassifier",
    "LearningWithoutForgetting",
    "LearningWithoutMemorizing",
    "NearestMeanClassifier",
    "PoisonDetector",
    "ProjectedDistillation",
    "Replay",
    "SampleScreen",
    "StabilityGapTracker",
    "TaskEarlyStopping",
    "TaskProgressBar",
]
