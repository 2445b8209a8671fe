"""Pointwise expressions: what is computed of each element before or behind the heavy part of a kernel.

Written as text, which a plan can hold: `add(silu(mul(acc, gate)), in0)`. Names are values of an element; calls are the
functions of the dialect, in float32, and `round`, which rounds to the type of the activations and back. Numbers are
float32 constants.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graphopt.backends.cuda import arithmetic
from graphopt.backends.cuda.arithmetic import F32, Float16

Value = TypeVar("Value")
_ARITY = {"add": 2, "sub": 2, "mul": 2, "div": 2, "max": 2, "min": 2, "fma": 3}
_ONE_ARGUMENT = frozenset(arithmetic.FUNCTIONS) - _ARITY.keys() | {"round"}


@functools.cache
def parsed(text: str) -> ast.expr:
    """Return the tree of an expression; ValueError where it is none."""
    try:
        tree = ast.parse(text, mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} is no expression of a kernel: {error}") from error
    return tree


def _check(node: ast.expr) -> None:
    match node:
        case ast.Name():
            return
        case ast.Constant(value=int() | float()):
            return
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            wanted = _ARITY.get(name, 1 if name in _ONE_ARGUMENT else 0)
            if wanted != len(args):
                raise ValueError(f"{name} takes {wanted} arguments" if wanted else f"there is no function {name}")
            for each in args:
                _check(each)
        case _:
            raise ValueError("it may hold names, numbers and calls")


def names(text: str) -> list[str]:
    """Return the names that an expression reads, once each, in the order of their first use."""
    tree = parsed(text)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called]
    return list(dict.fromkeys(node.id for node in sorted(found, key=lambda node: node.col_offset)))


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Return the expression with names replaced by other expressions."""

    def leaf(value: Any) -> str:
        return names.get(value, value) if isinstance(value, str) else repr(value)

    return _folded(parsed(text), leaf, lambda name, args: f"{name}({', '.join(args)})")


def emitted(text: str, leaves: Mapping[str, str], dtype: Float16) -> str:
    """Return the expression in the dialect; `leaves` are the texts that stand for names."""
    letter = "h" if dtype == "float16" else "b"

    def leaf(value: Any) -> str:
        return leaves[value] if isinstance(value, str) else literal(value)

    def call(name: str, args: list[str]) -> str:
        if name == "round":
            return f"go_of_{letter}(go_to_{letter}({args[0]}))"
        return f"go_{name}({', '.join(args)})"

    return _folded(parsed(text), leaf, call)


def evaluated(text: str, values: Mapping[str, F32], dtype: Float16) -> F32:
    """Return the expression's values, with the bits that the kernel gives."""

    def leaf(value: Any) -> F32:
        return values[value] if isinstance(value, str) else np.asarray(value, np.float32)

    def call(name: str, args: list[F32]) -> F32:
        if name == "round":
            return arithmetic.widened(arithmetic.narrowed(args[0], dtype), dtype)
        return arithmetic.FUNCTIONS[name](*args)

    return _folded(parsed(text), leaf, call)


def computed(text: str, values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the expression's values by torch, in float32; `dtype`: what `round` rounds to."""

    def leaf(value: Any) -> Tensor:
        return values[value] if isinstance(value, str) else torch.tensor(value, dtype=torch.float32)

    def call(name: str, args: list[Tensor]) -> Tensor:
        return args[0].to(dtype).to(torch.float32) if name == "round" else _IN_TORCH[name](*args)

    return _folded(parsed(text), leaf, call)


_IN_TORCH: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "fma": lambda a, b, c: a * b + c,
    "sqrt": torch.sqrt,
    "neg": torch.neg,
    "abs": torch.abs,
    "max": torch.maximum,
    "min": torch.minimum,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "erf": torch.erf,
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
}


def _folded(node: ast.expr, leaf: Callable[[str | float], Value], call: Callable[[str, list[Value]], Value]) -> Value:
    match node:
        case ast.Name(id=name):
            return leaf(name)
        case ast.Constant(value=value):
            return leaf(float(value))  # type: ignore[arg-type]
        case ast.UnaryOp(operand=ast.Constant(value=value)):
            return leaf(-float(value))  # type: ignore[arg-type]
        case ast.Call(func=ast.Name(id=name), args=args):
            return call(name, [_folded(each, leaf, call) for each in args])
    raise AssertionError(ast.dump(node))


def literal(value: float) -> str:
    """Return a float32 constant in C, with all its bits."""
    return f"go_float(0x{int(np.float32(value).view(np.uint32)):08x}u)"
