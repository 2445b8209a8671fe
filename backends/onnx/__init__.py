"""ONNX files for ONNX Runtime."""

from graphopt.backends.onnx.backend import OnnxBackend

__all__ = ["OnnxBackend"]
