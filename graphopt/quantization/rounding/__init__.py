"""Rounding: which of the values near a weight it becomes."""

from graphopt.quantization.rounding.descent import descend, objective, refit_scales, refit_table
from graphopt.quantization.rounding.gptq import prepare, round_with_feedback

__all__ = ["descend", "objective", "prepare", "refit_scales", "refit_table", "round_with_feedback"]
