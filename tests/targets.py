"""Target profiles that are the same on every machine that runs the tests."""

from __future__ import annotations

import dataclasses

from graphopt.backends.onnx.target import ONNXRUNTIME_CPU

# A processor that multiplies 8 bits without overflow, where nothing is timed.
EXACT = dataclasses.replace(ONNXRUNTIME_CPU, saturates_pairs=False, measurable=False)
