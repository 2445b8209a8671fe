"""ONNX files for ONNX Runtime."""

import os

# ONNX Runtime's Linux wheels report usage over the network unless told so before they are imported; graphopt uses no
# network. Who sets the variable keeps the say.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from graphopt.backends.onnx.backend import OnnxBackend

__all__ = ["OnnxBackend"]
