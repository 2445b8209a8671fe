"""Read an operator's arguments by their schema names.

ATen calls leave trailing defaults out and mix positional with keyword arguments. A rule that reads `arguments(node)`
sees one complete mapping and need not care.
"""

from __future__ import annotations

import operator as python_operator
from typing import Any

import torch
from torch import fx


def operator(node: object) -> str:
    """Return the operator's name without overload: `conv2d`, `add`, `graphopt.quantize`; empty for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, name = node.target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    if node.target is python_operator.getitem:
        return "getitem"
    # Arithmetic on symbolic sizes calls Python's operators: `mul` of two sizes is not aten's `mul` of two tensors.
    return f"python.{getattr(node.target, '__name__', node.target)}"


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return every argument of the call by its schema name, defaults filled in.

    A call of a Python function, which has no schema, gives its positional arguments as "0", "1", ...
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    named: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def positional(node: fx.Node, changes: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `(args, kwargs)` of the call with the named arguments replaced."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node.name} calls {target}, which has no schema")
    named = arguments(node) | changes
    known = {argument.name for argument in target._schema.arguments}
    if unknown := set(changes) - known:
        raise TypeError(f"{target} has no argument {sorted(unknown)}")
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        if argument.name not in named:
            continue
        value = named[argument.name]
        if argument.kwarg_only:
            if not argument.has_default_value() or value != argument.default_value:
                kwargs[argument.name] = value
        else:
            args.append(value)
    while args and len(args) == len(args_of(target)[: len(args)]):
        last = args_of(target)[len(args) - 1]
        if not last.has_default_value() or _differs(args[-1], last.default_value):
            break
        args.pop()
    return tuple(args), kwargs


def args_of(target: torch._ops.OpOverload) -> list[Any]:
    """Return the positional arguments of an operator's schema."""
    return [argument for argument in target._schema.arguments if not argument.kwarg_only]


def _differs(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node) or isinstance(default, fx.Node):
        return True
    return bool(type(value) is not type(default) or value != default)
