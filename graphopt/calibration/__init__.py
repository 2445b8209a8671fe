"""Calibration: batches in, statistics out, streamed."""

from graphopt.calibration.batches import Batches, call_form, check_inputs, check_source
from graphopt.calibration.collect import collect
from graphopt.calibration.observers import Histogram

__all__ = ["Batches", "Histogram", "call_form", "check_inputs", "check_source", "collect"]
