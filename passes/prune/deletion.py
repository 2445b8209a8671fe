"""Delete coordinates of spaces: from the weights, and from every operator that mentions how many there are.

What a deleted coordinate contributes to a sum is taken out of that sum, and nothing else changes:

    a product    W x = sum over all k of W[:, k] x[k]        the columns of the deleted k go
    a mean       sum / D                                     over D' coordinates, times D' / D
    an RMS norm  x g / sqrt(sum x^2 / D + e)                 g' = g sqrt(D / D'), e' = e D / D'
    attention    softmax(q k^T / sqrt(E)) v                  the scale 1 / sqrt(E) is spelled out
    group norm   statistics of a group                       taken over what is left of it, as many of each group

A softmax and a largest value are no such sums and a layer norm takes a mean away: the analysis says so, and those
spaces are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces import Analysis, Selection, Space
from graphopt.analysis.spaces.axes import Axis, axis_size, piece, take
from graphopt.ir import Rewriter
from graphopt.ir.arguments import arguments, operator

aten = torch.ops.aten


class Deletion:
    """What must be rewritten when a selection of coordinates is all that stays.

    Raises Undeletable where an operator mentions a number of coordinates in a way that cannot be rewritten; nothing is
    changed before `apply`.
    """

    def __init__(self, analysis: Analysis, kept: Mapping[Space, Tensor]) -> None:
        self.selection = Selection(kept)
        self._analysis = analysis
        self._edits: list[tuple[fx.Node, dict[str, Any]]] = []
        self._sections: list[tuple[fx.Node, list[int]]] = []
        self._means: list[tuple[fx.Node, float]] = []
        self._views: list[fx.Node] = []
        self._norms: list[tuple[fx.Node, float]] = []
        for node in analysis.program.graph.nodes:
            if node.op == "call_function" and (rule := _RULES.get(operator(node))) is not None:
                rule(self, node, arguments(node))

    def axes(self, node: object) -> list[Axis]:
        """Return the axes of a node's tensor; of one that returns several, none."""
        found = self._analysis.axes(node) if isinstance(node, fx.Node) else []
        return found if isinstance(found, list) else []

    def touches(self, axis: Axis) -> bool:
        return self.selection.touches(axis)

    def size(self, axis: Axis) -> int:
        return self.selection.size(axis)[0]

    def before(self, axis: Axis, place: int) -> int:
        """Return how many of the coordinates before a place are left; it lies where parts of the axis meet."""
        part = piece(axis, 0, place)
        assert part is not None, "the analysis found a piece there"
        return self.size(part)

    def _reshape_behind(self, node: fx.Node) -> None:
        """Let no view depend on how a node's result lies in memory."""
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if operator(user) in _VIEWS:
                self._views.append(user)
            elif operator(user) in _MOVES:
                stack += user.users

    def edit(self, node: fx.Node, **named: Any) -> None:
        self._edits.append((node, named))

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite; the program must be the one that was analysed, unchanged since."""
        nodes = list(rewriter.graph.nodes)
        for node, named in self._edits:
            rewriter.rewire(node, **named)
        for node in self._views:
            rewriter.retarget(node, aten.reshape.default, *node.args)
        for node, sizes in self._sections:
            named = arguments(node)
            rewriter.retarget(node, aten.split_with_sizes.default, named["self"], sizes, named.get("dim", 0))
        for node, ratio in self._means:
            scaled = rewriter.insert(aten.mul.Tensor, node, ratio, before=node.next, origin=[node])
            rewriter.replace(node, scaled)
        for node in nodes:
            axes = self.axes(node) if node.op == "get_attr" else []
            if any(self.touches(axis) for axis in axes):
                self._cut(rewriter, node, axes)
        for node, ratio in self._norms:
            self._rescale(rewriter, node, ratio)

    def _cut(self, rewriter: Rewriter, node: fx.Node, axes: list[Axis]) -> None:
        before, selection, dtype = rewriter.reader(node), self.selection, rewriter.program.weight(node).dtype
        rewriter.replace(node, rewriter.weight(lambda: selection.take(axes, before()), str(node.target), dtype, node))

    def _rescale(self, rewriter: Rewriter, node: fx.Node, ratio: float) -> None:
        """Give an RMS norm over D' = D / ratio coordinates the statistic of D."""
        named = arguments(node)
        weight, eps = named.get("weight"), named.get("eps")
        if eps is None:
            eps = torch.finfo(named["input"].meta["val"].dtype).eps
        factor = math.sqrt(ratio)
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            scaled = rewriter.edit(weight, f"statistic of {ratio}", lambda value: value * factor)
            rewriter.rewire(node, weight=scaled, eps=eps * ratio)
            return
        rewriter.rewire(node, eps=eps * ratio)
        after = rewriter.insert(aten.mul.Tensor, node, factor, before=node.next, origin=[node])
        rewriter.replace(node, after)


class Undeletable(ValueError):
    """An operator stands in the way; the text is what a user reads."""


Rule = Callable[[Deletion, fx.Node, dict[str, Any]], None]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def _sized(*names: str, argument: str) -> None:
    """Enter operators that take the sizes of their result."""

    def resized(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
        given = list(named[argument])
        axes = deletion.axes(node)[len(deletion.axes(node)) - len(given) :]  # those that it makes
        made = list(given)
        for dim, (axis, size) in enumerate(zip(axes, given, strict=True)):
            if not deletion.touches(axis) or (isinstance(size, int) and size == -1):
                continue
            if isinstance(size, int):
                made[dim] = deletion.size(axis)
            else:
                raise Undeletable(f"{node.name} takes a size that is computed when the model runs")
        if made != given:
            deletion.edit(node, **{argument: made})

    _RULES.update(dict.fromkeys(names, resized))


_VIEWS = ("view", "_unsafe_view", "view_copy")
_MOVES = ("transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "expand", "alias", "getitem", "_to_copy")
_sized("view", "_unsafe_view", "view_copy", "expand", "expand_copy", "broadcast_to", argument="size")
_sized("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", argument="size")
_sized("reshape", argument="shape")
_sized("layer_norm", "rms_norm", argument="normalized_shape")
_normalized_shape = _RULES["rms_norm"]


@_rule("rms_norm")
def _rms_norm(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    _normalized_shape(deletion, node, named)
    axes = deletion.axes(node)
    inner = axes[len(axes) - len(named["normalized_shape"]) :]
    if any(deletion.touches(axis) for axis in inner):
        deletion._norms.append((node, _ratio(deletion, inner)))


def _ratio(deletion: Deletion, axes: Sequence[Axis]) -> float:
    """Return how many coordinates there were for one that is left."""
    touched = [axis for axis in axes if deletion.touches(axis)]
    return math.prod(axis_size(axis)[0] / deletion.size(axis) for axis in touched)


@_rule("mean")
def _mean(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    axes = deletion.axes(named["self"])
    dims = named.get("dim")
    gone = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    ratio = _ratio(deletion, [axes[dim] for dim in gone])
    if ratio != 1:
        deletion._means.append((node, 1 / ratio))


@_rule("unflatten")
def _unflatten(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    dim = named["dim"] % len(deletion.axes(named["self"]))
    axes = deletion.axes(node)[dim : dim + len(named["sizes"])]
    if any(deletion.touches(axis) for axis in axes):
        deletion.edit(node, sizes=[deletion.size(axis) for axis in axes])


@_rule("repeat", "tile")
def _repeat(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    key = "repeats" if "repeats" in named else "dims"
    counts, out = list(named[key]), deletion.axes(node)
    source = deletion.axes(named["self"])
    source = [[] for _ in range(len(out) - len(source))] + source
    for dim, (axis, made) in enumerate(zip(source, out, strict=True)):
        if deletion.touches(made) and len(made) > len(axis):
            counts[dim] = deletion.size(made) // deletion.size(axis)
    if counts != list(named[key]):
        deletion.edit(node, **{key: counts})


@_rule("repeat_interleave")
def _repeat_interleave(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    axis, made = (deletion.axes(each) for each in (named["self"], node))
    dim = named["dim"]
    if isinstance(dim, int) and deletion.touches(made[dim]):
        deletion.edit(node, repeats=deletion.size(made[dim]) // deletion.size(axis[dim]))


@_rule("slice", "slice_copy")
def _slice(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    axes = deletion.axes(named["self"])
    axis = axes[named.get("dim", 0) % len(axes)]
    if not deletion.touches(axis):
        return
    full, step = axis_size(axis)[0], named.get("step", 1)
    start, end = named.get("start") or 0, named.get("end")
    start, end = _within(start, full), full if end is None else _within(end, full)
    if step != 1:
        deletion.edit(node, end=deletion.size(axis))  # every step-th of a product: the place in a step stays
        return
    deletion.edit(node, start=deletion.before(axis, start), end=deletion.before(axis, end))


def _within(place: int, size: int) -> int:
    return min(max(place + size if place < 0 else place, 0), size)


@_rule("narrow")
def _narrow(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    axes = deletion.axes(named["self"])
    axis = axes[named["dim"] % len(axes)]
    if deletion.touches(axis):
        start = deletion.before(axis, named["start"])
        deletion.edit(node, start=start, length=deletion.before(axis, named["start"] + named["length"]) - start)


@_rule("select", "select_copy")
def _select(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    axes = deletion.axes(named["self"])
    axis = axes[named["dim"] % len(axes)]
    if deletion.touches(axis):
        place = _within(named["index"], axis_size(axis)[0])
        deletion.edit(node, index=deletion.before(axis, place))


@_rule("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy", "tensor_split")
def _split(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    axes = deletion.axes(named["self"])
    dim = named.get("dim", 0) % len(axes)
    if not deletion.touches(axes[dim]):
        return
    parts = deletion._analysis.axes(node)
    assert isinstance(parts, tuple)
    sizes = [deletion.size(part[dim]) for part in parts]
    if operator(node).startswith("split_with_sizes"):
        deletion.edit(node, split_sizes=sizes)
    else:
        deletion._sections.append((node, sizes))


@_rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    x = deletion.axes(named["input"])
    channels = x[len(x) - len(deletion.axes(named["weight"])) + 1]
    _grouped(deletion, node, channels, "groups", named["groups"])


@_rule("group_norm")
def _group_norm(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    _grouped(deletion, node, deletion.axes(named["input"])[1], "num_groups", named["num_groups"])


@_rule("channel_shuffle")
def _channel_shuffle(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    _grouped(deletion, node, deletion.axes(named["self"])[1], "groups", named["groups"])


def _grouped(deletion: Deletion, node: fx.Node, channels: Axis, argument: str, groups: int) -> None:
    if groups == 1 or not deletion.touches(channels):
        return
    parts = take(channels, (groups, ()))
    if parts is None:
        raise Undeletable(f"{node.name} is grouped across parts of what it reads")
    deletion.edit(node, **{argument: deletion.size(parts[0])})


@_rule("scaled_dot_product_attention")
def _attention(deletion: Deletion, node: fx.Node, named: dict[str, Any]) -> None:
    query, value = (deletion.axes(named[each])[-1] for each in ("query", "value"))
    if deletion.touches(query) or deletion.touches(value):
        deletion._reshape_behind(node)  # the layout of its result depends on whether the two sizes agree
    if deletion.touches(query) and named.get("scale") is None:
        deletion.edit(node, scale=1 / math.sqrt(axis_size(query)[0]))
