"""Put back together what a decomposition took apart.

    native_batch_norm(x, ...)[0]                    ->  batch_norm(x, ...)          in eval mode; other spellings too
    native_layer_norm(x, ...)[0]                    ->  layer_norm(x, ...)
    native_group_norm(x, ...)[0]                    ->  group_norm(x, ...)
    max_pool2d_with_indices(x, ...)[0]              ->  max_pool2d(x, ...)          also 1-d and 3-d
    convolution(x, ..., transposed)                 ->  conv2d(x, ...) or conv_transpose2d(x, ...)
    conv2d(x, ..., padding="same")                  ->  conv2d(x, ..., padding=[1, 1])
    _softmax(x, d, False), _log_softmax(x, d, False) ->  softmax(x, d), log_softmax(x, d)
    _adaptive_avg_pool2d(x, s)                      ->  adaptive_avg_pool2d(x, s)
    clamp(x, 0, 0.5)                                ->  clamp(x, 0.0, 0.5)          exporters want bounds of one type

Exact: one operator under one name. A program that somebody decomposed before handing it over becomes the one that
capture makes of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, is_floating, operator, rule, static_shape
from graphopt.passes.canonicalize.operators import tensor_of

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...]]


def _batch_norm(named: dict[str, Any], node: fx.Node) -> Call | None:
    if named.get("training") or named.get("running_mean") is None:
        return None
    parts = (named[k] for k in ("input", "weight", "bias", "running_mean", "running_var"))
    return aten.batch_norm.default, (*parts, False, named["momentum"], named["eps"], False)


def _cudnn_batch_norm(named: dict[str, Any], node: fx.Node) -> Call | None:
    renamed = named | {"momentum": named.get("exponential_average_factor"), "eps": named.get("epsilon")}
    return _batch_norm(renamed, node)


def _layer_norm(named: dict[str, Any], node: fx.Node) -> Call | None:
    return aten.layer_norm.default, tuple(named[k] for k in ("input", "normalized_shape", "weight", "bias", "eps"))


def _group_norm(named: dict[str, Any], node: fx.Node) -> Call | None:
    return aten.group_norm.default, tuple(named[k] for k in ("input", "group", "weight", "bias", "eps"))


def _max_pool(named: dict[str, Any], node: fx.Node) -> Call | None:
    rank = operator(node).removeprefix("max_pool")[0]
    keys = ("self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return getattr(aten, f"max_pool{rank}d").default, tuple(named[k] for k in keys)


def _convolution(named: dict[str, Any], node: fx.Node) -> Call | None:
    weight = tensor_of(named["weight"])
    if weight is None or not 3 <= weight.dim() <= 5:
        return None
    rank = weight.dim() - 2
    keys = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    target = getattr(aten, f"conv{rank}d").default
    if named["transposed"]:
        keys = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
        target = getattr(aten, {1: "conv_transpose1d", 2: "conv_transpose2d", 3: "conv_transpose3d"}[rank])
        target = getattr(target, target.overloads()[0])
    return target, tuple(named[k] for k in keys)


def _named_padding(named: dict[str, Any], node: fx.Node) -> Call | None:
    weight = static_shape(named["weight"]) if isinstance(named["weight"], fx.Node) else None
    if not isinstance(named["padding"], str) or weight is None:
        return None
    rank = len(weight) - 2
    dilation = (list(named["dilation"]) * rank)[:rank]
    width = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
    if named["padding"] == "valid":
        width = [0] * rank
    if any(w % 2 for w in width):
        return None  # more on one side than on the other
    values = named | {"padding": [w // 2 for w in width]}
    keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return getattr(aten, operator(node)).default, tuple(values[k] for k in keys)


def _softmax(named: dict[str, Any], node: fx.Node) -> Call | None:
    if named["half_to_float"]:
        return None
    return getattr(aten, operator(node).removeprefix("_")).int, (named["self"], named["dim"])


def _adaptive_avg_pool(named: dict[str, Any], node: fx.Node) -> Call | None:
    return getattr(aten, operator(node).removeprefix("_")).default, (named["self"], named["output_size"])


def _clamp(named: dict[str, Any], node: fx.Node) -> Call | None:
    bounds = named["min"], named["max"]
    if {type(bound) for bound in bounds} != {int, float} or not is_floating(named["self"]):
        return None
    return aten.clamp.default, (named["self"], *(float(bound) for bound in bounds))


Builder = Callable[[dict[str, Any], fx.Node], Call | None]

# Operators of which only the first output has a meaning in eval mode, read by getitem.
_FIRST_OUTPUT: dict[str, Builder] = {
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "native_batch_norm": _batch_norm,
    "_batch_norm_no_update": _batch_norm,
    "cudnn_batch_norm": _cudnn_batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "max_pool2d_with_indices": _max_pool,
    "max_pool3d_with_indices": _max_pool,
}
_WHOLE: dict[str, Builder] = {
    "convolution": _convolution,
    "conv1d": _named_padding,
    "conv2d": _named_padding,
    "conv3d": _named_padding,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "clamp": _clamp,
    "_adaptive_avg_pool2d": _adaptive_avg_pool,
    "_adaptive_avg_pool3d": _adaptive_avg_pool,
}


def _decomposed(node: fx.Node) -> Match | None:
    name = operator(node)
    if name == "getitem" and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        source, builder = node.args[0], _FIRST_OUTPUT.get(operator(node.args[0]))
    else:
        source, builder = node, _WHOLE.get(name)
    call = builder(arguments(source), source) if builder is not None else None
    return Match(node, {"source": source, "call": call}) if call is not None else None


def sole_output(match: Match, program: Program) -> str:
    """Nobody reads another output of the operator; else it would be computed twice."""
    source = match.node("source")
    others = [user.name for user in source.users if user is not match.root]
    return f"{source.name} is also read by {', '.join(others)}" if others and source is not match.root else ""


@rule(match=_decomposed, worth=[sole_output])
def recompose(match: Match, rewriter: Rewriter) -> None:
    target, args = match["call"]
    source = match.node("source")
    new = rewriter.insert(target, *args, before=source, origin=[source])
    rewriter.replace(match.root, new)
    rewriter.touch(match.root, f"{operator(source)} as {operator(new)}")


RULES = (recompose,)
