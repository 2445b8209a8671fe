"""Operators that work coordinate by coordinate."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.analysis.spaces.axes import Axis, copied, fresh
from graphopt.analysis.spaces.flow import Axes, Flow, broadcast, rule, sizes_of
from graphopt.analysis.spaces.symmetry import CENTER, DIAGONAL, GENERAL, LINEAR, MIXES, ORTHOGONAL, SIGN
from graphopt.ir.arguments import operator


def _first(named: dict[str, Any]) -> Any:
    return next(iter(named.values()))


@rule(
    "alias", "clone", "contiguous", "detach", "neg", "_to_copy", "to", "lift_fresh", "lift_fresh_copy",
    "dropout", "type_as", "conj", "real", "positive",
)  # fmt: skip
def linear_map(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """y = c x for one number c; a cast to integers or flags rounds."""
    axes = flow.of(_first(named))
    dtype = node.meta["val"].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        flow.pin_all(axes, "rounds to integers", LINEAR)
    return axes


@rule("relu", "leaky_relu")
def homogeneous(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """f(s x) = s f(x) for s > 0."""
    axes = flow.of(_first(named))
    flow.pin_all(axes, f"is {operator(node)}, which only positive scales pass", LINEAR & ~DIAGONAL)
    return axes


@rule("abs")
def absolute(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    return homogeneous(flow, node, named)


@rule("prelu")
def prelu(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Slopes [1], or [C] along axis 1: a weight that scales do not change."""
    axes = flow.of(named["self"])
    slope = flow.of(named["weight"])
    if slope and len(axes) > 1 and len(slope) == 1:
        flow.tie(axes[1], slope[0], 0)
    for axis in slope:
        flow.pin(axis, "holds slopes", LINEAR)
    flow.pin_all(axes, "is prelu, which only positive scales pass", LINEAR & ~DIAGONAL)
    return axes


@rule("tanh", "sin", "sinh", "asinh", "atan", "asin", "erf", "tan", "sign", "sgn")
def odd(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """f(-x) = -f(x)."""
    axes = flow.of(_first(named))
    flow.pin_all(axes, f"is {operator(node)}, which is not linear", LINEAR & ~SIGN)
    return axes


@rule(
    "silu", "gelu", "sigmoid", "exp", "exp2", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "cos",
    "cosh", "acos", "acosh", "atanh", "ceil", "floor", "round", "trunc", "frac", "hardswish", "hardsigmoid",
    "softplus", "mish", "elu", "selu", "celu", "log_sigmoid", "hardshrink", "softshrink",
    "threshold", "erfc", "square", "logical_not", "bitwise_not", "isnan", "isinf", "isfinite", "nan_to_num",
    "logit", "relu6", "hardtanh",
)  # fmt: skip
def nonlinear(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Anything else that is the same function for every coordinate."""
    axes = flow.of(_first(named))
    flow.pin_all(axes, f"is {operator(node)}, which is not linear", LINEAR)
    return axes


@rule("graphopt.quantize", "graphopt.dequantize", "graphopt.fake_quantize")
def quantization(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """The same function of every coordinate where one scale serves them all; other scales pin what they belong to."""
    axes = nonlinear(flow, node, named)
    own = [axis for name in ("scale", "zero_point", "table") for axis in flow.of(named.get(name))]
    if own or named["group_size"]:
        flow.pin_all([*axes, *own], "quantizes by scales of its own")
    return axes


@rule("clamp", "clamp_min", "clamp_max")
def clamp(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """A bound of 0 is homogeneous; any other may bind, and pins the scale."""
    low, high = (named.get("min"), named.get("max"))
    if all(bound is None or (isinstance(bound, int | float) and bound == 0) for bound in (low, high)):
        return homogeneous(flow, node, named)
    for bound in (low, high):
        if isinstance(bound, fx.Node):
            return elementwise(flow, node, named)
    return nonlinear(flow, node, named)


@rule("add", "sub", "rsub")
def addition(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Both operands undergo one change; what is the same for all coordinates of an axis pins it."""
    a, b, *_ = named.values()
    axes: Axes = []
    constant = not isinstance(b, fx.Node) and b != 0
    for holders in broadcast(flow, node, (a, b)):
        out = holders[0][1] if holders else []
        if len(holders) == 2:
            flow.tie(out, holders[1][1])
        elif constant or (isinstance(b, fx.Node) and isinstance(a, fx.Node)):
            flow.pin(out, "adds the same number to every coordinate", LINEAR)
        _bias_roles(flow, holders)
        axes.append(out)
    return axes


def _bias_roles(flow: Flow, holders: list[tuple[object, Axis]]) -> None:
    for operand, axis in holders:
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            flow.role(operand, next(i for i, own in enumerate(flow.of(operand)) if own is axis), "bias")


@rule("mul")
def multiplication(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    a, b = named["self"], named["other"]
    axes: Axes = []
    for holders in broadcast(flow, node, (a, b)):
        if len(holders) < 2:
            axes.append(holders[0][1] if holders else [])
        elif a is b:
            flow.pin(holders[0][1], "squares it", LINEAR)
            axes.append(holders[0][1])
        else:
            axes.append(_multiplied(flow, *holders))
    return axes


def _multiplied(flow: Flow, one: tuple[object, Axis], other: tuple[object, Axis]) -> Axis:
    for (_, x), (value, vector) in ((one, other), (other, one)):
        place = flow.weight_axis(value, vector)
        if place is not None:
            return scaled(flow, x, place, vector)
    x, y = one[1], other[1]
    if not flow.tie(x, y, 0):
        return x
    out = copied(x)
    flow.tie(x, out, 0)
    for axis in (x, y, out):
        flow.pin(axis, "multiplies two values elementwise", MIXES)
    flow.product(x, y, out)
    return out


def scaled(flow: Flow, x: Axis, place: tuple[fx.Node, int], vector: Axis) -> Axis:
    """Multiply by a weight vector, which absorbs a scale on either side."""
    if not flow.tie(x, vector, 0):
        return x
    out = copied(x)
    flow.tie(x, out, 0)
    flow.role(*place, "scale")
    for axis in (x, out):
        flow.pin(axis, f"multiplies each coordinate by its own weight ({place[0].target})", MIXES)
    flow.absorb(place, vector, x, out)
    return out


@rule("div", "true_divide")
def division(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """The numerator's change passes where the denominator is the same along the axis, or pinned."""
    a, b = named["self"], named["other"]
    if named.get("rounding_mode") is not None or not isinstance(a, fx.Node):
        return elementwise(flow, node, named)
    axes: Axes = []
    for holders in broadcast(flow, node, (a, b)):
        out = holders[0][1] if holders else []
        for operand, axis in holders:
            if operand is b:
                flow.pin(axis, "divides by it", LINEAR)
        if len(holders) == 2:
            flow.tie(out, holders[1][1], 0)
            flow.pin(out, "divides each coordinate by its own number", MIXES)
        axes.append(out)
    return axes


@rule(
    "maximum", "minimum", "pow", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__", "remainder", "floor_divide",
    "atan2", "fmod", "isclose", "addcmul", "addcdiv",
)  # fmt: skip
def elementwise(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Several operands, not linear in any."""
    axes: Axes = []
    for holders in broadcast(flow, node, [value for value in named.values() if isinstance(value, fx.Node)]):
        out = holders[0][1] if holders else []
        for _, axis in holders:
            flow.tie(out, axis, 0)
            flow.pin(axis, f"is {operator(node)}, which is not linear", LINEAR)
        axes.append(out)
    return axes


@rule("where", "masked_fill")
def selection(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """out = a where the mask holds, else b. Scales pass; mixing passes where the mask ignores the axis."""
    if operator(node) == "where":
        mask, *choices = named["condition"], named["self"], named["other"]
    else:
        mask, *choices = named["mask"], named["self"], named["value"]
    numbers = [value for value in choices if not flow.of(value)]
    filled = any(not (isinstance(value, int | float) and value == 0) for value in numbers)
    axes: Axes = []
    for holders in broadcast(flow, node, (mask, *choices)):
        chosen = [axis for operand, axis in holders if operand is not mask]
        out = chosen[0] if chosen else (holders[0][1] if holders else [])
        for axis in chosen[1:]:
            flow.tie(out, axis)
        if len(chosen) < 2 and (filled or len(numbers) < 1):
            flow.pin(out, "fills it with one number", LINEAR)
        for operand, axis in holders:
            if operand is mask:
                flow.tie(out, axis, 0)
                flow.pin(axis, "is a mask", LINEAR)
                flow.pin(out, "chooses coordinate by coordinate", ORTHOGONAL | GENERAL | CENTER)
        axes.append(out)
    return axes


@rule(
    "full_like", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "full", "zeros", "ones", "scalar_tensor", "empty",
)  # fmt: skip
def filled(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """A value that is the same everywhere."""
    axes = [fresh(size) for size in sizes_of(node)]
    flow.pin_all(axes, "is one number everywhere", LINEAR)
    return axes
