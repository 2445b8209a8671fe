"""Run linears on integers, with activation scales computed at run time.

    y = linear(x, w, b)   ->   s, z = dynamic_scale(x);  y' = linear(dq(q(x, s, z)), dq(w_int8), b)

w symmetric per output channel, x asymmetric per tensor. No calibration data; the price is one look at x for its range.
Readers of one value share its codes.

Lossy. Runs after the exact passes.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from graphopt.ir import Changes, Program, Rewriter, arguments, dialect, operator
from graphopt.passes.quantize.offers import not_among, scheme_offers
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.grids import IntegerGrid, integer_grid
from graphopt.quantization.marks import DYNAMIC, marked_otherwise
from graphopt.quantization.placement import nothing_to_quantize, place
from graphopt.quantization.weights import dequantized, pair_scale, quantize_weight
from graphopt.search import Choosing, Offer, Store
from graphopt.target import Target


@dataclass(frozen=True)
class QuantizeDynamic(LossyPass, Choosing):
    """Quantize linears with scales computed at run time; needs no data.

    As a choice of a search it offers each weight to stay float or to be read by operators on integers.

    Attributes:
        weights: names; only what multiplies by one of them runs on integers.
    """

    quantizes: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    weights: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> Changes:
        return self.apply(program, context, self._left(program))

    def _left(self, program: Program) -> Mapping[str, str]:
        return {**(not_among(program, self.weights) if self.weights else {}), **marked_otherwise(program, DYNAMIC)}

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
        codes: _Codes = {}
        for node in [node for node in program.graph.nodes if node in anchors]:
            if not context.target.operators[operator(node)].dynamic:
                rewriter.decline(
                    node, f"{context.target.name} has no fast {operator(node)} with scales computed at run time"
                )
                continue
            self._quantize(node, codes, rewriter, context)
        return rewriter.finish()

    def offers(self, program: Program, context: Context, store: Store) -> list[Offer]:
        """Return for every weight whether its operators run on integers."""
        quantized = program.clone()
        changes = self.apply(quantized, context, self._left(program))
        return scheme_offers(DYNAMIC, program, quantized, [site.node for site in changes.touched], store)

    def restructure(self, program: Program, levels: Mapping[str, str], target: Target, store: Store) -> None:
        """Round the inputs of operators of the chosen weights; weights come from the store."""
        left, rewriter = not_among(program, levels), Rewriter(program, self.name)
        grid, codes = integer_grid(target.activation_format), _Codes()
        for node in place(program, target, lambda node: left.get(node.name, "")).anchors:
            if target.operators[operator(node)].dynamic:
                rewriter.rewire(node, input=_rounded(arguments(node)["input"], node, grid, codes, rewriter))
        rewriter.finish()

    def chosen(self, levels: Mapping[str, str]) -> QuantizeDynamic | None:
        """Return the pass that quantizes what the chosen weights are read by, and leaves the rest."""
        return replace(self, weights=tuple(levels)) if levels else None

    def _quantize(self, node: fx.Node, codes: _Codes, rewriter: Rewriter, context: Context) -> None:
        activation_grid, weight_grid = (
            integer_grid(context.target.activation_format),
            integer_grid(context.target.weight_format),
        )
        named = arguments(node)
        back = _rounded(named["input"], node, activation_grid, codes, rewriter)
        least_scale = pair_scale(rewriter.value(named["weight"]), node, weight_grid, context.target)
        weight = quantize_weight(rewriter, named["weight"], weight_grid, 0, least_scale)
        rewriter.rewire(node, input=back, weight=dequantized(rewriter, weight, 0, weight_grid, node))
        what = f"{operator(node)} on dynamic {activation_grid.name} x {weight_grid.name}{weight.coarsened}"
        rewriter.touch(node, what)


_Codes = dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]]  # of a value: codes, scale, zero point


def _rounded(value: fx.Node, reader: fx.Node, grid: IntegerGrid, codes: _Codes, rewriter: Rewriter) -> fx.Node:
    """Insert what rounds a value with a scale of its own, once, and return what `reader` reads."""
    if value not in codes:
        both = rewriter.insert(dialect.dynamic_scale, value, 0, 0, grid.name, before=reader, origin=[value])
        scale = rewriter.insert(python_operator.getitem, both, 0, before=reader, origin=[value])
        zero = rewriter.insert(python_operator.getitem, both, 1, before=reader, origin=[value])
        made = rewriter.insert(
            dialect.quantize, value, scale, zero, 0, 0, grid.name, before=reader, origin=[value]
        )
        codes[value] = (made, scale, zero)
    made, scale, zero = codes[value]
    return rewriter.insert(
        dialect.dequantize, made, scale, zero, None, 0, 0, grid.name, before=reader, origin=[value]
    )
