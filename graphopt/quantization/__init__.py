"""Quantization as a product of choices: grids, ranges, objectives, rounding (see docs)."""

from graphopt.quantization.grids import IntegerGrid, grid, register_grid

__all__ = ["IntegerGrid", "grid", "register_grid"]
