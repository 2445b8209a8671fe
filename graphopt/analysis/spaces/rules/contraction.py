"""Products of matrices, in all the forms that ATen has: one `contract` serves them.

Axes carry labels. A label in two operands and not in the output is contracted: the two axes are duals. One that the
output keeps from a single operand is handed on. One in both operands and the output is a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphopt.analysis.spaces.axes import Axis, fresh, size_of, take
from graphopt.analysis.spaces.flow import Axes, Flow, rule, shape_of, unknown
from graphopt.analysis.spaces.rules.pointwise import scaled
from graphopt.analysis.spaces.symmetry import ALL, CENTER, LINEAR


def contract(flow: Flow, operands: Sequence[tuple[object, Axes, Sequence[str]]], out: Sequence[str]) -> Axes:
    """Return the output's axes of an einsum; operands are (node, axes, labels)."""
    holders: dict[str, list[tuple[object, int, Axis]]] = {}
    for value, axes, labels in operands:
        for dim, (axis, label) in enumerate(zip(axes, labels, strict=True)):
            if axis:
                holders.setdefault(label, []).append((value, dim, axis))
    contracted: list[Axis] = []
    for label, held in holders.items():
        axes_held = [axis for _, _, axis in held]
        if label in out:
            for value, dim, _ in held:
                flow.role(value, dim, "writes")
            for axis in axes_held[1:]:
                flow.tie(axes_held[0], axis, 0)
            if len(held) > 1:
                flow.pin_all(axes_held, "is a batch of products over it", LINEAR)
            continue
        contracted += axes_held[:1]
        for value, dim, _ in held:
            flow.role(value, dim, "reads")
        if len(held) == 2:
            flow.tie(axes_held[0], axes_held[1], ALL & ~CENTER, dual=True)
            flow.pin_all(axes_held, "reads it without removing the mean", CENTER)
            for (value, _, axis), (partner, _, _) in (held, held[::-1]):
                flow.read(value, partner, axis)
        else:
            for axis in axes_held[1:]:
                flow.tie(axes_held[0], axis, 0)
            flow.pin_all(axes_held, "sums over it", LINEAR)
    result = [holders[label][0][2] if label in holders else [] for label in out]
    flow.mix(contracted, result)
    # q[h] k[g]^T adds up products of every h with every g: the change of what it adds up depends on neither.
    flow.mix([held[0][2] for label, held in holders.items() if label in out and len(held) == 1], contracted)
    return result


def _biased(flow: Flow, axis: Axis, bias: object) -> None:
    own = flow.of(bias)
    if own:
        flow.role(bias, 0, "bias")
        flow.tie(axis, own[-1])


def _numbered(count: int, prefix: str = "b") -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


@rule("linear")
def linear(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """x [..., k], weight [n, k] or [k]."""
    x, weight = flow.of(named["input"]), flow.of(named["weight"])
    batch = _numbered(len(x) - 1)
    out = ["n"] if len(weight) == 2 else []
    axes = contract(flow, [(named["input"], x, [*batch, "k"]), (named["weight"], weight, [*out, "k"])], [*batch, *out])
    if out:
        _biased(flow, axes[-1], named.get("bias"))
    return axes


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    a, b, *_ = named.values()
    return _matmul(flow, a, b)


def _matmul(flow: Flow, a: Any, b: Any) -> Axes:
    left, right = flow.of(a), flow.of(b)
    rows, columns = ["m"] * (len(left) > 1), ["n"] * (len(right) > 1)
    rank = max(len(left), len(right), 2) - 2
    batch = _numbered(rank)
    of_left, of_right = batch[rank - max(len(left) - 2, 0) :], batch[rank - max(len(right) - 2, 0) :]
    return contract(
        flow,
        [(a, left, [*of_left, *rows, "k"]), (b, right, [*of_right, "k", *columns])],
        [*batch, *rows, *columns],
    )


@rule("outer")
def outer(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    a, b = named["self"], named["vec2"]
    return contract(flow, [(a, flow.of(a), ["m"]), (b, flow.of(b), ["n"])], ["m", "n"])


@rule("addmm", "baddbmm", "addmv")
def addmm(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """bias + a b, with numbers before both."""
    bias, a, b, *_ = named.values()
    axes = _matmul(flow, a, b)
    own = flow.of(bias)
    for axis, bias_axis in zip(axes[len(axes) - len(own) :], own, strict=True):
        if bias_axis:
            flow.tie(axis, bias_axis)
        else:
            flow.pin(axis, "adds the same number to every coordinate", LINEAR)
    for axis in axes[: len(axes) - len(own)]:
        flow.pin(axis, "adds the same numbers to every coordinate", LINEAR)
    if len(own) == 1:
        flow.role(bias, 0, "bias")
    return axes


@rule("einsum")
def einsum(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    equation, tensors = str(named["equation"]).replace(" ", ""), list(named["tensors"])
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    repeated = any(len(set(term)) != len(term) for term in terms)
    if "." in equation or not arrow or len(terms) != len(tensors) or repeated or len(tensors) > 2:
        outputs = unknown(flow, node, named)
        assert isinstance(outputs, list)
        return outputs
    return contract(
        flow, [(value, flow.of(value), list(term)) for value, term in zip(tensors, terms, strict=True)], list(output)
    )


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """x [N?, C, *space]; weight [O, C/g, *taps], transposed [C, O/g, *taps]."""
    x, weight, groups = flow.of(named["input"]), flow.of(named["weight"]), named["groups"]
    transposed = named.get("output_padding") is not None
    channel = len(x) - len(weight) + 1  # 0 where there is no batch axis
    flow.pin_all(weight[2:], "are the taps of a convolution")
    flow.pin_all(x[channel + 1 :], "moves a window over it")
    space = [flow.pinned(size, "is where a convolution writes") for size in shape_of(node)[channel + 1 :]]
    read, written = x[channel], weight[1 if transposed else 0]
    if groups == 1:
        labels = ["k", "n"] if transposed else ["n", "k"]
        made = contract(
            flow, [(named["input"], [read], ["k"]), (named["weight"], weight[:2], labels)], ["n"]
        )
        out = made[0]
        flow.mix([read], [out, *x[:channel]])
    else:
        out = _grouped(flow, node, named, read, written, transposed)
    _biased(flow, out, named.get("bias"))
    return [*x[:channel], out, *space]


def _grouped(flow: Flow, node: fx.Node, named: dict[str, Any], read: Axis, wrote: Axis, transposed: bool) -> Axis:
    """Channels are [groups, each]: a batch of products, or one number a channel where `each` is 1."""
    weight, groups = named["weight"], named["groups"]
    axes = flow.of(weight)
    whole, inner = axes[0], axes[1]
    if not inner and shape_of(weight)[0] == groups and not transposed:
        flow.tie(read, whole, 0)
        place = flow.weight_axis(weight, whole)
        if place is not None:
            return scaled(flow, read, place, whole)
        flow.pin_all([read, whole], "multiplies each channel by its own numbers", LINEAR)
        return whole
    size = (groups, ())
    parts, weights = take(read, size), take(whole, size)
    if parts is None or weights is None:
        flow.pin_all([read, whole, inner], "is grouped across its parts")
        return flow.pinned(shape_of(node)[len(shape_of(node)) - len(axes) + 1], "is grouped across its parts")
    (group, each), (weight_group, weight_each) = parts, weights
    flow.tie(group, weight_group, 0)
    flow.pin_all([group, weight_group], "is a batch of products over it", LINEAR)
    reads, writes = (weight_each, inner) if transposed else (inner, weight_each)
    flow.role(weight, 0 if transposed else 1, "reads")
    flow.role(weight, 1 if transposed else 0, "writes")
    flow.tie(each, reads, ALL & ~CENTER, dual=True)
    flow.pin_all([each, reads], "reads it without removing the mean", CENTER)
    flow.read(named["input"], weight, each)
    flow.mix([each], [group, writes])
    return [*group, *writes]


@rule("embedding")
def embedding(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Rows of a table [V, D]."""
    table, indices = flow.of(named["weight"]), flow.of(named["indices"])
    flow.pin(table[0], "is looked up by index")
    flow.role(named["weight"], 0, "table")
    flow.role(named["weight"], 1, "writes")
    return [*indices, table[1]]


@rule("scaled_dot_product_attention")
def attention(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """softmax(q k^T + mask) v, with q [..., H, S, E], k [..., H, L, E], v [..., H, L, F].

    E is contracted: q and k are duals; F passes to the output; H and what comes before are batches. With `enable_gqa`
    the heads of q are those of k, each repeated.
    """
    if named.get("dropout_p"):
        outputs = unknown(flow, node, named)  # draws random numbers, another at each place
        assert isinstance(outputs, list)
        return outputs
    query, key, value = (flow.of(named[name]) for name in ("query", "key", "value"))
    flow.tie(query[-1], key[-1], ALL & ~CENTER, dual=True)
    flow.read(named["query"], named["key"], query[-1])
    flow.read(named["key"], named["query"], key[-1])
    flow.pin_all([query[-1], key[-1]], "reads it without removing the mean", CENTER)
    flow.tie(key[-2], value[-2], 0)
    repeats = 1
    if named.get("enable_gqa"):
        q_heads, k_heads = size_of(shape_of(named["query"])[-3])[0], size_of(shape_of(named["key"])[-3])[0]
        repeats = q_heads // k_heads
    for dim in range(len(query) - 2):
        ours, heads = query[dim], dim == len(query) - 3
        for theirs in (key[dim], value[dim]):
            flow.tie(ours, [*theirs, *fresh((repeats, ()))] if heads else theirs, 0)
        flow.pin_all([ours, key[dim], value[dim]], "is a batch of attention", LINEAR)
    flow.pin_all([query[-2], key[-2], value[-2]], "is attended over", LINEAR)
    flow.count(key[-2], "takes the softmax over it")
    if named.get("is_causal"):
        flow.pin_all([query[-2], key[-2], value[-2]], "is masked by its order")
    mask = flow.of(named.get("attn_mask"))
    scores = [*query[:-1], key[-2]]
    for axis, score in zip(mask, scores[len(scores) - len(mask) :], strict=True):
        flow.tie(score, axis, 0)
        flow.pin(axis, "is a mask", LINEAR)
    flow.mix([query[-1], key[-2]], query[:-1])
    flow.mix([key[-2]], [*query[:-1], value[-1]])
    flow.mix([query[-2], key[-2]], [query[-1], key[-1]])
    flow.mix([query[-2], query[-1], value[-1]], [key[-2], value[-2]])
    return [*query[:-1], value[-1]]


