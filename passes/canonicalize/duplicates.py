"""Compute each thing once.

    a = f(x, 2); b = f(x, 2)   ->   a = f(x, 2); b = a

Exact. Quantize and dequantize are left alone, as a runtime wants one pair for each reader, and so is whatever draws
random numbers.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.ir import Rewriter
from graphopt.passes.canonicalize.operators import is_pure


def share_duplicates(rewriter: Rewriter) -> None:
    """Replace every call that repeats an earlier one."""
    first: dict[Any, fx.Node] = {}
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function" or not node.users or not is_pure(node):
            continue
        try:
            known = first.setdefault(_key(node), node)
        except TypeError:  # an argument that cannot be compared
            continue
        if known is not node:
            rewriter.replace(node, known)
            rewriter.touch(node, f"the same as {known.name}")
    rewriter.sweep()


def _key(node: fx.Node) -> Any:
    return node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items())))


def _frozen(value: Any) -> Any:
    """Return a hashable stand-in; 1, 1.0 and True differ, as do 0.0 and -0.0."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    return value if isinstance(value, fx.Node) else (type(value), repr(value) if isinstance(value, float) else value)
