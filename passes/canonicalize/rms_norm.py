"""Recognise a spelled-out RMS norm.

    x * rsqrt(mean(x², -1) + eps)       ->  rms_norm(x, eps)         also x / sqrt(...); x² is pow, x * x or square
    rms_norm(x) * w                     ->  rms_norm(x, w)           w: [D] or [1, ..., D]; 1 + w is evaluated before
    to(rms_norm(to(x, float32)), bf16)  ->  rms_norm(x)              which computes in float32 itself

Exact over the reals. Casts between floating types inside the pattern are looked through; the result keeps its type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, is_floating, operator, rule, static_shape
from graphopt.ir.rules import constant, sole_user
from graphopt.passes.canonicalize.operators import is_cast, same_sizes, tensor_of, uncast

_rms_norm = torch.ops.aten.rms_norm.default


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _operands(node: object, name: str) -> tuple[object, object] | None:
    """Return both arguments of a call of the operator, casts looked through."""
    if not isinstance(node, fx.Node) or operator(node) != name or arguments(node).get("alpha", 1) != 1:
        return None
    values = list(arguments(node).values())
    return uncast(values[0]), uncast(values[1])


def _mean_square(node: object, x: fx.Node) -> float | None:
    """Return eps where `node` is mean(x², -1) + eps, else None."""
    summands = _operands(node, "add")
    for mean, eps in (summands, summands[::-1]) if summands is not None else ():
        if _number(eps) is None or not isinstance(mean, fx.Node) or operator(mean) != "mean":
            continue
        named = arguments(mean)
        rank = mean.meta["val"].dim()
        dims = named.get("dim")
        if not named.get("keepdim") or not dims or [d % rank for d in dims] != [rank - 1]:
            continue
        if _squared(uncast(named["self"])) is x:
            return _number(eps)
    return None


def _squared(node: object) -> object:
    """Return y where `node` is y², casts looked through, else None."""
    if operator(node) == "square":
        assert isinstance(node, fx.Node)
        return uncast(node.args[0])
    factors = _operands(node, "mul")
    if factors is not None and factors[0] is factors[1]:
        return factors[0]
    power = _operands(node, "pow")
    return power[0] if power is not None and power[1] == 2 else None


def _inverse_root(node: object) -> object:
    """Return v where `node` is 1 / sqrt(v), casts looked through, else None."""
    if not isinstance(node, fx.Node):
        return None
    if operator(node) == "rsqrt":
        return uncast(node.args[0])
    if operator(node) == "reciprocal":
        return _root(uncast(node.args[0]))
    power = _operands(node, "pow")
    return power[0] if power is not None and power[1] == -0.5 else None


def _root(node: object) -> object:
    if operator(node) == "sqrt":
        assert isinstance(node, fx.Node)
        return uncast(node.args[0])
    power = _operands(node, "pow")
    return power[0] if power is not None and power[1] == 0.5 else None


def _normalized(node: fx.Node) -> Match | None:
    """Match x * rsqrt(mean(x², -1) + eps); x is the factor as it stands, casts and all."""
    if operator(node) not in ("mul", "div") or not is_floating(node):
        return None
    named = arguments(node)
    if named.get("rounding_mode") is not None:
        return None
    pairs: list[tuple[Any, object]] = []
    if operator(node) == "div":
        pairs = [(named["self"], _root(uncast(named["other"])))]
    else:
        both = named["self"], named["other"]
        pairs = [(both[0], _inverse_root(uncast(both[1]))), (both[1], _inverse_root(uncast(both[0])))]
    for x, variance in pairs:
        source = uncast(x)
        if variance is None or not isinstance(source, fx.Node) or not is_floating(x):
            continue
        eps = _mean_square(variance, source)
        if eps is not None:
            return Match(node, {"x": x, "eps": eps})
    return None


def known_width(match: Match, program: Program) -> str:
    """The last axis, over which the mean goes, has a fixed size, and the result has the input's shape."""
    x, value = tensor_of(match["x"]), tensor_of(match.root)
    assert x is not None and value is not None
    if x.dim() == 0 or not isinstance(x.shape[-1], int):
        return f"the last axis of {match['x'].name} has no fixed size"
    return "" if same_sizes(x.shape, value.shape) else f"{match.root.name} has another shape than {match['x'].name}"


@rule(match=_normalized, needs=[known_width])
def recognise_rms_norm(match: Match, rewriter: Rewriter) -> None:
    x, node = match.node("x"), match.root
    dtype = node.meta["val"].dtype
    if x.meta["val"].dtype != dtype:
        x = rewriter.insert(torch.ops.aten._to_copy.default, x, before=node, dtype=dtype)
    width = int(x.meta["val"].shape[-1])
    new = rewriter.insert(_rms_norm, x, [width], None, match["eps"], before=node)
    rewriter.replace(node, new)
    rewriter.touch(node, "spelled-out RMS norm")


def _is_plain(node: object) -> bool:
    return isinstance(node, fx.Node) and operator(node) == "rms_norm" and arguments(node)["weight"] is None


def beside_vector(node: fx.Node, accepts: Callable[[object], bool]) -> Match | None:
    """Match a norm over the last axis that `accepts` knows, and a weight [D] or [1, ..., D], in either order."""
    named = arguments(node)
    for norm, weight in ((named["self"], named["other"]), (named["other"], named["self"])):
        if accepts(norm) and isinstance(weight, fx.Node) and is_floating(weight):
            width = arguments(norm)["normalized_shape"][-1]
            shape = static_shape(weight)
            if weight.op == "get_attr" and shape and shape == (1,) * (len(shape) - 1) + (width,):
                return Match(node, {"norm": norm, "weight": weight})
    return None


def _scaled(node: fx.Node) -> Match | None:
    return beside_vector(node, _is_plain) if operator(node) == "mul" else None


def one_dtype(match: Match, program: Program) -> str:
    """Norm, weight and product are of one type."""
    types = {part.meta["val"].dtype for part in (match.root, match.node("norm"), match.node("weight"))}
    return "" if len(types) == 1 else f"{match['weight'].target} and {match['norm'].name} are of different types"


@rule(match=_scaled, needs=[constant("weight"), one_dtype], worth=[sole_user("norm")])
def take_weight(match: Match, rewriter: Rewriter) -> None:
    weight, named = match.node("weight"), arguments(match.node("norm"))
    if weight.meta["val"].dim() > 1:
        weight = rewriter.edit(weight, "flatten", lambda value: value.flatten())
    new = rewriter.insert(
        _rms_norm,
        named["input"],
        named["normalized_shape"],
        weight,
        named["eps"],
        before=match.root,
        origin=[match.node("norm"), match.root],
    )
    rewriter.replace(match.root, new)
    rewriter.touch(match.root, "weight taken into the norm")


def _recast(node: fx.Node) -> Match | None:
    """Match to(rms_norm(to(x, wider)), type of x)."""
    if not is_cast(node) or not _is_plain(node.args[0]):
        return None
    norm = node.args[0]
    assert isinstance(norm, fx.Node)
    wide = arguments(norm)["input"]
    if not is_cast(wide) or not is_floating(wide.args[0]) or not is_floating(node):
        return None
    narrow, value = tensor_of(wide.args[0]), tensor_of(node)
    if narrow is None or value is None or narrow.dtype != value.dtype or wide.meta["val"].dtype != torch.float32:
        return None
    return Match(node, {"x": wide.args[0], "norm": norm})


@rule(match=_recast, worth=[sole_user("norm")])
def drop_casts(match: Match, rewriter: Rewriter) -> None:
    named = arguments(match.node("norm"))
    new = rewriter.insert(_rms_norm, match["x"], named["normalized_shape"], None, named["eps"], before=match.root)
    rewriter.replace(match.root, new)
    rewriter.touch(match.root, "casts around the norm dropped")


RULES = (recognise_rms_norm, take_weight, drop_casts)
