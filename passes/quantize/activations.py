"""Put the inputs of linears and convolutions on a grid.

    y = linear(x, w, b)   ->   s, z = dynamic_scale(x);  y' = linear(dequantize(quantize(x, s, z), s, z), w, b)

A scale for each token (the last axis of x), for each group of its channels, or for the whole tensor; computed from what
is there, or fixed by calibration (tensor only). The inputs of convolutions take one scale for the tensor, or blocks of
channels where the grid has them. Readers of one value share its codes. Weights are `quantize_weights`' business, which
runs afterwards and sees what the codes stand for.

Lossy. Runs after the exact passes.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import fx

from graphopt.calibration import Histogram
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter, arguments, dialect, is_floating, operator
from graphopt.pipeline import Context, LossyPass
from graphopt.quantization.grids import Grid, grid
from graphopt.quantization.ranges import Observer, scale_and_zero_point

_OPERATORS = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class QuantizeActivations(LossyPass):
    """Quantize the inputs of linears and convolutions, to any grid.

    Attributes:
        grid: what values they may take: int8, int4, e4m3, mxfp4, nvfp4 and so on.
        granularity: token, group or tensor. A block format has groups of its own size.
        group_size: channels that share a scale, for granularity=group.
        symmetric: whether zero is the middle code; else there are zero points, where the grid takes them.
        static: take one range for each tensor from calibration data, in the place of one from what is there.
        observer: how that range is chosen: minmax, percentile, mse or entropy.
        percentile: share of values inside, for that observer.
    """

    quantizes: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "retype_floats")

    grid: str = "int8"
    granularity: Literal["token", "group", "tensor"] = "token"
    group_size: Annotated[int, Field(ge=1)] = 64
    symmetric: bool = False
    static: bool = False
    observer: Observer = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        form = grid(self.grid)
        if form.tabled:
            raise GraphoptError(f"{self.name}.grid cannot be {self.grid}: a codebook is learned for weights")
        if self.static and (self.granularity != "tensor" or form.block):
            raise GraphoptError(f"{self.name}: static=True takes one scale for a tensor; give granularity='tensor'")

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        sites = []
        for node in program.graph.nodes:
            if operator(node) in _OPERATORS:
                if reason := self.refusal(program, node) or _unfit(node):
                    rewriter.decline(node, reason)
                else:
                    sites.append(node)
        if not sites:
            rewriter.decline("program", "it has no linear or convolution whose input could be quantized")
        values = list(dict.fromkeys(arguments(site)["input"] for site in sites))
        seen: dict[str, Histogram] = context.histograms(program, values, self.name) if self.static and values else {}
        made: dict[tuple[fx.Node, int, int], fx.Node] = {}
        for site in sites:
            value = arguments(site)["input"]
            place = self._place(site)
            if (value, *place) not in made:
                if self.static and seen[value.name].empty:
                    rewriter.decline(site, f"no sample reached {value.name}")
                    continue
                made[value, *place] = self._pair(site, value, *place, seen.get(value.name), rewriter)
            rewriter.rewire(site, input=made[value, *place])
            rewriter.touch(site, f"{operator(site)} on {self.grid} by {self._what(*place)}")
        return rewriter.finish()

    def _place(self, site: fx.Node) -> tuple[int, int]:
        """Return axis and group size, as the dialect takes them, for what an operator reads."""
        form, linear = grid(self.grid), operator(site) == "linear"
        axis = -1 if linear else 1 - (2 + _dims(site)) + arguments(site)["input"].meta["val"].dim()
        if form.block:
            return axis, form.block
        if self.granularity == "tensor" or not linear:
            return 0, 0
        return axis, -1 if self.granularity == "token" else self.group_size

    def _what(self, axis: int, group: int) -> str:
        if not group:
            return "fixed range" if self.static else "tensor"
        return "token" if group < 0 else f"groups of {group}"

    def _pair(
        self, site: fx.Node, value: fx.Node, axis: int, group: int, seen: Histogram | None, rewriter: Rewriter
    ) -> fx.Node:
        """Insert quantize and dequantize for a value; return what stands for it."""
        form = grid(self.grid)
        shifted = form.affine and not self.symmetric

        def call(target: Any, *args: Any) -> fx.Node:
            return rewriter.insert(target, *args, before=site, origin=[value])

        if seen is not None:
            scale, zero_point = scale_and_zero_point(seen, form, self.observer, self.percentile, self.symmetric)
            dtype = value.meta["val"].dtype
            s = rewriter.weight(torch.tensor(scale), f"{value.name}_scale", dtype)
            z = rewriter.weight(torch.tensor(zero_point), f"{value.name}_zero_point", form.storage) if shifted else None
        elif shifted:
            both = call(dialect.dynamic_scale, value, axis, group, form.name)
            s, z = call(python_operator.getitem, both, 0), call(python_operator.getitem, both, 1)
        else:
            s, z = self._symmetric(form, value, axis, group, call), None
        codes = call(dialect.quantize, value, s, z, axis, group, form.name)
        return call(dialect.dequantize, codes, s, z, None, axis, group, form.name)

    def _symmetric(self, form: Grid, value: fx.Node, axis: int, group: int, call: Callable[..., fx.Node]) -> fx.Node:
        """Return the scale of the largest magnitude: integers are looked at with their signs taken away."""
        if not form.affine:
            return call(python_operator.getitem, call(dialect.dynamic_scale, value, axis, group, form.name), 0)
        # dynamic_scale spreads all codes over [0, max|x|]: half of them are the other side's.
        largest = call(torch.ops.aten.abs.default, value)
        both = call(dialect.dynamic_scale, largest, axis, group, form.name)
        ratio = (form.code_max - form.code_min) / form.code_max
        return call(torch.ops.aten.mul.Tensor, call(python_operator.getitem, both, 0), ratio)


def _dims(site: fx.Node) -> int:
    return int(arguments(site)["weight"].meta["val"].dim()) - 2


def _unfit(node: fx.Node) -> str:
    value = arguments(node)["input"]
    if not is_floating(value):
        return "its input is no floating-point tensor"
    if value.op == "get_attr":
        return "its input is a weight"
    if operator(value) == "graphopt.dequantize":
        return "its input is quantized already"
    return ""
