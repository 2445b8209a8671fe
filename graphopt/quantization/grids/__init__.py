"""Grids: which values a quantized tensor may take; one file a family, found by name."""

from graphopt.quantization.grids.base import Grid, grid, integer_grid, known_grids, register_grid
from graphopt.quantization.grids.blocks import BlockFloatGrid, BlockIntegerGrid
from graphopt.quantization.grids.codebooks import CodebookGrid, NormalFloatGrid
from graphopt.quantization.grids.floats import FloatGrid
from graphopt.quantization.grids.integers import INT32, IntegerGrid, TernaryGrid

__all__ = [
    "INT32", "BlockFloatGrid", "BlockIntegerGrid", "CodebookGrid", "FloatGrid", "Grid", "IntegerGrid",
    "NormalFloatGrid", "TernaryGrid", "grid", "integer_grid", "known_grids", "register_grid",
]  # fmt: skip
