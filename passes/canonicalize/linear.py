"""Write every product with a weight matrix as `linear`.

    addmm(b, x, wᵀ)          ->  linear(x, w, b)
    addmm(b, x, w)           ->  linear(x, w', b)         w' = wᵀ, computed once
    mm(x, w), matmul(x, w)   ->  linear(x, w')            also x of more axes
    linear(x, w) + b         ->  linear(x, w, b)

Exact. One form, with the weight as [out, in], is all that folding and quantization need to know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, constant, floating, operator, rule, static_shape
from graphopt.ir.rules import sole_user
from graphopt.passes.canonicalize.operators import same_type, tensor_of, transposed_matrix

_NAMES = {"mm": ("self", "mat2"), "matmul": ("self", "other"), "addmm": ("mat1", "mat2")}


def _product(node: fx.Node) -> Match | None:
    names = _NAMES.get(operator(node))
    if names is None:
        return None
    named = arguments(node)
    x, matrix = named[names[0]], named[names[1]]
    source = transposed_matrix(matrix)
    weight = source if source is not None else matrix
    x_value, value = tensor_of(x), tensor_of(matrix)
    if x_value is None or value is None or value.dim() != 2 or x_value.dim() < 2 or not _holds_weight(weight):
        return None
    parts: dict[str, Any] = {"x": x, "weight": weight, "transposed": source is not None, "bias": named.get("self")}
    if operator(node) != "addmm":
        parts["bias"] = None
    return Match(node, parts | {"alpha": named.get("alpha", 1), "beta": named.get("beta", 1)})


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


RULES = (write_linear, add_bias)
