"""Classification heads: fitted to features, or trained inside a network as exits. Pure `torch.nn`, for any loop."""

from lightning_cl.heads.class_means import ClassMeans
from lightning_cl.heads.nearest_mean import NearestMeanHead, pool_positions

__all__ = ["ClassMeans", "NearestMeanHead", "pool_positions"]
