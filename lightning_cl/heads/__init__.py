"""Classification heads: fitted to features, or trained inside a network as exits. Pure `torch.nn`, for any loop."""

from lightning_cl.heads.adaptation import adapt_gaussians
from lightning_cl.heads.anti_collapse import anti_collapse_loss
from lightning_cl.heads.class_gaussians import ClassGaussians
from lightning_cl.heads.class_means import ClassMeans
from lightning_cl.heads.covariances import correlation, shrink
from lightning_cl.heads.feature_adapter import FeatureAdapter
from lightning_cl.heads.gaussian_head import GaussianHead
from lightning_cl.heads.nearest_mean import NearestMeanHead, pool_positions

__all__ = [
    "ClassGaussians",
    "ClassMeans",
    "FeatureAdapter",
    "GaussianHead",
    "NearestMeanHead",
    "adapt_gaussians",
    "anti_collapse_loss",
    "correlation",
    "pool_positions",
    "shrink",
]
