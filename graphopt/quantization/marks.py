"""Marks: which scheme was chosen for an operator, remembered at its node until it is quantized."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from graphopt.ir.program import Program

FLOAT, STATIC, DYNAMIC = "float", "static", "dynamic"
_KEY = "quantization_scheme"


def mark(node: fx.Node, scheme: str, reason: str) -> None:
    """Remember the scheme of a node, with the reason for it."""
    # A dictionary of its own: clones of a program share theirs.
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: [scheme, reason]}


def marked_otherwise(program: Program, scheme: str) -> Mapping[str, str]:
    """Return, for every node that is marked with another scheme, what to say of it."""
    found = {}
    for node in program.graph.nodes:
        chosen, reason = (node.meta.get("custom") or {}).get(_KEY, (scheme, ""))
        if chosen != scheme:
            found[node.name] = f"{chosen} was chosen for it" + (f" ({reason})" if reason else "")
    return found
