"""The training loop and what it needs. Importing this must not import torch."""

from framework.training.run import TrainResult, train

__all__ = ["TrainResult", "train"]
