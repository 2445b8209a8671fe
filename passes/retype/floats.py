"""Compute in a floating type that the target has.

    f_bf16(x)   ->   to_bf16(f_f32(to_f32(x)))

Inputs and outputs keep their types; weights, constants and everything between are widened. Exact: widening a weight
loses nothing, and over the reals a cast is the identity. Runs before quantization, whose scales are in the wider type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.ir import Changes, Program, Rewriter, arguments, is_floating, operator
from graphopt.pipeline import Context, Pass

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RetypeFloats(Pass):
    """Widen bf16 and fp16 arithmetic to float32, the type that quantization and every runtime knows."""

    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        narrow = [node for node in program.graph.nodes if is_floating(node) and node.meta["val"].dtype in _NARROW]
        if all(_is_border(node) for node in narrow):
            return rewriter.finish()
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        outputs = [(node, node.meta["val"].dtype) for node in dict.fromkeys(program.outputs) if node in narrow]
        widened: dict[fx.Node, fx.Node] = {}
        for node in narrow:
            if node.op == "get_attr" and not _is_border(node):
                widened[node] = rewriter.weight(program.weight(node), str(node.target), torch.float32, node)
                rewriter.replace(node, widened[node])
        for node in calls:
            casts = {name: torch.float32 for name, value in arguments(node).items() if value in _NARROW}
            if casts:
                rewriter.rewire(node, **casts)
        for node in narrow:
            if node.op == "placeholder" and any(user.op != "output" for user in node.users):
                readers = [user for user in node.users if user.op != "output"]
                wide = rewriter.insert(
                    torch.ops.aten._to_copy.default, node, before=calls[0], origin=[node], dtype=torch.float32
                )
                for reader in readers:
                    rewriter.redirect(reader, node, wide)
        end = program.graph.output_node()
        for node, dtype in outputs:
            if node.op == "call_function" or node in widened:
                wide = widened.get(node, node)
                back = rewriter.insert(torch.ops.aten._to_copy.default, wide, before=end, origin=[wide], dtype=dtype)
                rewriter.redirect(end, wide, back)
        rewriter.touch("program", f"{len(narrow)} values widened to float32")
        return rewriter.finish()


def _is_border(node: fx.Node) -> bool:
    """True for an input that is only cast or returned, and for a cast or a weight that is only returned."""
    if node.op == "placeholder":
        return all(user.op == "output" or operator(user) == "_to_copy" for user in node.users)
    return (node.op == "get_attr" or operator(node) == "_to_copy") and all(user.op == "output" for user in node.users)
