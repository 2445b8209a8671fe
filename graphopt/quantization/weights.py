"""Weights as integer codes in a program: codes, scale and zero point as weights of their own, behind a dequantize."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.ir import dialect
from graphopt.ir.printing import digest
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.quantization.grids import IntegerGrid
from graphopt.quantization.ranges import symmetric_scale
from graphopt.quantization.saturation import paired_rows, safe_scale, saturating
from graphopt.target import Target


@dataclass(frozen=True)
class QuantizedWeight:
    """Nodes that read the codes, the scale [channels] and the zero point [channels]; `scales` is the scale's value.

    `coarsened` says for a message how many channels have a coarser scale than their largest weight needs.
    """

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    scales: Tensor
    coarsened: str = ""


def pair_scale(weight: Tensor, reader: fx.Node, grid: IntegerGrid, target: Target) -> Tensor | None:
    """Return the smallest scales [out] with which the kernel of `reader` cannot saturate; None where any will do."""
    rows = paired_rows(weight, reader) if target.saturates_pairs and weight.numel() > 0 else None
    if rows is None or not bool(rows.isfinite().all()):
        return None
    unsafe = saturating(dialect.quantize(rows, symmetric_scale(rows, grid, 0), None, 0, 0, grid.name))
    least = torch.zeros(len(rows), dtype=torch.float64)
    least[unsafe] = safe_scale(rows[unsafe])
    return least


def quantize_weight(
    rewriter: Rewriter, source: fx.Node, grid: IntegerGrid, axis: int, least_scale: Tensor | None = None
) -> QuantizedWeight:
    """Replace a weight by symmetric per-channel codes along `axis`; users of a tied weight share them.

    `least_scale` [channels] is a lower bound of the scales: a coarser grid for channels that are almost zero. The zero
    point is written although it is zero: runtimes match Q/DQ pairs with three inputs.
    """
    value = rewriter.value(source)
    scale = symmetric_scale(value, grid, axis)
    key, coarsened = f"quantize {grid.name} along {axis}", ""
    if least_scale is not None and bool((least_scale > scale).any()):
        coarsened = f", {int((least_scale > scale).sum())} of {len(scale)} channels on a coarser grid against overflow"
        scale = torch.maximum(scale, least_scale).to(torch.float32).to(torch.float64)
        key += f" not finer than {digest(scale)}"

    def make() -> QuantizedWeight:
        codes = dialect.quantize(value, scale, None, axis, 0, grid.name)
        name = str(source.target)
        zero_point = torch.zeros(scale.shape, dtype=grid.storage)
        return QuantizedWeight(
            rewriter.weight(codes, name, grid.storage, source),
            rewriter.weight(scale, f"{name}_scale", torch.float32),
            rewriter.weight(zero_point, f"{name}_zero_point", grid.storage),
            scale,
            coarsened,
        )

    return rewriter.once(source, key, make)


def dequantized(rewriter: Rewriter, weight: QuantizedWeight, axis: int, grid: IntegerGrid, reader: fx.Node) -> fx.Node:
    """Insert the dequantize through which `reader` reads the weight."""
    return rewriter.insert(
        dialect.dequantize,
        weight.codes,
        weight.scale,
        weight.zero_point,
        None,
        axis,
        0,
        grid.name,
        before=reader,
    )


def unfit(program: Program, weight: fx.Node, what: str) -> str:
    """Return why a weight has no codes, for a message that calls it `what`; nothing where it has."""
    value = program.weight(weight)
    if value.numel() == 0:
        return f"{what} {weight.target} is empty"
    return "" if bool(value.isfinite().all()) else f"{what} {weight.target} holds NaN or infinity"
