"""Fold a batch norm into the linear operator that feeds it, or into those that it feeds.

    bn(conv(x, w, b))   ->  conv(x, w * s, b * s + t)                    s = gamma / sqrt(var + eps)
    conv(bn(x), w, b)   ->  conv(x, w * s, b + Σ w * t)                  t = beta - mean * s

s scales w along its output axis in the first form, along its input axis in the second. The same holds for transposed
convolutions and linears, with groups, and with permutations of axes between the two.

Exact. The second form needs every place to see all taps of the kernel: zeros that pad a convolution are not shifted,
and at the border of a transposed one fewer taps meet, so there t must be zero. Padding that repeats values (reflect,
replicate, circular) commutes with the norm. Runs before anything that quantizes w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from graphopt.ir import (
    Changes,
    Match,
    Program,
    Rewriter,
    Rule,
    apply_rules,
    arguments,
    constant,
    finite,
    floating,
    operator,
    rule,
)
from graphopt.passes.fold.affine import (
    Reader,
    bias_name,
    is_linear_operator,
    overflows,
    producer_of,
    readers_of,
    scale_outputs,
    shift_of_outputs,
    spread_over_inputs,
)
from graphopt.pipeline import Context, Pass

_STATISTICS = ("gamma", "beta", "mean", "var")


def _batch_norm(node: fx.Node) -> Match | None:
    if operator(node) != "batch_norm":
        return None
    named = arguments(node)
    if named["training"] or named["running_mean"] is None or named["running_var"] is None:
        return None
    parts = {"gamma": named["weight"], "beta": named["bias"], "x": named["input"], "eps": named["eps"]}
    return Match(node, parts | {"mean": named["running_mean"], "var": named["running_var"]})


def _after_linear(node: fx.Node) -> Match | None:
    match = _batch_norm(node)
    found = producer_of(match["x"], 1) if match is not None else None
    if match is None or found is None:
        return None
    named = arguments(found.node)
    return Match(node, match.parts | {"producer": found, "w": named["weight"], "b": named["bias"]})


def _before_linear(node: fx.Node) -> Match | None:
    match = _batch_norm(node)
    if match is None:
        return None
    readers = list(readers_of(node, 1))
    return Match(node, match.parts | {"readers": readers}) if any(is_linear_operator(r.node) for r in readers) else None


def affine(match: Match, rewriter: Rewriter | Program) -> tuple[Tensor, Tensor]:
    """Return s and t [C] of the batch norm in float64."""
    read = rewriter.value if isinstance(rewriter, Rewriter) else lambda node: rewriter.weight(node).detach().double()
    mean, var = read(match["mean"]), read(match["var"])
    scale = (var + match["eps"]).rsqrt()
    if match["gamma"] is not None:
        scale = scale * read(match["gamma"])
    shift = -mean * scale
    return scale, shift if match["beta"] is None else shift + read(match["beta"])


def positive_variance(match: Match, program: Program) -> str:
    """No variance is so far below zero that its root is undefined."""
    lowest = float(program.weight(match.node("var")).min()) + match["eps"]
    return "" if lowest > 0 else f"a variance of {match['var'].target} plus eps is {lowest:g}"


def same_axis(match: Match, program: Program) -> str:
    """The batch norm works along the axis that the operator writes."""
    return str(match["producer"].mismatch)


def one_dtype(match: Match, program: Program) -> str:
    """The batch norm returns the type that it reads."""
    types = match.root.meta["val"].dtype, match.node("x").meta["val"].dtype
    return "" if types[0] == types[1] else f"{match.root.name} turns {types[1]} into {types[0]}"


def product_fits(match: Match, program: Program) -> str:
    """The scaled weight and the new bias stay within their type."""
    scale, shift = affine(match, program)
    weight = program.weight(match.node("w")).detach()
    bias = float(program.weight(match["b"]).detach().abs().max()) if match["b"] is not None else 0.0
    largest = max(float(weight.abs().max()), bias) * float(scale.abs().max()) + float(shift.abs().max())
    return f"the folded weight would overflow {weight.dtype}" if overflows(largest, weight.dtype) else ""


def read_once(match: Match, program: Program) -> str:
    """Nobody else reads what the operator writes; otherwise it would be computed twice."""
    for node in match["producer"].path:
        if len(node.users) > 1:
            return f"{node.name} is read by {len(node.users)} nodes ({', '.join(user.name for user in node.users)})"
    return ""


def every_reader_absorbs(match: Match, program: Program) -> str:
    """Each reader is a linear operator that takes scale and shift in; else the batch norm would stay for the others."""
    _, shift = affine(match, program)
    unshifted = not bool(shift.any())
    return next((reason for reader in match["readers"] if (reason := reader.refusal(program, unshifted))), "")


def _key(match: Match) -> str:
    """Name the edit: uses of a shared weight beside the same batch norm share the result."""
    names = [str(match[name].target) if match[name] is not None else "none" for name in _STATISTICS]
    return f"batch norm {' '.join(names)} {match['eps']}"


@rule(
    match=_after_linear,
    needs=[
        constant("w", "b", *_STATISTICS),
        floating("w", "x"),
        same_axis,
        one_dtype,
        finite("w", "b", *_STATISTICS),
        positive_variance,
        product_fits,
    ],
    worth=[read_once],
)
def fold_into_producer(match: Match, rewriter: Rewriter) -> None:
    node, w, b = match["producer"].node, match.node("w"), match["b"]
    scale, shift = affine(match, rewriter)
    key = f"after by {_key(match)}"

    def folded_bias() -> fx.Node:
        value = shift if b is None else rewriter.value(b) * scale + shift
        dtype = rewriter.program.weight(w if b is None else b).dtype
        return rewriter.weight(value, bias_name(w), dtype, b)

    weight = rewriter.edit(w, key, lambda value: scale_outputs(node, value, scale))
    bias = rewriter.once(w if b is None else b, f"bias {key}", folded_bias)
    rewriter.rewire(node, weight=weight, bias=bias)
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, f"folded into {node.name}")


@rule(
    match=_before_linear,
    needs=[
        constant(*_STATISTICS),
        floating("x"),
        one_dtype,
        finite(*_STATISTICS),
        positive_variance,
        every_reader_absorbs,
    ],
)
def fold_into_readers(match: Match, rewriter: Rewriter) -> None:
    scale, shift = affine(match, rewriter)
    for reader in match["readers"]:
        _absorb(reader, scale, shift, _key(match), rewriter)
    rewriter.replace(match.root, match.node("x"))
    rewriter.touch(match.root, "folded into " + ", ".join(reader.node.name for reader in match["readers"]))


def _absorb(reader: Reader, scale: Tensor, shift: Tensor, key: str, rewriter: Rewriter) -> None:
    node, named = reader.node, arguments(reader.node)
    w, b = named["weight"], named["bias"]
    scale, shift = scale.repeat_interleave(reader.repeat), shift.repeat_interleave(reader.repeat)
    # Convolutions that share a weight may divide it into groups differently.
    key = f"before by {key} {reader.repeat} {named.get('groups', 1)}"

    def shifted_bias() -> fx.Node:
        value = shift_of_outputs(node, rewriter.value(w), shift)
        dtype = rewriter.program.weight(w if b is None else b).dtype
        return rewriter.weight(value if b is None else rewriter.value(b) + value, bias_name(w), dtype, b)

    weight = rewriter.edit(w, key, lambda value: value * spread_over_inputs(node, value, scale))
    bias = b
    if bool(shift.any()):
        bias = rewriter.once(w if b is None else b, f"bias {key} {w.target}", shifted_bias)
    rewriter.rewire(node, weight=weight, bias=bias)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Remove the batch norms that follow or precede a convolution or a linear layer."""

    rules: ClassVar[tuple[Rule, ...]] = (fold_into_producer, fold_into_readers)

    def run(self, program: Program, context: Context) -> Changes:
        rewriter = Rewriter(program, self.name)
        apply_rules(self.rules, rewriter)
        looked_at = {site.node for site in rewriter.changes.skipped}
        for node in program.graph.nodes:
            if "batch_norm" in operator(node) and node.users and node.name not in looked_at:
                rewriter.decline(node, _left_alone(node))
        return rewriter.finish()


def _left_alone(node: fx.Node) -> str:
    match = _batch_norm(node)
    if match is None:
        return "it normalises by the statistics of its batch"
    readers = ", ".join(user.name for user in node.users)
    return f"no linear operator is next to it: it reads {match['x'].name} and is read by {readers}"
