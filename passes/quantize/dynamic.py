"""Run linears on integers, with activation scales computed at run time.

    y = linear(x, w, b)   ->   s, z = dynamic_scale(x);  y' = linear(dq(q(x, s, z)), dq(w_int8), b)

w symmetric per output channel, x asymmetric per tensor. No calibration data; the price is one look at x for its range.
Readers of one value share its codes.

Lossy. Runs after the exact passes.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt.ir import Changes, Program, Rewriter, arguments, dialect, operator
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.grids import integer_grid
from graphopt.quantization.marks import DYNAMIC, marked_otherwise
from graphopt.quantization.placement import nothing_to_quantize, place
from graphopt.quantization.weights import dequantized, pair_scale, quantize_weight


@dataclass(frozen=True)
class QuantizeDynamic(LossyPass):
    """Quantize linears with scales computed at run time; needs no data."""

    quantizes: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    def run(self, program: Program, context: Context) -> Changes:
        return self.apply(program, context, marked_otherwise(program, DYNAMIC))

    def apply(self, program: Program, context: Context, kept: Mapping[str, str]) -> Changes:
        """Quantize all but the nodes in `kept`, which are left alone for the reasons given."""
        rewriter = Rewriter(program, self.name)
        placement = place(program, context.target, lambda node: self.refusal(program, node) or kept.get(node.name, ""))
        anchors = set(placement.anchors)
        for node, reason in placement.declined:
            if (
                context.target.operators.get(operator(node))
                and context.target.operators[operator(node)].role == "anchor"
            ):
                rewriter.decline(node, reason)
        if not anchors and not kept:
            rewriter.decline("program", nothing_to_quantize(context.target))
        codes: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}
        for node in [node for node in program.graph.nodes if node in anchors]:
            if not context.target.operators[operator(node)].dynamic:
                rewriter.decline(
                    node, f"{context.target.name} has no fast {operator(node)} with scales computed at run time"
                )
                continue
            self._quantize(node, codes, rewriter, context)
        return rewriter.finish()

    def _quantize(
        self,
        node: fx.Node,
        codes: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]],
        rewriter: Rewriter,
        context: Context,
    ) -> None:
        activation_grid, weight_grid = (
            integer_grid(context.target.activation_format),
            integer_grid(context.target.weight_format),
        )
        named = arguments(node)
        value = named["input"]
        if value not in codes:
            both = rewriter.insert(
                dialect.dynamic_scale, value, 0, 0, activation_grid.name, before=node, origin=[value]
            )
            scale = rewriter.insert(python_operator.getitem, both, 0, before=node, origin=[value])
            zero = rewriter.insert(python_operator.getitem, both, 1, before=node, origin=[value])
            made = rewriter.insert(
                dialect.quantize, value, scale, zero, 0, 0, activation_grid.name, before=node, origin=[value]
            )
            codes[value] = (made, scale, zero)
        made, scale, zero = codes[value]
        back = rewriter.insert(
            dialect.dequantize, made, scale, zero, None, 0, 0, activation_grid.name, before=node, origin=[value]
        )
        least_scale = pair_scale(rewriter.value(named["weight"]), node, weight_grid, context.target)
        weight = quantize_weight(rewriter, named["weight"], weight_grid, 0, least_scale)
        rewriter.rewire(node, input=back, weight=dequantized(rewriter, weight, 0, weight_grid, node))
        what = f"{operator(node)} on dynamic {activation_grid.name} x {weight_grid.name}{weight.coarsened}"
        rewriter.touch(node, what)
