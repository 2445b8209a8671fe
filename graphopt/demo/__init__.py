"""The demo: a residual CNN trained on scikit-learn's digits, its data and its metric (extra [demo])."""

from graphopt.demo.data import Digits, digits
from graphopt.demo.network import ResidualCNN
from graphopt.demo.task import calibration, dynamic_shapes, evaluate, model
from graphopt.demo.training import TrainingConfig, train

__all__ = [
    "Digits",
    "ResidualCNN",
    "TrainingConfig",
    "calibration",
    "digits",
    "dynamic_shapes",
    "evaluate",
    "model",
    "train",
]
