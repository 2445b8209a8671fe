"""From any kind of PyTorch model to a Program."""

from graphopt.capture.entry import capture

__all__ = ["capture"]
