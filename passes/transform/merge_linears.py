"""Merge linears that read the same value into one.

    linear(x, W1, b1), linear(x, W2, b2)  ->  split(linear(x, [W1; W2], [b1; b2]), [n1, n2], -1)

One larger product instead of several small ones, and one pass over x: the way back from `split_linears` before
lowering. Whether that is faster depends on the sizes and on the runtime, so no recipe does it unasked.

Exact.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.ir import Changes, Program, Rewriter, arguments, is_floating, operator
from graphopt.ir.unrounded import Computed
from graphopt.passes.canonicalize.identities import who_reads_layout
from graphopt.passes.fold.affine import bias_name
from graphopt.pipeline import Context, Pass

aten = torch.ops.aten
Kind = tuple[fx.Node, bool, torch.dtype]


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Merge linears that read the same value."""

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        groups: dict[Kind, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if operator(node) != "linear":
                continue
            named = arguments(node)
            alike = [other for other in named["input"].users if operator(other) == "linear"]
            reason = _refusal(node, program) if len(alike) > 1 else ""
            if reason:
                rewriter.decline(node, reason)
            elif len(alike) > 1:
                kind = named["input"], named["bias"] is None, named["weight"].meta["val"].dtype
                groups.setdefault(kind, []).append(node)
        for group in groups.values():
            if len(group) > 1:
                _merge(group, rewriter)
            else:
                rewriter.decline(group[0], "no other linear that reads the same is like it: with a bias, of its type")
        return rewriter.finish()


def _refusal(node: fx.Node, program: Program) -> str:
    """Return why a linear cannot be merged with another one, or an empty string."""
    named = arguments(node)
    for name in ("weight", "bias"):
        part = named[name]
        if part is None:
            continue
        if part.op != "get_attr" or not is_floating(part):
            return f"{name} of {node.name} is computed by {part.name}, not a weight"
        if len(part.users) > 1:
            others = ", ".join(user.name for user in part.users if user is not node)
            return f"{part.target} is also read by {others}"
    if named["weight"].meta["val"].dim() != 2:
        return f"weight {named['weight'].target} is no matrix"
    if named["bias"] is not None and named["bias"].meta["val"].dim() != 1:
        return f"bias {named['bias'].target} is no vector"
    return who_reads_layout(node, program)


def _merge(group: Sequence[fx.Node], rewriter: Rewriter) -> None:
    first = group[0]
    named = [arguments(node) for node in group]
    weights, biases = ([each[name] for each in named] for name in ("weight", "bias"))
    module = str(weights[0].target).rpartition(".")[0]
    name = f"{module}.merged.weight" if module else "merged.weight"
    weight = _joined(weights, name, rewriter)
    bias = None if biases[0] is None else _joined(biases, bias_name(weight), rewriter)
    merged = rewriter.insert(aten.linear.default, named[0]["input"], weight, bias, before=first, origin=group)
    sizes = [int(each.meta["val"].shape[0]) for each in weights]
    parts = rewriter.insert(aten.split_with_sizes.default, merged, sizes, -1, before=first, origin=group)
    for index, node in enumerate(group):
        rewriter.replace(node, rewriter.insert(python_operator.getitem, parts, index, before=first, origin=[node]))
        rewriter.touch(node, f"merged with {', '.join(other.name for other in group if other is not node)}")


def _joined(parts: Sequence[fx.Node], name: str, rewriter: Rewriter) -> fx.Node:
    readers: list[Computed] = [rewriter.reader(part) for part in parts]

    def compute() -> Tensor:
        return torch.cat([read() for read in readers])

    return rewriter.weight(compute, name, rewriter.program.weight(parts[0]).dtype, parameter=True)
