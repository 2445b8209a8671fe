"""A program in half precision that still means what it meant.

Retyping alone would change three things: `rms_norm` without an epsilon takes that of its type; numbers that float16
does not hold (a mask's -3.4e38) become infinite, and a row of minus infinities has no softmax; and torch refuses to
fill a tensor of halves with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import Program, arguments, operator, retype
from graphopt.ir.arguments import positional


def in_halves(program: Program, dtype: torch.dtype) -> Program:
    """Return `program` computing in `dtype`; finite constants and weights are cut to what it holds."""
    most = torch.finfo(dtype).max

    def cut(value: Any) -> Any:
        finite = isinstance(value, float) and abs(value) < float("inf")
        return max(-most, min(most, value)) if finite else value

    def cut_weight(name: str, weight: Tensor) -> Tensor:
        if not weight.is_floating_point() or weight.dtype == dtype or not bool((weight.abs() > most).any()):
            return weight
        return torch.where(weight.isfinite(), weight.clamp(-most, most), weight).detach()

    twin = program.map_weights(cut_weight)
    for node in twin.graph.nodes:
        if node.op != "call_function":
            continue
        if operator(node) == "rms_norm" and arguments(node).get("eps") is None:
            node.args, node.kwargs = positional(node, {"eps": float(torch.finfo(node.meta["val"].dtype).eps)})
        if _gives_floats(node):
            node.args = fx.node.map_aggregate(node.args, cut)
            node.kwargs = fx.node.map_aggregate(node.kwargs, cut)
    twin.graph_module.recompile()
    return retype(twin, dtype)


def _gives_floats(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
