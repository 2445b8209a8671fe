"""Quantization as a product of choices: grids, ranges, objectives, rounding; and where Q/DQ stand in a graph."""

from graphopt.quantization.grids import Grid, IntegerGrid, grid, register_grid

__all__ = ["Grid", "IntegerGrid", "grid", "register_grid"]
