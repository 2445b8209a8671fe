"""Operators that move data: they hand slots on, split them, or join them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.analysis.spaces.axes import (
    ONE,
    Axis,
    axis_size,
    concatenated,
    divide,
    fresh,
    piece,
    size_of,
    take,
)
from graphopt.analysis.spaces.flow import Axes, Flow, Outputs, rule, shape_of, sizes_of, unknown
from graphopt.analysis.spaces.symmetry import LINEAR
from graphopt.ir.arguments import operator


@rule("permute", "permute_copy")
def permute(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = flow.of(named["self"])
    return [axes[dim] for dim in named["dims"]]


@rule("transpose", "t")
def transpose(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = list(flow.of(named["self"]))
    if len(axes) < 2:
        return axes
    one, other = named.get("dim0", -2), named.get("dim1", -1)
    axes[one], axes[other] = axes[other], axes[one]
    return axes


@rule(
    "reshape", "view", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_copy", "_reshape_alias",
)  # fmt: skip
def reshape(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Deal the slots out again from the left; a slot larger than what is wanted is split."""
    axes = flow.of(next(iter(named.values())))
    if "dtype" in named:
        return _lost(flow, node, named)  # other numbers of the same bytes
    rest: Axis = [slot for axis in axes for slot in axis]
    out: Axes = []
    for index, size in enumerate(sizes_of(node)):
        taken = take(rest, size)
        if taken is None:
            flow.pin(rest, "is reshaped across its parts")
            return [*out, *(flow.pinned(each, "is reshaped across its parts") for each in shape_of(node)[index:])]
        axis, rest = taken
        # The same list stands for the same axis as long as nothing is split.
        out.append(next((own for own in axes if _same(own, axis)), axis))
    return out


def _same(one: Axis, other: Axis) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


@rule("expand", "expand_copy", "broadcast_to")
def expand(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Copies: every coordinate of a new axis holds the same."""
    axes = flow.of(named["self"])
    sizes = sizes_of(node)
    old = sizes_of(named["self"])
    axes = [[] for _ in range(len(sizes) - len(axes))] + axes
    old = [ONE] * (len(sizes) - len(old)) + old
    out: Axes = []
    for axis, before, after in zip(axes, old, sizes, strict=True):
        out.append(axis if before == after else _copies(flow, after))
    return out


def _copies(flow: Flow, size: Any) -> Axis:
    axis = fresh(size)
    flow.pin(axis, "holds copies", LINEAR)
    return axis


@rule("repeat", "tile")
def repeat(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """[n] becomes [copies x n]."""
    axes = flow.of(named["self"])
    sizes, old = sizes_of(node), sizes_of(named["self"])
    axes = [[] for _ in range(len(sizes) - len(axes))] + axes
    old = [ONE] * (len(sizes) - len(old)) + old
    out: Axes = []
    for axis, before, after in zip(axes, old, sizes, strict=True):
        count = divide(after, before)
        if count is None:
            return _lost(flow, node, named)
        out.append(axis if count == ONE else [*_copies(flow, count), *axis])
    return out


def _lost(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    outputs = unknown(flow, node, named)
    return outputs if isinstance(outputs, list) else []


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """[n] becomes [n x copies]."""
    axes, count, dim = flow.of(named["self"]), named.get("repeats"), named.get("dim")
    if not isinstance(count, int) or not isinstance(dim, int):
        return _lost(flow, node, named)
    out = list(axes)
    out[dim] = [*axes[dim], *_copies(flow, (count, ()))]
    return out


def _range(flow: Flow, axis: Axis, start: Any, stop: Any, size: Any) -> Axis | None:
    """Return a piece of an axis; None, with the axis pinned, where its place is not known or cuts through a product."""
    if all(isinstance(each, int) for each in (start, stop, size)):
        found = piece(axis, start, stop) if axis else axis
        if found is not None:
            return found
    flow.pin(axis, "takes a piece across its parts")
    return None


@rule("slice", "narrow", "slice_copy")
def slicing(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes, size = flow.of(named["self"]), shape_of(named["self"])
    dim = named.get("dim", 0) % len(axes)
    out = list(axes)
    if operator(node) == "narrow":
        start, step = named["start"], 1
        stop = start + named["length"] if isinstance(start, int) and isinstance(named["length"], int) else None
    else:
        start, stop, step = named.get("start") or 0, named.get("end"), named.get("step", 1)
    made = shape_of(node)[dim]
    if step == 1 and size_of(made) == size_of(size[dim]):
        return out
    full = size[dim]
    if isinstance(full, int) and isinstance(start, int) and (stop is None or isinstance(stop, int)):
        start = max(start + full, 0) if start < 0 else min(start, full)
        stop = full if stop is None else (stop + full if stop < 0 else min(stop, full))
        if step != 1:
            found = _strided(axes[dim], full, start, stop, step)
        else:
            found = _range(flow, axes[dim], start, stop, full)
        if found is not None and axis_size(found) == size_of(made):
            out[dim] = found
            return out
    flow.pin(axes[dim], "takes a piece of it")
    out[dim] = flow.pinned(made, "takes a piece of it")
    return out


def _strided(axis: Axis, size: int, start: int, stop: int, step: int) -> Axis | None:
    """Return every step-th coordinate: of [n/step x step] those with one second coordinate."""
    if size % step or start >= step or stop <= size - step + start:
        return None
    parts = take(axis, (size // step, ()))
    if parts is None:
        return None
    outer, inner = parts
    chosen = piece(inner, start, start + 1)
    return None if chosen is None else [*outer, *chosen]


@rule("select", "select_copy")
def select(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = flow.of(named["self"])
    dim = named["dim"] % len(axes)
    size, index = shape_of(named["self"])[dim], named["index"]
    chosen: Axis | None = None
    if isinstance(size, int) and isinstance(index, int) and axes[dim]:
        index %= size
        chosen = piece(axes[dim], index, index + 1)
    if chosen is None:
        flow.pin(axes[dim], "takes one coordinate of it")
    flow.mix([axes[dim]], [axis for other, axis in enumerate(axes) if other != dim])
    return [axis for other, axis in enumerate(axes) if other != dim]


@rule(
    "split", "split_with_sizes", "chunk", "unbind", "split_copy", "split_with_sizes_copy", "unbind_copy",
    "tensor_split",
)  # fmt: skip
def split(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Outputs:
    """Parts of an axis in order; `unbind` drops the axis afterwards."""
    axes = flow.of(named["self"])
    dim = named.get("dim", 0) % len(axes)
    full = shape_of(named["self"])[dim]
    outputs, start = [], 0
    values = node.meta["val"]
    for value in values:
        each = list(axes)
        if operator(node).startswith("unbind"):
            _range(flow, axes[dim], start, start + 1, full)
            del each[dim]
            start += 1
        else:
            length = value.shape[dim]
            known = isinstance(length, int)
            found = _range(flow, axes[dim], start, start + length if known else None, full)
            each[dim] = flow.pinned(length, "takes a piece of it") if found is None else found
            start += length if known else 0
        outputs.append(each)
    return tuple(outputs)


@rule("cat", "concat", "stack")
def concatenation(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """An ordered sum along one axis; along the others all inputs undergo one change."""
    tensors = list(named["tensors"])
    operands = [list(flow.of(value)) for value in tensors]
    shape = shape_of(node)
    dim = named.get("dim", 0) % len(shape)
    if operator(node) == "stack":
        for axes in operands:
            axes.insert(dim, [])
        lengths: list[Any] = [1] * len(tensors)
    else:
        kept = [index for index, value in enumerate(tensors) if len(shape_of(value)) == len(shape)]
        tensors, operands = [tensors[i] for i in kept], [operands[i] for i in kept]
        lengths = [shape_of(value)[dim] for value in tensors]
    out: Axes = []
    for index in range(len(shape)):
        held = [axes[index] for axes in operands if index < len(axes)]
        if index != dim:
            for axis in held[1:]:
                flow.tie(held[0], axis)
            out.append(held[0] if held else [])
        elif len(held) == 1:
            out.append(held[0])
        elif all(isinstance(length, int) for length in lengths):
            out.append(concatenated(held))
        else:
            flow.pin_all(held, "is concatenated at a place that depends on the input")
            out.append(flow.pinned(shape[dim], "is concatenated at a place that depends on the input"))
    return out


@rule("flip", "roll")
def moved(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Other indices along some axes."""
    axes = list(flow.of(named["self"]))
    dims = named.get("dims") or range(len(axes))
    for dim in dims:
        flow.pin(axes[dim], f"is a {operator(node)}, which moves it")
        axes[dim] = flow.pinned(shape_of(node)[dim], f"is a {operator(node)}, which moves it")
    return axes


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = list(flow.of(next(iter(named.values()))))
    old, new = sizes_of(next(iter(named.values()))), sizes_of(node)
    value, widths = named.get("value") or 0, list(named.get("pad") or named["padding"])
    for index, axis in enumerate(list(axes)):
        last = 2 * (len(axes) - 1 - index)
        if old[index] != new[index] or any(widths[last : last + 2]):  # [1, -1] moves and keeps the size
            flow.pin(axis, "is padded")
            axes[index] = flow.pinned(shape_of(node)[index], "is padded")
        elif value != 0:
            flow.pin(axis, "is padded with one number", LINEAR)
    return axes


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """[..., C * r * r, H, W] -> [..., C, H * r, W * r]."""
    axes, factor = flow.of(named["self"]), named["upscale_factor"]
    size = shape_of(node)[-3]
    parts = take(axes[-3], size_of(size))
    flow.pin_all(axes[-2:], "is interleaved by a pixel shuffle")
    space = [flow.pinned(each, "is interleaved by a pixel shuffle") for each in shape_of(node)[-2:]]
    if parts is None:
        flow.pin(axes[-3], "is shuffled across its parts")
        return [*axes[:-3], flow.pinned(size, "is shuffled across its parts"), *space]
    flow.pin(parts[1], f"is the {factor} x {factor} places of a pixel shuffle")
    return [*axes[:-3], parts[0], *space]


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """[..., C, H * r, W * r] -> [..., C * r * r, H, W]."""
    axes, factor = flow.of(named["self"]), named["downscale_factor"]
    flow.pin_all(axes[-2:], "is dealt out by a pixel unshuffle")
    space = [flow.pinned(each, "is dealt out by a pixel unshuffle") for each in shape_of(node)[-2:]]
    places = flow.pinned(factor * factor, f"is the {factor} x {factor} places of a pixel unshuffle")
    return [*axes[:-3], [*axes[-3], *places], *space]


@rule("channel_shuffle")
def channel_shuffle(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """[N, g x c, ...] -> [N, c x g, ...]."""
    axes = list(flow.of(named["self"]))
    parts = take(axes[1], (named["groups"], ()))
    if parts is None:
        return _lost(flow, node, named)
    axes[1] = [*parts[1], *parts[0]]
    return axes


@rule("index_select")
def index_select(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = list(flow.of(named["self"]))
    dim = named["dim"] % len(axes)
    flow.pin(axes[dim], "is looked up by index")
    flow.mix([axes[dim]], [axis for other, axis in enumerate(axes) if other != dim])
    axes[dim] = flow.of(named["index"])[0] if flow.of(named["index"]) else []
    return axes


@rule("index", "_unsafe_index")
def index(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """x[:, i, j]: axes with an index are looked up, the others pass."""
    axes = flow.of(named["self"])
    indices = list(named["indices"])
    indices += [None] * (len(axes) - len(indices))
    looked_up = [dim for dim, each in enumerate(indices) if each is not None]
    if any(isinstance(each, fx.Node) and each.meta["val"].dtype == torch.bool for each in indices):
        return _lost(flow, node, named)
    for dim in looked_up:
        flow.pin(axes[dim], "is looked up by index")
        flow.pin_all(flow.of(indices[dim]), "is an index")
    kept = [axis for dim, axis in enumerate(axes) if dim not in looked_up]
    flow.mix([axes[dim] for dim in looked_up], kept)
    shape = shape_of(node)
    count = len(shape) - len(kept)
    contiguous = looked_up == list(range(looked_up[0], looked_up[-1] + 1)) if looked_up else True
    place = looked_up[0] if looked_up and contiguous else 0
    new = [flow.pinned(size, "is an index") for size in shape[place : place + count]]
    return [*kept[:place], *new, *kept[place:]]


@rule("gather", "take_along_dim")
def gather(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """out[.., i, ..] = x[.., index[.., i, ..], ..]: along other axes the change passes where the index is the same."""
    source = named["index"] if "index" in named else named["indices"]
    axes, indices = flow.of(named["self"]), flow.of(source)
    if not isinstance(named.get("dim"), int):
        return _lost(flow, node, named)  # of all elements in a row
    dim = named["dim"] % max(len(axes), 1)
    constant = [False] * len(axes)
    if isinstance(source, fx.Node) and operator(source) == "expand":
        before = sizes_of(source.args[0])
        constant = [b != a for b, a in zip([ONE] * (len(axes) - len(before)) + before, sizes_of(source), strict=True)]
    old, new = sizes_of(named["self"]), sizes_of(source)
    out: Axes = []
    for other, axis in enumerate(axes):
        if other == dim:
            flow.pin(axis, "is looked up by index")
            flow.mix([axis], [each for index, each in enumerate(axes) if index != dim])
            out.append(indices[other])
        elif old[other] != new[other]:
            flow.pin_all([axis, indices[other]], "is looked up in part")
            out.append(flow.pinned(shape_of(node)[other], "is looked up in part"))
        else:
            flow.tie(axis, indices[other], 0)
            if not constant[other]:
                flow.pin(axis, "is looked up by an index of its own at each coordinate", LINEAR)
            out.append(axis)
    return out


@rule("tril", "triu")
def triangle(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = flow.of(named["self"])
    flow.pin_all(axes[-2:], "is cut to a triangle")
    return axes


@rule("arange", "linspace", "eye")
def numbered(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    return [flow.pinned(size, "is numbered") for size in shape_of(node)]

