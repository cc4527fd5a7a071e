"""A classifier and small networks for people who bring no module of their own."""

from lightning_cl.models.backbones import MLP, CifarResNet, ConvNet, build_backbone
from lightning_cl.models.image_classifier import ImageClassifier

__all__ = ["MLP", "CifarResNet", "ConvNet", "ImageClassifier", "build_backbone"]
