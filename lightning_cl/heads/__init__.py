"""Classification heads: fitted to features, or trained inside a network as exits. Pure `torch.nn`, for any loop."""

from lightning_cl.heads.class_gaussians import ClassGaussians
from lightning_cl.heads.class_means import ClassMeans
from lightning_cl.heads.covariances import correlation, shrink
from lightning_cl.heads.gaussian_head import GaussianHead
from lightning_cl.heads.nearest_mean import NearestMeanHead, pool_positions

__all__ = [
    "ClassGaussians",
    "ClassMeans",
    "GaussianHead",
    "NearestMeanHead",
    "correlation",
    "pool_positions",
    "shrink",
]
