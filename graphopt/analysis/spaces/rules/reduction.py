"""Operators that combine the coordinates of an axis: sums, norms, softmax, pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from graphopt.analysis.spaces.axes import Axis, copied, take
from graphopt.analysis.spaces.flow import Axes, Flow, Outputs, rule, shape_of, unknown
from graphopt.analysis.spaces.rules.pointwise import elementwise
from graphopt.analysis.spaces.symmetry import ALL, CENTER, DIAGONAL, LINEAR, ORTHOGONAL, SCALES, SIGN
from graphopt.ir.arguments import operator

_SUMS = ("mean", "sum")
_ADDED_UP = (*_SUMS, "linalg_vector_norm", "norm")
_LARGEST = ("amax", "amin", "max", "min")


@rule(
    *_SUMS, *_LARGEST, "prod", "var", "std", "any", "all", "argmax", "argmin", "logsumexp", "linalg_vector_norm",
    "norm", "var_mean", "median", "kthvalue",
)  # fmt: skip
def reduction(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Outputs:
    """Sums pass every change of the axes that remain, largest values a positive scale, the rest permutations."""
    if "other" in named:
        return elementwise(flow, node, named)  # the larger of two tensors
    axes = flow.of(next(iter(named.values())))
    dims = named.get("dim")
    if dims is None or dims == []:
        dims = range(len(axes))
    gone = {dim % max(len(axes), 1) for dim in ([dims] if isinstance(dims, int) else list(dims or ()))}
    reduced = [axis for dim, axis in enumerate(axes) if dim in gone]
    kept = [axis for dim, axis in enumerate(axes) if dim not in gone]
    name = operator(node)
    flow.pin_all(reduced, f"takes the {name} over it", LINEAR)
    if name not in _ADDED_UP:
        for axis in reduced:
            flow.count(axis, f"takes the {name} over it, which is no sum of what each coordinate gives")
    passed = ALL if name in _SUMS else (DIAGONAL if name in _LARGEST else 0)
    flow.pin_all(kept, f"takes the {name} of each coordinate", LINEAR & ~passed)
    flow.mix(reduced, kept)
    out = kept
    if named.get("keepdim"):
        out = [[] if dim in gone else axis for dim, axis in enumerate(axes)]
    value: Any = node.meta["val"]
    return out if isinstance(value, Tensor) else (out, _beside(flow, out))


def _beside(flow: Flow, axes: Axes) -> Axes:
    """Return the axes of what is returned beside the values on `axes`, as their places: it does not change alike."""
    copies = [copied(axis) for axis in axes]
    for axis, copy in zip(axes, copies, strict=True):
        flow.tie(axis, copy, 0)
    flow.pin_all(copies, f"is what {operator(flow.node)} returns beside its values", LINEAR)
    return copies


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = flow.of(next(iter(named.values())))
    flow.pin_all(axes, "takes the softmax", LINEAR)
    dim = named["dim"] % len(axes)
    flow.count(axes[dim], "takes the softmax over it")
    flow.mix([axes[dim]], [axis for index, axis in enumerate(axes) if index != dim])
    return axes


@rule("topk", "sort")
def ordering(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Outputs:
    """Values and where they were: the axis is no longer what it was, the others keep their places."""
    axes = flow.of(named["self"])
    dim = named.get("dim", -1) % max(len(axes), 1)
    reason = f"is put in order by {operator(node)}"
    flow.pin(axes[dim], reason)
    flow.pin_all(axes, reason, LINEAR)
    flow.mix([axes[dim]], [axis for index, axis in enumerate(axes) if index != dim])
    values: Any = node.meta["val"]
    return tuple([*axes[:dim], flow.pinned(value.shape[dim], reason), *axes[dim + 1 :]] for value in values)


@rule("cumsum", "cumprod", "logcumsumexp")
def cumulative(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    axes = flow.of(next(iter(named.values())))
    dim = named["dim"] % max(len(axes), 1)
    for index, axis in enumerate(axes):
        if index == dim or operator(node) != "cumsum":
            flow.pin(axis, "accumulates over it", ALL if index == dim else LINEAR)
    flow.mix(axes[dim : dim + 1], [*axes[:dim], *axes[dim + 1 :]])
    return axes


def _affine(flow: Flow, named: dict[str, Any], out: Axes, first: int) -> bool:
    """Tie a norm's weight and bias to its output under scales; False where a scale of the output has nowhere to go."""
    weight, bias = named.get("weight"), named.get("bias")
    for name, value in (("scale", weight), ("bias", bias)):
        for dim, (axis, own) in enumerate(zip(out[first:], flow.of(value), strict=False)):
            flow.role(value, dim, name)
            flow.tie(axis, own, SCALES)
            flow.pin(own, "belongs to a norm", LINEAR & ~SCALES)
    return isinstance(weight, fx.Node)


@rule("layer_norm", "rms_norm")
def norm(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Normalize over the last axes, then scale by a weight and shift.

    The output's scale lives in the weight. An RMS norm without weight passes every rotation; a layer norm removes the
    mean of its input itself.
    """
    axes = flow.of(named["input"])
    first = len(axes) - len(named["normalized_shape"])
    rms = operator(node) == "rms_norm"
    flow.pin_all(axes[:first], "normalizes each of its coordinates", LINEAR)
    inner = axes[first:]
    bare = named.get("weight") is None and named.get("bias") is None
    flow.mix(inner, axes[:first])
    for axis in inner:
        flow.mix([axis], [other for other in inner if other is not axis])
    if rms and bare:
        for axis in inner:
            flow.norm(axis, axis, centers=False)
        flow.pin_all(inner, "is an RMS norm, whose statistic only rotations keep", LINEAR & ~ORTHOGONAL & ~SIGN)
        return axes
    out = [copied(axis) for axis in inner]
    for axis, made in zip(inner, out, strict=True):
        flow.tie(axis, made, 0)
    kind = "an RMS norm" if rms else "a layer norm"
    affine = named["weight"] if isinstance(named.get("weight"), fx.Node) else named.get("bias")
    whose = f" with an affine ({affine.target})" if isinstance(affine, fx.Node) else ""
    needs = "fold that into its readers" if rms else "center its writers"
    if not rms:
        for axis in inner:
            flow.count(axis, "is a layer norm, which takes the mean over it: center its writers")
    flow.pin_all(inner, f"is {kind}{whose}: {needs}", LINEAR & ~CENTER if not rms else LINEAR)
    flow.pin_all(out, f"writes it, {kind}{whose}", LINEAR & ~SCALES)
    if not _affine(flow, named, [*axes[:first], *out], first):
        flow.pin_all(out, f"writes it, {kind} without a weight", SCALES)
    if len(inner) == 1:
        flow.norm(inner[0], out[0], centers=not rms)
    elif not rms:
        flow.pin_all(inner, "normalizes over several axes", CENTER)
    return [*axes[:first], *out]


@rule("batch_norm", "instance_norm")
def batch_norm(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Outputs:
    """One affine map a channel: the running statistics scale with the input, weight and bias with the output."""
    axes = flow.of(named["input"])
    if named.get("training") or named.get("use_input_stats"):
        return unknown(flow, node, named)
    if len(axes) < 2:
        return axes
    x, out = axes[1], copied(axes[1])
    flow.tie(x, out, 0)
    for name, role in (("running_mean", "mean"), ("running_var", "variance"), ("weight", "scale"), ("bias", "bias")):
        for own in flow.of(named.get(name)):
            flow.role(named[name], 0, role)
            flow.tie(x, own, 0)
            flow.pin(own, "belongs to a batch norm: fold that first", LINEAR)
    flow.pin_all([x, out], "is a batch norm: fold that first", LINEAR)
    return [axes[0], out, *axes[2:]]


@rule("group_norm")
def group_norm(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """Normalize over the channels of each group and over space; weight [C] and bias [C] scale the output."""
    axes = flow.of(named["input"])
    parts = take(axes[1], (named["num_groups"], ()))
    if parts is None:
        flow.pin_all(axes, "normalizes groups across its parts")
        return [flow.pinned(size, "is what a group norm writes") for size in shape_of(node)]
    flow.pin_all(axes, "is a group norm", LINEAR)
    out = copied(axes[1])
    flow.tie(axes[1], out, 0)
    flow.pin(out, "is what a group norm writes", LINEAR & ~SCALES)
    if not _affine(flow, named, [axes[0], out], 1):
        flow.pin(out, "is what a group norm without a weight writes", SCALES)
    flow.mix([parts[1], *axes[2:]], [axes[0], parts[0]])
    return [axes[0], out, *axes[2:]]


@rule("graphopt.hadamard")
def hadamard(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """x Q along the last axis: the others ride along and pass every linear change."""
    *riding, last = flow.of(named["x"])
    reason = "is transformed by a fixed matrix"
    flow.pin(last, reason)
    for factor in (named["small"], named["signs"]):
        flow.pin_all(flow.of(factor), reason)
    flow.mix([last], riding)
    return [*riding, flow.pinned(shape_of(node)[-1], reason)]


def _spatial(flow: Flow, node: fx.Node, axes: Axes, count: int, reason: str) -> Axes:
    """Return the axes of an operator that moves a window over the last `count` axes."""
    before: list[Axis] = axes[: len(axes) - count]
    flow.pin_all(axes[len(axes) - count :], reason)
    return [*before, *(flow.pinned(size, reason) for size in shape_of(node)[len(before) :])]


@rule(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
def linear_window(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Axes:
    """A weighted sum of neighbours, the same for every channel."""
    name = operator(node)
    axes = flow.of(next(iter(named.values())))
    count = int(next(letter for letter in name if letter.isdigit()))
    return _spatial(flow, node, axes, count, f"is {name}, which moves a window over it")


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool2d",
)  # fmt: skip
def max_pool(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Outputs:
    """The largest of neighbours: positive scales pass."""
    name = operator(node)
    axes = flow.of(next(iter(named.values())))
    count = int(next(letter for letter in name if letter.isdigit()))
    value: Any = node.meta["val"]
    flow.pin_all(axes[: len(axes) - count], f"is {name}, which only positive scales pass", LINEAR & ~DIAGONAL)
    if isinstance(value, Tensor):
        return _spatial(flow, node, axes, count, f"is {name}, which moves a window over it")
    flow.pin_all(axes[len(axes) - count :], f"is {name}, which moves a window over it")
    sizes = list(value[0].shape)[len(axes) - count :]
    made = [flow.pinned(size, f"is what {name} writes") for size in sizes]
    out = [*axes[: len(axes) - count], *made]
    return out, _beside(flow, out)
