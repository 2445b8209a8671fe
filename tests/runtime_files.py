"""Files in a plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor


def run_file(path: Path, x: Tensor) -> Tensor:
    """Return the first output of a file with one input."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
