"""Residual branches, layers and cuts: how a program is built of blocks, read from its graph."""

from graphopt.analysis.blocks.blocks import (
    Blocks,
    Branch,
    Layer,
    Region,
    Skip,
    correspondence,
    find_blocks,
    weights_of,
)

__all__ = ["Blocks", "Branch", "Layer", "Region", "Skip", "correspondence", "find_blocks", "weights_of"]
