"""Fold a multiplication by a vector into the linear operator before it.

    linear(x, w, b) * s  ->  linear(x, diag(s) w, s b)

Layer scale, as vision transformers and modern convolutional nets have it behind each residual branch, is this: a factor
for each channel of what the branch adds. Left alone it stands between the branch's last weight and the residual stream,
which then no rotation and no centering passes. The same holds for convolutions, transposed ones too, and with
permutations of axes between the two.

Exact. Source of layer scale: "Going deeper with Image Transformers".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from graphopt.ir import Match, Program, Rewriter, Rule, arguments, constant, finite, floating, operator, rule
from graphopt.passes.fold.affine import overflows, producer_of, scale_outputs
from graphopt.passes.fold.batch_norm import one_dtype, read_once, same_axis
from graphopt.pipeline import Pass


def _scaled_linear(node: fx.Node) -> Match | None:
    if operator(node) != "mul":
        return None
    operands = list(arguments(node).values())
    for x, s in (operands, operands[::-1]):
        if not isinstance(x, fx.Node) or not isinstance(s, fx.Node) or s.op != "get_attr":
            continue
        axis = _axis(x.meta["val"], s.meta["val"])
        found = None if axis is None else producer_of(x, axis)
        if found is not None:
            named = arguments(found.node)
            return Match(node, {"x": x, "s": s, "producer": found, "w": named["weight"], "b": named["bias"]})
    return None


def _axis(x: Tensor, s: Tensor) -> int | None:
    """Return the axis of x along which s is a vector that does not change x's shape."""
    along = [dim for dim, size in enumerate(s.shape) if size != 1]
    if len(along) != 1 or s.dim() > x.dim():
        return None
    axis = x.dim() - s.dim() + along[0]
    return axis if x.shape[axis] == s.shape[along[0]] else None


def product_fits(match: Match, program: Program) -> str:
    """The scaled weight and bias stay within their type."""
    parts = [program.weight(match.node("w"))] + ([] if match["b"] is None else [program.weight(match["b"])])
    factor = float(program.weight(match.node("s")).detach().abs().max())
    fits = all(not overflows(float(part.detach().abs().max()) * factor, part.dtype) for part in parts)
    return "" if fits else f"the folded weight would overflow {parts[0].dtype}"


@rule(
    match=_scaled_linear,
    needs=[constant("w", "b", "s"), floating("w", "x"), same_axis, one_dtype, finite("w", "b", "s"), product_fits],
    worth=[read_once],
)
def fold_layer_scale(match: Match, rewriter: Rewriter) -> None:
    node, w, b, s = match["producer"].node, match.node("w"), match["b"], match.node("s")
    factor = rewriter.value(s).flatten()
    key = f"scaled by {s.target}"
    weight = rewriter.edit(w, key, lambda value: scale_outputs(node, value, factor))
    bias = None if b is None else rewriter.edit(b, key, lambda value: value * factor)
    rewriter.rewire(node, weight=weight, bias=bias)
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, f"folded into {node.name}")


@dataclass(frozen=True)
class FoldLayerScale(Pass):
    """Take multiplications by a vector into the linear operators before them."""

    rules: ClassVar[tuple[Rule, ...]] = (fold_layer_scale,)
