"""Pointwise operators as expressions of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from graphopt.ir import arguments, is_floating, operator

MOST_OPERANDS = 6  # of an expression
_UNARY = {"relu", "sigmoid", "silu", "tanh", "neg", "abs", "exp", "sqrt"}
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "maximum": "max", "minimum": "min"}

_CLAMPS = {"clamp": ("min", "max"), "hardtanh": ("min_val", "max_val"), "relu6": ()}


@dataclass
class Pointwise:
    """An expression, and the nodes that its names stand for: v0, … vectors, in0, … tensors of the whole shape."""

    text: str
    operands: dict[str, fx.Node] = field(default_factory=dict)

    def operand(self, value: object, shape: Any) -> str | None:
        """Return the text for something that an operator reads, or None where a kernel cannot read it so."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return repr(float(value)) if np.isfinite(value) else None
        if not is_floating(value):
            return None
        assert isinstance(value, fx.Node)
        own = value.meta["val"].shape
        if same_shape(own, shape):
            kind = "in"
        elif len(own) == 1 and same_shape(own, shape[-1:]):
            kind = "v"
        else:
            return None
        for name, node in self.operands.items():
            if node is value and name.startswith(kind):
                return name
        name = f"{kind}{sum(each.startswith(kind) for each in self.operands)}"
        self.operands[name] = value
        return name


def same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        isinstance(x, int) == isinstance(y, int) and str(x) == str(y) for x, y in zip(a, b, strict=True)
    )


def pointwise(node: fx.Node) -> tuple[str, list[Any]] | None:
    """Return (function, operands) of a pointwise operator that expressions know, or None.

    The function is a format: `silu({0})`, `add({0}, {1})`.
    """
    name = operator(node)
    if not is_floating(node):
        return None
    named = arguments(node)
    if name in _UNARY:
        return f"{name}({{0}})", [named["self"]]
    if name == "gelu":
        return ("gelu_tanh({0})" if named["approximate"] == "tanh" else "gelu({0})"), [named["self"]]
    if name in _BINARY:
        if named.get("alpha", 1) != 1 or named.get("rounding_mode") is not None:
            return None
        return f"{_BINARY[name]}({{0}}, {{1}})", [named["self"], named["other"]]
    if name in _CLAMPS:
        ends = [0.0, 6.0] if name == "relu6" else [named[end] for end in _CLAMPS[name]]
        if any(not isinstance(end, int | float | None) for end in ends):
            return None  # bounds that are tensors
        text = "{0}" if ends[0] is None else f"max({{0}}, {float(ends[0])!r})"
        return (text if ends[1] is None else f"min({text}, {float(ends[1])!r})"), [named["self"]]
    return None
