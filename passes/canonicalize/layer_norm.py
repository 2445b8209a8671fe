"""Recognise a spelled-out layer norm.

    rms_norm(x - mean(x, -1), w)        ->  layer_norm(x, w)         the RMS norm itself may have been spelled out
    layer_norm(x) * w                   ->  layer_norm(x, w)         w: [D] or [1, ..., D]
    layer_norm(x, w) + b                ->  layer_norm(x, w, b)      b alike

Exact over the reals.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir import Match, Rewriter, arguments, operator, rule
from graphopt.ir.rules import constant, sole_user
from graphopt.passes.canonicalize.operators import uncast
from graphopt.passes.canonicalize.rms_norm import beside_vector, one_dtype

_layer_norm = torch.ops.aten.layer_norm.default


def _centered(node: fx.Node) -> Match | None:
    """Match rms_norm(x - mean(x, -1, keepdim)) over the last axis."""
    if operator(node) != "rms_norm" or len(arguments(node)["normalized_shape"]) != 1:
        return None
    difference = arguments(node)["input"]
    if operator(difference) != "sub" or arguments(difference).get("alpha", 1) != 1:
        return None
    x, mean = arguments(difference)["self"], arguments(difference)["other"]
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node) or operator(mean) != "mean":
        return None
    named, rank = arguments(mean), x.meta["val"].dim()
    dims = named.get("dim") or []
    over_last = named.get("keepdim") and [dim % rank for dim in dims] == [rank - 1]
    if not over_last or uncast(named["self"]) is not uncast(x) or x.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return Match(node, {"x": x, "difference": difference})


@rule(match=_centered)
def recognise_layer_norm(match: Match, rewriter: Rewriter) -> None:
    named = arguments(match.root)
    eps = named["eps"]
    if eps is None:  # of an RMS norm: the type's own
        eps = torch.finfo(match.root.meta["val"].dtype).eps
    call = match["x"], named["normalized_shape"], named["weight"], None, eps
    origin = [match.node("difference"), match.root]
    rewriter.replace(match.root, rewriter.insert(_layer_norm, *call, before=match.root, origin=origin))
    rewriter.touch(match.root, "spelled-out layer norm")


def _lacks(norm: object, *parts: str) -> bool:
    if not isinstance(norm, fx.Node) or operator(norm) != "layer_norm":
        return False
    named = arguments(norm)
    return len(named["normalized_shape"]) == 1 and all(named.get(part) is None for part in parts)


def _scaled(node: fx.Node) -> Match | None:
    return beside_vector(node, lambda norm: _lacks(norm, "weight", "bias")) if operator(node) == "mul" else None


def _shifted(node: fx.Node) -> Match | None:
    if operator(node) != "add" or arguments(node).get("alpha", 1) != 1:
        return None
    return beside_vector(node, lambda norm: _lacks(norm, "bias"))


@rule(match=_scaled, needs=[constant("weight"), one_dtype], worth=[sole_user("norm")])
def take_layer_norm_weight(match: Match, rewriter: Rewriter) -> None:
    _take(match, "weight", rewriter)


@rule(match=_shifted, needs=[constant("weight"), one_dtype], worth=[sole_user("norm")])
def take_layer_norm_bias(match: Match, rewriter: Rewriter) -> None:
    _take(match, "bias", rewriter)


def _take(match: Match, part: str, rewriter: Rewriter) -> None:
    vector, named = match.node("weight"), dict(arguments(match.node("norm")))
    if vector.meta["val"].dim() > 1:
        vector = rewriter.edit(vector, "flatten", lambda value: value.flatten())
    named[part] = vector
    call = (named[key] for key in ("input", "normalized_shape", "weight", "bias", "eps"))
    origin = [match.node("norm"), match.root]
    rewriter.replace(match.root, rewriter.insert(_layer_norm, *call, before=match.root, origin=origin))
    rewriter.touch(match.root, f"{part} taken into the norm")


RULES = (recognise_layer_norm, take_layer_norm_weight, take_layer_norm_bias)
