"""Fold the weight-norm reparameterisation into the weight.

    conv(x, g * v / ‖v‖)  ->  conv(x, w)        w = g * v / ‖v‖, the norm over all axes but `dim`

Exact: w is computed in float64 and rounded once, whatever its size, since it is no larger than v. Canonicalization
leaves `_weight_norm` to this pass and evaluates norms that are spelled out. Runs before anything that edits weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from graphopt.ir import Match, Program, Rewriter, Rule, arguments, constant, finite, operator, rule
from graphopt.passes.canonicalize.constants import result_name
from graphopt.pipeline import Pass


def _weight_norm(node: fx.Node) -> Match | None:
    """Match `_weight_norm(v, g, dim)`, or the first output of its interface operator."""
    source = node
    if operator(node) == "getitem" and node.args[1] == 0 and operator(node.args[0]) == "_weight_norm_interface":
        assert isinstance(node.args[0], fx.Node)
        source = node.args[0]
    elif operator(node) != "_weight_norm":
        return None
    named = arguments(source)
    return Match(node, {"v": named["v"], "g": named["g"], "dim": named["dim"]})


def normalized(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """Return g * v / ‖v‖. v: any shape; g: v's size along `dim`, 1 along the others (dim -1: one norm for all of v)."""
    others = [axis for axis in range(v.dim()) if axis != dim]
    if dim == -1:
        length = v.square().sum().sqrt()
    else:
        length = v.square().sum(others, keepdim=True).sqrt() if others else v.abs()
    result: Tensor = v * (g / length)
    return result


def no_zero_norm(match: Match, program: Program) -> str:
    """No slice of v is zero: its direction would be undefined."""
    v = program.weight(match.node("v")).detach().to(torch.float64)
    g = program.weight(match.node("g")).detach().to(torch.float64)
    held = bool(normalized(v, g, match["dim"]).isfinite().all())
    return "" if held else f"a slice of {match['v'].target} has norm zero"


@rule(match=_weight_norm, needs=[constant("v", "g"), finite("v", "g"), no_zero_norm])
def fold_weight_norm(match: Match, rewriter: Rewriter) -> None:
    v, g, dim = match.node("v"), match.node("g"), match["dim"]
    name = result_name(match.root, [str(v.target), str(g.target)], form=False)
    value = rewriter.program.weight(v)
    parameter = isinstance(value, nn.Parameter)

    def make() -> fx.Node:
        result = normalized(rewriter.value(v), rewriter.value(g), dim)
        return rewriter.weight(result, name, value.dtype, parameter=parameter)

    rewriter.replace(match.root, rewriter.once(v, f"weight norm by {g.target} over {dim}", make))
    rewriter.touch(match.root, f"folded into {name}")


@dataclass(frozen=True)
class FoldWeightNorm(Pass):
    """Replace weights that are given as direction and magnitude by the weights themselves."""

    rules: ClassVar[tuple[Rule, ...]] = (fold_weight_norm,)
