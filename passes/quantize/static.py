"""Run convolutions and linears on integers, with activation scales fixed by calibration.

    y = conv(x, w, b)   ->   y' = dq(q(conv(dq(q(x)), dq(w_int8), dq(b_int32))))

with w symmetric per output channel, b on the grid of scale_x * scale_w, activations asymmetric per tensor. Q and DQ
stand where the target's profile lets its runtime fuse them (`graphopt.quantization.placement`).

Lossy. Runs after the exact passes: folding changes weights and removes operators that would interrupt integer regions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.calibration import Histogram
from graphopt.ir import Changes, Program, Rewriter, arguments, dialect, operator
from graphopt.passes.quantize.offers import not_among, scheme_offers
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.grids import IntegerGrid, integer_grid
from graphopt.quantization.marks import STATIC, marked_otherwise
from graphopt.quantization.placement import Placement, Value, nothing_to_quantize, place
from graphopt.quantization.ranges import Observer, affine, choose_range
from graphopt.quantization.weights import dequantized, pair_scale, quantize_weight
from graphopt.search import Choosing, Offer, Store
from graphopt.target import Target


@dataclass(frozen=True)
class QuantizeStatic(LossyPass, Choosing):
    """Quantize convolutions, linears and what lies between them with scales from calibration.

    As a choice of a search it offers each weight to stay float or to be read by operators on integers.

    Attributes:
        observer: how the range of an activation is chosen: minmax, percentile, mse or entropy.
        percentile: share of values inside the range, for the percentile observer.
        weights: names; only what multiplies by one of them runs on integers, and what lies between.
    """

    quantizes: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    observer: Observer = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    weights: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> Changes:
        try:
            return self.apply(program, context, self._left(program))
        finally:
            context.forget()

    def _left(self, program: Program) -> Mapping[str, str]:
        return {**(not_among(program, self.weights) if self.weights else {}), **marked_otherwise(program, STATIC)}

    def apply(self, program: Program, context: Context, kept: Mapping[str, str]) -> Changes:
        """Quantize all but the nodes in `kept`, which are left alone for the reasons given."""
        rewriter = Rewriter(program, self.name)
        placement, seen = self._place(program, context, kept)
        for node, reason in placement.declined:
            rewriter.decline(node, reason)
        if not placement.anchors and not kept:
            rewriter.decline("program", nothing_to_quantize(context.target))
        if placement.anchors:
            scales = self._quantize_values(placement, seen, rewriter, context)
            for node in placement.anchors:
                self._quantize_anchor(node, scales, rewriter, context)
        return rewriter.finish()

    def offers(self, program: Program, context: Context, store: Store) -> list[Offer]:
        """Return for every weight whether its operators run on integers."""
        quantized = program.clone()
        try:
            changes = self.apply(quantized, context, self._left(program))
        finally:
            context.forget()
        sites = [site.node for site in changes.touched]
        store.put(self.name, STATIC, _pairs(quantized))
        return scheme_offers(STATIC, program, quantized, sites, store)

    def restructure(self, program: Program, levels: Mapping[str, str], target: Target, store: Store) -> None:
        """Round activations where operators of the chosen weights run on integers; weights come from the store."""
        left, known = not_among(program, levels), store.get(self.name, STATIC)
        rewriter, grid = Rewriter(program, self.name), integer_grid(target.activation_format)
        for value in place(program, target, lambda node: left.get(node.name, "")).values:
            name = value.node.name
            if f"{name} scale" in known:  # the whole program on integers has one for all that a part of it has
                scale, zero_point = (known[f"{name} {what}"] for what in ("scale", "zero_point"))
                scale_node = rewriter.weight(scale, f"{name}_scale", torch.float32)
                zero_node = rewriter.weight(zero_point, f"{name}_zero_point", grid.storage)
                insert_pair(value, scale_node, zero_node, grid.name, rewriter)
        rewriter.finish()

    def chosen(self, levels: Mapping[str, str]) -> QuantizeStatic | None:
        """Return the pass that quantizes what the chosen weights are read by, and leaves the rest."""
        return replace(self, weights=tuple(levels)) if levels else None

    def _place(
        self, program: Program, context: Context, kept: Mapping[str, str]
    ) -> tuple[Placement, dict[str, Histogram]]:
        """Decide where Q/DQ stand, and collect what the data says of the values; what no data reaches stays float."""
        left = dict(kept)

        def refusal(node: fx.Node) -> str:
            return self.refusal(program, node) or left.get(node.name, "")

        while True:
            placement = place(program, context.target, refusal)
            observed = [value.node for value in placement.values if value.observed]
            seen = context.histograms(program, observed, self.name) if placement.anchors else {}
            unreached = _unreached(placement, seen)
            if not unreached:
                return placement, seen
            left |= unreached

    def _quantize_values(
        self, placement: Placement, histograms: dict[str, Histogram], rewriter: Rewriter, context: Context
    ) -> dict[fx.Node, float]:
        """Insert quantize and dequantize at every value; return the scale of each dequantize."""
        target_grid = integer_grid(context.target.activation_format)
        groups: dict[fx.Node, list[Value]] = {}
        for value in placement.values:
            groups.setdefault(value.group, []).append(value)
        scales: dict[fx.Node, float] = {}
        ranges: dict[str, list[float]] = {}
        for group, values in groups.items():
            seen = Histogram()
            for value in values:
                if value.observed:
                    seen.merge(histograms[value.node.name])
            low, high = choose_range(seen, target_grid, self.observer, self.percentile)
            if any(value.starts_at_zero for value in values):
                low = 0.0
            scale, zero_point = affine(low, min(high, values[0].upper), target_grid)
            scale = _within(scale, zero_point, values[0].upper, target_grid)
            ranges[group.name] = [low, high]
            scale_node = rewriter.weight(torch.tensor(scale), f"{group.name}_scale", torch.float32)
            zero_node = rewriter.weight(
                torch.tensor(zero_point, dtype=target_grid.storage), f"{group.name}_zero_point", target_grid.storage
            )
            for value in values:
                for reader in insert_pair(value, scale_node, zero_node, target_grid.name, rewriter):
                    scales[reader] = scale
        rewriter.note(activation_ranges=ranges)
        return scales

    def _quantize_anchor(
        self, node: fx.Node, scales: dict[fx.Node, float], rewriter: Rewriter, context: Context
    ) -> None:
        weight_grid, bias_grid = integer_grid(context.target.weight_format), integer_grid(context.target.bias_format)
        named = arguments(node)
        bias = named.get("bias")
        least_scale = pair_scale(rewriter.value(named["weight"]), node, weight_grid, context.target)
        if isinstance(bias, fx.Node):
            # A channel of tiny weights and an ordinary bias would need a bias code beyond the grid: half of it does.
            for_bias = rewriter.value(bias).abs() / (scales[named["input"]] * (bias_grid.code_max // 2))
            least_scale = for_bias if least_scale is None else torch.maximum(for_bias, least_scale)
        weight = quantize_weight(rewriter, named["weight"], weight_grid, 0, least_scale)
        changes = {"weight": dequantized(rewriter, weight, 0, weight_grid, node)}
        if isinstance(bias, fx.Node):
            # The accumulator counts in steps of scale_x * scale_w: a bias on that grid is added before any rounding.
            bias_scale = weight.scales * scales[named["input"]]
            codes = dialect.quantize(rewriter.value(bias), bias_scale, None, 0, 0, bias_grid.name)
            name = str(bias.target)
            changes["bias"] = rewriter.insert(
                dialect.dequantize,
                rewriter.weight(codes, name, bias_grid.storage, bias),
                rewriter.weight(bias_scale, f"{name}_scale", torch.float32),
                rewriter.weight(
                    torch.zeros(bias_scale.shape, dtype=bias_grid.storage), f"{name}_zero_point", torch.int32
                ),
                None,
                0,
                0,
                bias_grid.name,
                before=node,
            )
        rewriter.rewire(node, **changes)
        rewriter.touch(
            node, f"{operator(node)} on {context.target.activation_format} x {weight_grid.name}{weight.coarsened}"
        )


def _pairs(program: Program) -> dict[str, Tensor]:
    """Return scale and zero point of every activation that is rounded, by its name."""
    found = {}
    for node in program.graph.nodes:
        if operator(node) == "graphopt.quantize" and node.args[0].op != "get_attr":
            for what, each in zip(("scale", "zero_point"), node.args[1:3], strict=True):
                found[f"{node.args[0].name} {what}"] = program.weight(each)
    return found


def _unreached(placement: Placement, seen: dict[str, Histogram]) -> dict[str, str]:
    """Return the anchors whose input or output no sample reached, each with a sentence.

    An expert that got no token, a branch that was not taken, an input that was left at zero: there is no range to take,
    and any scale would be a guess. Zeros that an integer operator computes are what they are.
    """
    found = {}
    anchors = set(placement.anchors)
    for value in placement.values:
        if value.observed and (histogram := seen[value.node.name]).low >= histogram.high:
            zeros = histogram.low == histogram.high == 0 and value.node not in placement.integer
            if histogram.empty or zeros:
                what = "is nothing but zeros" if zeros else "has no sample"
                reason = f"the calibration data {what} at {value.node.name}; give samples that get there"
                for node in (value.node, *value.readers):
                    if node in anchors:
                        found[node.name] = reason
    return found


def _within(scale: float, zero_point: int, upper: float, grid: IntegerGrid) -> float:
    """Return the float32 scale, rounded down where the largest code would mean more than `upper`.

    A runtime drops a clamp only when no code lies beyond it.
    """
    steps = np.float32(grid.code_max - zero_point)
    while np.float32(scale) * steps > np.float32(upper):
        scale = float(np.nextafter(np.float32(scale), np.float32(0)))
    return scale


def insert_pair(value: Value, scale: fx.Node, zero_point: fx.Node, format: str, rewriter: Rewriter) -> list[fx.Node]:
    """Insert one quantize behind a value and one dequantize before each of its readers; return the dequantizes."""
    node = value.node
    codes = rewriter.insert(
        dialect.quantize, node, scale, zero_point, 0, 0, format, before=_behind(node), origin=[node]
    )
    made = []
    for reader in value.readers:
        back = rewriter.insert(
            dialect.dequantize, codes, scale, zero_point, None, 0, 0, format, before=reader, origin=[node]
        )
        rewriter.redirect(reader, node, back)
        made.append(back)
    return made


def _behind(node: fx.Node) -> fx.Node:
    """Return the node before which something computed from `node` may stand as early as possible."""
    following = node.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following
