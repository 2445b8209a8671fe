"""Write every product with a weight matrix as `linear`.

    addmm(b, x, wᵀ)          ->  linear(x, w, b)
    addmm(b, x, w)           ->  linear(x, w', b)         w' = wᵀ, computed once
    mm(x, w), matmul(x, w)   ->  linear(x, w')            also x of more axes
    bmm(x, expand(w))        ->  linear(x, w')
    linear(x, w) + b         ->  linear(x, w, b)
    reshape(linear(reshape(x, [-1, in]), w, b), s)  ->  reshape(linear(x, w, b), s)

Exact. One form, with the weight as [out, in] and the axes of x as they are, is all that folding and quantization need
to know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, constant, floating, operator, rule, static_shape
from graphopt.ir.rules import sole_user
from graphopt.passes.canonicalize.operators import (
    same_size,
    same_sizes,
    same_type,
    tensor_of,
    transposed_matrix,
)

_NAMES = {"mm": ("self", "mat2"), "matmul": ("self", "other"), "addmm": ("mat1", "mat2"), "bmm": ("self", "mat2")}
_BROADCASTS = {"expand", "reshape", "view", "_unsafe_view", "unsqueeze", "clone"}


def _product(node: fx.Node) -> Match | None:
    names = _NAMES.get(operator(node))
    if names is None:
        return None
    named = arguments(node)
    x, matrix = named[names[0]], named[names[1]]
    if operator(node) == "bmm":
        matrix = _repeated_matrix(matrix)
    source = transposed_matrix(matrix)
    weight = source if source is not None else matrix
    x_value, value = tensor_of(x), tensor_of(matrix)
    if x_value is None or value is None or value.dim() != 2 or x_value.dim() < 2 or not _holds_weight(weight):
        return None
    parts: dict[str, Any] = {"x": x, "weight": weight, "transposed": source is not None, "bias": named.get("self")}
    if operator(node) != "addmm":
        parts["bias"] = None
    return Match(node, parts | {"alpha": named.get("alpha", 1), "beta": named.get("beta", 1)})


def _repeated_matrix(node: object) -> object:
    """Return the matrix that `node` [..., K, N] repeats along all axes but the last two, or the node itself."""
    start = node
    while operator(node) in _BROADCASTS:
        assert isinstance(node, fx.Node)
        value, source = tensor_of(node), tensor_of(node.args[0])
        if value is None or source is None or not same_sizes(value.shape[-2:], source.shape[-2:]):
            break
        node = node.args[0]
    value = tensor_of(node)
    return node if value is not None and value.dim() == 2 else start


def _holds_weight(node: fx.Node) -> bool:
    """A product of two activations is no linear layer."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def unscaled(match: Match, program: Program) -> str:
    """The two summands of addmm come as they are."""
    alpha, beta = match["alpha"], match["beta"]
    return "" if alpha == beta == 1 else f"{match.root.name} scales its summands by alpha={alpha} and beta={beta}"


def bias_by_output(match: Match, program: Program) -> str:
    """The bias holds one number for each output."""
    if match["bias"] is None:
        return ""
    value, bias = tensor_of(match.root), static_shape(match.node("bias"))
    assert value is not None
    if bias != (value.shape[-1],):
        return f"its summand {match['bias'].name} is {list(bias) if bias else 'no vector'}, not one number an output"
    return ""


@rule(match=_product, needs=[unscaled, floating("x", "weight"), bias_by_output])
def write_linear(match: Match, rewriter: Rewriter) -> None:
    weight = match.node("weight")
    if not match["transposed"]:
        weight = rewriter.edit(weight, "transpose", lambda value: value.t())
    new = rewriter.insert(torch.ops.aten.linear.default, match["x"], weight, match["bias"], before=match.root)
    rewriter.replace(match.root, new)
    rewriter.touch(match.root, f"{operator(match.root)} as linear")


def _added_bias(node: fx.Node) -> Match | None:
    if operator(node) != "add" or arguments(node).get("alpha") != 1:
        return None
    named = arguments(node)
    for product, bias in ((named["self"], named["other"]), (named["other"], named["self"])):
        if operator(product) == "linear" and arguments(product)["bias"] is None and tensor_of(bias) is not None:
            weight = tensor_of(arguments(product)["weight"])
            if weight is None or weight.dim() != 2 or not _is_row(bias, weight.shape[0]):
                continue
            if same_type(node, product):
                return Match(node, {"linear": product, "bias": bias})
    return None


def _is_row(bias: fx.Node, width: Any) -> bool:
    shape = static_shape(bias)
    return bias.op == "get_attr" and bool(shape) and shape == (1,) * (len(shape or ()) - 1) + (width,)


def same_dtype(match: Match, program: Program) -> str:
    """The bias is of the weight's type."""
    bias, product = match.node("bias"), match.node("linear")
    types = bias.meta["val"].dtype, product.meta["val"].dtype
    return "" if types[0] == types[1] else f"{bias.target} is of type {types[0]}, {product.name} of type {types[1]}"


@rule(match=_added_bias, needs=[constant("bias"), same_dtype], worth=[sole_user("linear")])
def add_bias(match: Match, rewriter: Rewriter) -> None:
    bias, named = match.node("bias"), arguments(match.node("linear"))
    if bias.meta["val"].dim() > 1:
        bias = rewriter.edit(bias, "flatten", lambda value: value.flatten())
    target = torch.ops.aten.linear.default
    new = rewriter.insert(
        target, named["input"], named["weight"], bias, before=match.root, origin=[match.node("linear"), match.root]
    )
    rewriter.replace(match.root, new)
    rewriter.touch(match.root, "summand taken as the bias")


def _flattened_linear(node: fx.Node) -> Match | None:
    """Match a linear that reads x as [-1, in], and whose result goes into reshapes only."""
    if operator(node) != "linear" or operator(arguments(node)["input"]) != "reshape":
        return None
    source = arguments(node)["input"].args[0]
    value, flat = tensor_of(source), tensor_of(arguments(node)["input"])
    if value is None or flat is None or value.dim() < 2 or not same_size(value.shape[-1], flat.shape[-1]):
        return None
    return Match(node, {"x": source}) if all(operator(user) == "reshape" for user in node.users) else None


@rule(match=_flattened_linear)
def keep_axes(match: Match, rewriter: Rewriter) -> None:
    node, named = match.root, arguments(match.root)
    new = rewriter.insert(torch.ops.aten.linear.default, match["x"], named["weight"], named["bias"], before=node)
    rewriter.replace(node, new)
    rewriter.touch(node, "linear over the axes that are there")


RULES = (write_linear, add_bias, keep_axes)
