"""Evaluate what depends on no input.

    f(w, 3)  ->  w'        w' = f(w, 3), computed in float64 and rounded once

Exact. Only where the result takes at most `max_bytes`, or no more than the weights that die with it: an attention
mask that is expanded to every pair of positions stays computed. Values that are integers or masks must be those that
the model computes in its own types: where rounding decides them (a float near a whole number, cast to an integer),
they stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.errors import first_line
from graphopt.ir import Program, Rewriter, is_floating, module_path, operator
from graphopt.ir.precision import retyped_arguments
from graphopt.passes.canonicalize.operators import is_cast, is_pure

# `fold_weight_norm` evaluates these, and names the result.
_LEFT_TO_OTHERS = {"_weight_norm", "_weight_norm_interface"}

# They move elements and compute nothing, so that no float64 is needed on the way.
_MOVES = {
    "alias", "cat", "chunk", "clone", "contiguous", "detach", "embedding", "expand", "flatten", "getitem",
    "index_select", "lift_fresh_copy", "narrow", "permute", "repeat", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A value that depends on no input: as the model computes it, and over the reals (float64)."""

    native: Any
    real: Any


def evaluate_constants(rewriter: Rewriter, max_bytes: int) -> None:
    """Replace every expression over weights alone by a weight, where its size allows."""
    program = rewriter.program
    region = _foldable(rewriter, max_bytes)
    values: dict[fx.Node, Constant] = {}
    for node, roots in region.items():
        if node.op == "get_attr" or not isinstance(node.meta["val"], Tensor):
            continue
        if all(user in region for user in node.users):
            continue
        try:
            value = _evaluate(rewriter, node, values)
        except Exception as error:
            rewriter.decline(node, f"it cannot be evaluated: {first_line(error)}")
            continue
        if reason := _rounding_decides(node, value):
            rewriter.decline(node, reason)
            continue
        _store(rewriter, program, node, roots, value)


def _foldable(rewriter: Rewriter, max_bytes: int) -> dict[fx.Node, frozenset[fx.Node]]:
    """Return the nodes worth evaluating, in graph order, each with the weights it is computed from."""
    constant = _constant_region(rewriter.graph.nodes)
    dying = {node for node in constant if node.op == "get_attr" and all(user in constant for user in node.users)}
    fits: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in constant:
        if node.op == "get_attr":
            fits[node] = frozenset((node,))
        elif all(source in fits for source in node.all_input_nodes):
            roots = frozenset[fx.Node]().union(*(fits[source] for source in node.all_input_nodes))
            size = _size_bytes(node.meta["val"])
            if size <= max(max_bytes, sum(_size_bytes(root.meta["val"]) for root in roots & dying)):
                fits[node] = roots
            else:
                rewriter.decline(node, f"its value takes {size} bytes, more than max_bytes={max_bytes}")
    return fits


def _constant_region(nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = {}
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and all(source in found for source in node.all_input_nodes)
            and is_pure(node)
            and operator(node) not in _LEFT_TO_OTHERS
            and _size_bytes(node.meta["val"]) >= 0
        ):
            found[node] = None
    return found


def _size_bytes(value: Any) -> int:
    """Return the bytes of a tensor or of a tuple of them; -1 where it is neither, or its shape is symbolic."""
    if isinstance(value, Tensor):
        if not all(isinstance(size, int) for size in value.shape):
            return -1
        return math.prod(value.shape) * value.element_size()
    if isinstance(value, tuple | list) and value:
        sizes = [_size_bytes(each) for each in value]
        return sum(sizes) if min(sizes) >= 0 else -1
    return -1


def _evaluate(rewriter: Rewriter, node: fx.Node, values: dict[fx.Node, Constant]) -> Constant:
    """Return the node's value, computing what it needs that is not in `values` yet."""
    stack = [node]
    while stack:
        current = stack[-1]
        missing = [source for source in current.all_input_nodes if source not in values]
        if current in values:
            stack.pop()
        elif missing:
            stack += missing
        else:
            values[stack.pop()] = _compute(rewriter, current, values)
    return values[node]


def _compute(rewriter: Rewriter, node: fx.Node, values: dict[fx.Node, Constant]) -> Constant:
    if node.op == "get_attr":
        stored = rewriter.program.weight(node).detach()
        made_here = str(node.target) in rewriter.changes.unrounded
        return Constant(stored, rewriter.value(node) if made_here else stored)
    with torch.no_grad():
        native_args = fx.map_arg((node.args, node.kwargs), lambda source: values[source].native)
        native = node.target(*native_args[0], **native_args[1])  # type: ignore[operator]
        exact = all(values[source].real is values[source].native for source in node.all_input_nodes)
        if exact and (operator(node) in _MOVES or not _is_floating(native, node, values)):
            return Constant(native, native)
        args, kwargs = retyped_arguments(node, torch.float64)
        real_args = fx.map_arg((args, kwargs), lambda source: _widened(values[source].real))
        return Constant(native, node.target(*real_args[0], **real_args[1]))  # type: ignore[operator]


def _is_floating(native: Any, node: fx.Node, values: dict[fx.Node, Constant]) -> bool:
    """True where a floating number goes into the call or comes out of it."""
    involved = [native, *(values[source].native for source in node.all_input_nodes)]
    flat = [each for value in involved for each in (value if isinstance(value, tuple | list) else [value])]
    return any(isinstance(each, Tensor) and each.is_floating_point() for each in flat)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.is_floating_point() else value
    return type(value)(_widened(each) for each in value) if isinstance(value, tuple | list) else value


def _rounding_decides(node: fx.Node, value: Constant) -> str:
    """Return why the value over the reals is not the model's, or an empty string."""
    native, real = value.native, value.real
    if not isinstance(native, Tensor):
        return f"it returns {type(native).__name__}, not a tensor"
    if native is real:
        return ""
    if native.is_complex():
        return "it is complex, and float64 checks know no complex weights"
    if not native.is_floating_point():
        return "" if torch.equal(native, real) else f"rounding to {node.meta['val'].dtype} decides its value"
    rounded = real.to(native.dtype)
    if not torch.equal(rounded.isnan(), native.isnan()) or not torch.equal(rounded.isinf(), native.isinf()):
        return f"its value overflows {native.dtype} on the way"
    return ""


def _store(rewriter: Rewriter, program: Program, node: fx.Node, roots: frozenset[fx.Node], value: Constant) -> None:
    # What is looked up in a table is a part of the table, not of the indices.
    floats = [root for root in roots if is_floating(root)] if is_floating(node) else []
    named = floats if len(floats) == 1 else sorted(roots, key=lambda root: str(root.target))
    source = named[0] if len(named) == 1 and _is_form(node, named[0]) else None
    name = result_name(node, [str(root.target) for root in named], source is not None)
    parameter = any(isinstance(program.weight(root), nn.Parameter) for root in roots)
    if source is not None and name != source.target:
        source = None
    new = rewriter.weight(value.real, name, node.meta["val"].dtype, source, parameter)
    rewriter.replace(node, new)
    rewriter.touch(node, f"evaluated to {new.target}")


def _made_by(node: fx.Node) -> fx.Node:
    """Return the node that computes the value, before its elements are moved or cast."""
    while (operator(node) in _MOVES or is_cast(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_form(node: fx.Node, weight: fx.Node) -> bool:
    """True for a part of a weight, or for what is computed from it element by element."""
    shapes = [sorted(size for size in each.meta["val"].shape if size != 1) for each in (node, weight)]
    return _made_by(node) is weight or shapes[0] == shapes[1]


def result_name(node: fx.Node, weights: list[str], form: bool) -> str:
    """Return a name for what is computed from `weights`.

    A `form` of one weight has its name. `conv.parametrizations.weight.original0` and `...original1`, or
    `conv.weight_orig` and `conv.weight_u`, are parts of `conv.weight`. Anything else is called by its place.
    """
    wholes = {_whole(name) for name in weights}
    if len(wholes) == 1 and (len(weights) > 1 or "parametrizations." in weights[0]):
        return wholes.pop()
    if form:
        return weights[0]
    made = _made_by(node)
    made = made if made.op == "call_function" else node
    path = module_path(made) or _shared_module(weights)
    return f"{path}.{made.name}" if path else made.name


def _whole(name: str) -> str:
    parametrized = re.sub(r"(^|\.)parametrizations\.(\w+)\..*$", r"\1\2", name)
    return re.sub(r"(^|\.)(\w+)_(?:orig|u|v|g)$", r"\1\2", parametrized)


def _shared_module(weights: list[str]) -> str:
    shared: list[str] = []
    for atoms in zip(*(name.split(".")[:-1] for name in weights), strict=False):
        if len(set(atoms)) > 1:
            break
        shared.append(atoms[0])
    return ".".join(shared)
