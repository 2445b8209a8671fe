"""Calibration: batches in, statistics out, streamed."""

from graphopt.calibration.batches import Batches, call_form, check_inputs

__all__ = ["Batches", "call_form", "check_inputs"]
