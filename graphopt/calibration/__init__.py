"""Calibration: batches in, statistics out, streamed."""

from graphopt.calibration.batches import Batches, call_form, check_inputs, check_source
from graphopt.calibration.channels import Channels
from graphopt.calibration.collect import collect, observe
from graphopt.calibration.observers import Histogram, Observer

__all__ = [
    "Batches", "Channels", "Histogram", "Observer", "call_form", "check_inputs", "check_source", "collect", "observe",
]  # fmt: skip
