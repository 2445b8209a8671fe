"""Recognise a spelled-out GELU.

    x * 0.5 * (1 + erf(x / sqrt(2)))                                    ->  gelu(x)
    0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x³)))              ->  gelu(x, approximate="tanh")
    x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 * x³))                   ->  gelu(x, approximate="tanh")

Exact over the reals, if the constants are exact: x * sigmoid(1.702 x) is another function, and stays. However the
factors are arranged, both the argument of erf and the product around it are polynomials in x (and erf), and these are
compared. Casts between floating types are looked through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, is_floating, operator, rule
from graphopt.passes.canonicalize.operators import same_sizes, tensor_of, uncast

# Powers of (x, f) to coefficients, where f is erf, tanh or sigmoid of something.
Polynomial = dict[tuple[int, int], float]

_ARITHMETIC = {"add", "sub", "mul", "div", "neg", "pow", "square", "_to_copy", "to"}
_DEEPEST = 8
_CUBIC = 0.044715
_TANH = math.sqrt(2 / math.pi)
_HALVES: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
# function -> (its argument, the product around it, the argument of gelu called approximate)
_FORMS: dict[str, tuple[Polynomial, Polynomial, str]] = {
    "erf": ({(1, 0): math.sqrt(0.5)}, _HALVES, "none"),
    "tanh": ({(1, 0): _TANH, (3, 0): _TANH * _CUBIC}, _HALVES, "tanh"),
    "sigmoid": ({(1, 0): 2 * _TANH, (3, 0): 2 * _TANH * _CUBIC}, {(1, 1): 1.0}, "tanh"),
}
# Relative. A constant written with nine digits, like 0.797884561, passes; a float32 one does not.
_TOLERANCE = 2e-9
_SIMILAR = 1e-2


def polynomial(value: object, atoms: tuple[object, ...], depth: int = _DEEPEST) -> Polynomial | None:
    """Return `value` as a polynomial in the atoms x and f (both nodes), or None where it is none of degree up to 3."""
    value = uncast(value)
    if value in atoms:
        return {(1, 0): 1.0} if value is atoms[0] else {(0, 1): 1.0}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {(0, 0): float(value)}
    if not isinstance(value, fx.Node) or depth == 0 or operator(value) not in _ARITHMETIC:
        return None
    named = arguments(value)
    if named.get("alpha", 1) != 1 or named.get("rounding_mode") is not None:
        return None
    parts = [polynomial(part, atoms, depth - 1) for part in list(named.values())[:2]]
    first = parts[0]
    if first is None:
        return None
    match operator(value):
        case "neg":
            return _scaled(first, -1)
        case "square":
            return _product(first, first)
        case "_to_copy" | "to":
            return None
    second = parts[1] if len(parts) > 1 else None
    if second is None:
        return None
    constant = second.get((0, 0), 0.0) if set(second) <= {(0, 0)} else None
    match operator(value):
        case "add":
            return _sum(first, second)
        case "sub":
            return _sum(first, _scaled(second, -1))
        case "mul":
            return _product(first, second)
        case "div":
            return _scaled(first, 1 / constant) if constant else None
        case "pow":
            return _power(first, constant)
    return None


def _sum(one: Polynomial, other: Polynomial) -> Polynomial:
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in one | other}


def _scaled(one: Polynomial, factor: float) -> Polynomial:
    return {key: value * factor for key, value in one.items()}


def _product(one: Polynomial | None, other: Polynomial) -> Polynomial | None:
    if one is None:
        return None
    result: Polynomial = {}
    for (a, b), left in one.items():
        for (c, d), right in other.items():
            if a + c > 3 or b + d > 1:
                return None
            result[a + c, b + d] = result.get((a + c, b + d), 0.0) + left * right
    return result


def _power(one: Polynomial, exponent: float | None) -> Polynomial | None:
    if exponent not in (1, 2, 3):
        return None
    result: Polynomial | None = one
    for _ in range(int(exponent) - 1):
        result = _product(result, one)
    return result


def deviation(found: Polynomial | None, wanted: Polynomial) -> float:
    """Return the largest relative difference of two polynomials' coefficients; infinite where their terms differ."""
    if found is None:
        return math.inf
    terms = {key: value for key, value in found.items() if value != 0.0}
    if set(terms) != set(wanted):
        return math.inf
    return max(abs(terms[key] - wanted[key]) / abs(wanted[key]) for key in wanted)


def _readers(function: fx.Node) -> Iterator[fx.Node]:
    """Yield calls of arithmetic that are computed from the function, near ones first."""
    front, seen = [function], {function}
    for _ in range(_DEEPEST):
        front = [user for node in front for user in node.users if operator(user) in _ARITHMETIC and user not in seen]
        seen.update(front)
        yield from front


def _sources(value: object) -> Iterator[fx.Node]:
    """Yield what a value is computed from by arithmetic, near ones first."""
    front = [uncast(value)]
    for _ in range(_DEEPEST):
        nodes = [node for node in front if isinstance(node, fx.Node)]
        yield from nodes
        front = [uncast(part) for node in nodes if operator(node) in _ARITHMETIC for part in node.args]


def _gelu(node: fx.Node) -> Match | None:
    """Match from the erf, tanh or sigmoid: `output` is the product, `x` its argument."""
    form = _FORMS.get(operator(node))
    if form is None or not is_floating(node):
        return None
    argument, product, approximate = form
    for x in dict.fromkeys(_sources(node.args[0])):
        inner = deviation(polynomial(node.args[0], (x, None)), argument)
        if inner > _SIMILAR:
            continue
        for output in _readers(node):
            outer = deviation(polynomial(output, (x, node)), product)
            if outer <= _SIMILAR and operator(output) in ("mul", "div", "add"):
                parts: dict[str, Any] = {"x": x, "output": output, "approximate": approximate}
                return Match(node, parts | {"deviation": max(inner, outer)})
    return None


def exact_constants(match: Match, program: Program) -> str:
    """The constants are those of GELU, as far as float64 tells."""
    if match["deviation"] <= _TOLERANCE:
        return ""
    return f"its constants differ from those of GELU by {match['deviation']:.0e}, which would change the function"


def keeps_shape(match: Match, program: Program) -> str:
    """The result has the shape of x."""
    x, output = tensor_of(match["x"]), tensor_of(match["output"])
    assert x is not None and output is not None
    if same_sizes(x.shape, output.shape):
        return ""
    return f"{match['output'].name} has another shape than {match['x'].name}"


@rule(match=_gelu, needs=[exact_constants, keeps_shape])
def recognise_gelu(match: Match, rewriter: Rewriter) -> None:
    x, output = match.node("x"), match.node("output")
    dtype = output.meta["val"].dtype
    origin = [output, match.root]
    if x.meta["val"].dtype != dtype:
        x = rewriter.insert(torch.ops.aten._to_copy.default, x, before=output, origin=origin, dtype=dtype)
    extra = {} if match["approximate"] == "none" else {"approximate": match["approximate"]}
    new = rewriter.insert(torch.ops.aten.gelu.default, x, before=output, origin=origin, **extra)
    rewriter.replace(output, new)
    rewriter.touch(output, f"spelled-out GELU ({operator(match.root)} form)")


RULES = (recognise_gelu,)
