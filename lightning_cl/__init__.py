"""Continual learning for PyTorch Lightning: callbacks and DataModules for streams of tasks."""

__version__ = "0.1.0"
