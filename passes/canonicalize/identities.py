"""Drop what returns its input.

    dropout(x, train=False)                         ->  x
    clone(x), contiguous(x), alias(x), detach(x)    ->  x
    to(x, dtype of x)                               ->  x
    to(to(x, wider), dtype)                         ->  to(x, dtype)
    view(x, shape of x), expand, slice, squeeze     ->  x
    x * 1, x / 1, x + 0, x - 0, x ** 1              ->  x                 of the same dtype and shape
    x + c                                           ->  x + 0.5           c a buffer of no axes that holds 0.5
    attention(q, k, v, mask)                        ->  attention(q, k, v)      a constant mask that hides nothing

Exact. A copy stays where somebody looks at its memory layout: the caller, or an operator such as view_as_complex. What
a caller gets stays a tensor apart from inputs and weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir import Match, Program, Rewriter, arguments, operator, rule
from graphopt.passes.canonicalize.operators import (
    is_aten,
    is_cast,
    is_returned,
    reads_strides,
    same_type,
    tensor_of,
)

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_COPIES = {
    "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "positive", "_to_copy", "to", "type_as",
}  # fmt: skip
_RESHAPES = {
    "expand", "expand_as", "broadcast_to", "view", "reshape", "_unsafe_view", "flatten", "squeeze", "slice", "narrow",
    "repeat",
}  # fmt: skip
_VIEWS = {
    "expand",
    "expand_as",
    "permute",
    "transpose",
    "t",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "view",
    "reshape",
}
_NEUTRAL = {"mul": 1, "div": 1, "true_divide": 1, "add": 0, "sub": 0, "pow": 1}
# A float of the first type holds every value of the second.
_LOSSLESS = {
    torch.float64: {torch.float32, torch.float16, torch.bfloat16},
    torch.float32: {torch.float16, torch.bfloat16},
    torch.int64: {torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool},
    torch.int32: {torch.int16, torch.int8, torch.uint8, torch.bool},
    torch.int16: {torch.int8, torch.uint8, torch.bool},
}


def stays_apart(match: Match, program: Program) -> str:
    """Nothing that the program returns becomes an input or a weight itself."""
    source = match.node("x")
    if source.op != "call_function" and is_returned(match.root):
        return f"the program returns it, and would return {source.name} itself"
    return ""


def layout_is_free(match: Match, program: Program) -> str:
    """Nobody looks at how the copy lies in memory, or it lies as its source does."""
    node = match.root
    if arguments(node).get("memory_format") in (None, torch.preserve_format) and not _overlaps(match.node("x")):
        return ""
    return who_reads_layout(node, program)


def who_reads_layout(node: fx.Node, program: Program) -> str:
    """Say who looks at the memory layout of `node`, or may; an empty string where nobody does."""
    if is_returned(node):
        return "the caller gets its memory layout"
    reader = next((other for other in program.graph.nodes if reads_strides(other)), None)
    return f"{reader.name} looks at memory layouts" if reader is not None else ""


def _overlaps(node: fx.Node) -> bool:
    """True where several elements of the value may lie in one place."""
    while operator(node) in _VIEWS:
        if operator(node).startswith("expand"):
            return True
        node = node.all_input_nodes[0]
    return False


def _first_input(node: fx.Node) -> Match | None:
    source = node.args[0] if node.args else None
    return Match(node, {"x": source}) if isinstance(source, fx.Node) else None


def _dropout(node: fx.Node) -> Match | None:
    source = node.args[0] if operator(node) == "getitem" and node.args[1] == 0 else node
    if not isinstance(source, fx.Node) or operator(source) not in (_DROPOUTS if source is node else {"native_dropout"}):
        return None
    named = arguments(source)
    return Match(node, {"x": named["input"]}) if named.get("train") is False or named.get("p") == 0 else None


@rule(match=_dropout, needs=[stays_apart])
def drop_dropout(match: Match, rewriter: Rewriter) -> None:
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, "dropout in eval mode dropped")


def _copy(node: fx.Node) -> Match | None:
    if operator(node) not in _COPIES:
        return None
    match = _first_input(node)
    return match if match is not None and same_type(node, match["x"]) else None


@rule(match=_copy, needs=[stays_apart, layout_is_free])
def drop_copy(match: Match, rewriter: Rewriter) -> None:
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, "copy dropped")


def _cast_of_cast(node: fx.Node) -> Match | None:
    if not is_cast(node) or not is_cast(node.args[0]):
        return None
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    source, between, value = tensor_of(inner.args[0]), tensor_of(inner), tensor_of(node)
    if source is None or between is None or value is None or source.dtype not in _LOSSLESS.get(between.dtype, set()):
        return None
    return Match(node, {"x": inner.args[0], "dtype": value.dtype})


@rule(match=_cast_of_cast)
def merge_casts(match: Match, rewriter: Rewriter) -> None:
    direct = rewriter.insert(torch.ops.aten._to_copy.default, match["x"], before=match.root, dtype=match["dtype"])
    rewriter.replace(match.root, direct)
    rewriter.touch(match.root, "casts merged")


def _same_shape(node: fx.Node) -> Match | None:
    if operator(node) not in _RESHAPES:
        return None
    match = _first_input(node)
    return match if match is not None and same_type(node, match["x"]) else None


@rule(match=_same_shape, needs=[stays_apart])
def drop_reshape(match: Match, rewriter: Rewriter) -> None:
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, f"{operator(match.root)} to the shape it has dropped")


def _no_padding(node: fx.Node) -> Match | None:
    if operator(node) not in ("pad", "constant_pad_nd"):
        return None
    pads = arguments(node)["pad"]
    return _first_input(node) if all(isinstance(p, int) and p == 0 for p in pads) else None


@rule(match=_no_padding, needs=[stays_apart])
def drop_padding(match: Match, rewriter: Rewriter) -> None:
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, "padding of no width dropped")


def _neutral(node: fx.Node) -> Match | None:
    neutral = _NEUTRAL.get(operator(node))
    if neutral is None or not is_aten(node):
        return None
    named = arguments(node)
    other = named.get("exponent" if operator(node) == "pow" else "other")
    if isinstance(other, fx.Node | bool) or other != neutral or named.get("rounding_mode") is not None:
        return None
    match = _first_input(node)
    return match if match is not None and same_type(node, match["x"]) else None


@rule(match=_neutral, needs=[stays_apart])
def drop_neutral(match: Match, rewriter: Rewriter) -> None:
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, f"{operator(match.root)} by a neutral number dropped")


def _buffer_of_no_axes(node: fx.Node) -> Match | None:
    if operator(node) not in ("mul", "div", "add", "sub") or not is_aten(node):
        return None
    named = arguments(node)
    for name, other in (("other", "self"), ("self", "other")):
        part, rest = named[name], named[other]
        value, beside = tensor_of(part), tensor_of(rest)
        if value is None or beside is None or value.dim() > 0 or beside.dim() == 0 or part.op != "get_attr":
            continue
        if name == "self" and operator(node) not in ("mul", "add"):
            continue  # a number can stand on the left of a commuting operator only, on its right
        if name == "self" and named.get("alpha", 1) != 1:
            continue
        return Match(node, {"number": part, "x": rest})
    return None


def not_a_parameter(match: Match, program: Program) -> str:
    """The number is no parameter: those can be trained."""
    node = match.node("number")
    return f"{node.target} is a parameter" if isinstance(program.weight(node), nn.Parameter) else ""


def keeps_type(match: Match, program: Program) -> str:
    """A Python number promotes like the tensor: float beside float, integer beside integer."""
    number, x = tensor_of(match["number"]), tensor_of(match["x"])
    assert number is not None and x is not None
    if number.is_floating_point() != x.is_floating_point() or number.dtype == torch.bool or number.is_complex():
        return f"{match['number'].target} is of type {number.dtype}, beside {x.dtype}"
    if not math.isfinite(float(program.weight(match.node("number")))):
        return f"{match['number'].target} is not finite"
    return ""


@rule(match=_buffer_of_no_axes, needs=[not_a_parameter, keeps_type])
def write_number(match: Match, rewriter: Rewriter) -> None:
    node = match.root
    value: Any = rewriter.value(match.node("number")).item()
    extra = {"alpha": arguments(node)["alpha"]} if arguments(node).get("alpha", 1) != 1 else {}
    if arguments(node).get("rounding_mode") is not None:
        extra["rounding_mode"] = arguments(node)["rounding_mode"]
    new = rewriter.insert(node.target, match["x"], value, before=node, **extra)
    rewriter.replace(node, new)
    rewriter.touch(node, f"reads the number {value!r}")


def _constant_mask(node: fx.Node) -> Match | None:
    if operator(node) != "scaled_dot_product_attention":
        return None
    mask = arguments(node).get("attn_mask")
    return Match(node, {"mask": mask}) if isinstance(mask, fx.Node) and mask.op == "get_attr" else None


def hides_nothing(match: Match, program: Program) -> str:
    """The mask is no parameter, and lets everything through; one of numbers adds zeros."""
    mask = program.weight(match.node("mask"))
    if isinstance(mask, nn.Parameter):
        return f"{match['mask'].target} is a parameter"
    return "" if bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all()) else "the mask hides something"


@rule(match=_constant_mask, needs=[hides_nothing])
def drop_open_mask(match: Match, rewriter: Rewriter) -> None:
    rewriter.rewire(match.root, attn_mask=None)
    rewriter.touch(match.root, "a mask that hides nothing dropped")


RULES = (
    drop_dropout,
    drop_copy,
    merge_casts,
    drop_reshape,
    drop_padding,
    drop_neutral,
    write_number,
    drop_open_mask,
)
