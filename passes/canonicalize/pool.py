"""Write a mean over all of space as a global average pool.

    mean(x, [2, 3], keepdim=True)   ->  adaptive_avg_pool2d(x, 1)                     x: [N, C, H, W]
    mean(x, [2, 3])                 ->  reshape(adaptive_avg_pool2d(x, 1), [-1, C])

Also in one and three dimensions. Exact. Worth it only behind a convolution: there the runtime has a pool on integers,
and no mean; of other tensors the last axes are no space.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir import Match, Program, Rewriter, arguments, is_floating, operator, rule
from graphopt.passes.canonicalize.operators import tensor_of

aten = torch.ops.aten
_POOLS = {3: aten.adaptive_avg_pool1d.default, 4: aten.adaptive_avg_pool2d.default, 5: aten.adaptive_avg_pool3d.default}
# Besides pointwise operators, these leave [N, C, *space] what it is.
_KEEP_SPACE = {
    "getitem", "batch_norm", "_native_batch_norm_legit_no_training", "group_norm", "instance_norm", "cat", "pad",
    "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d", "hardswish",
    "hardsigmoid", "prelu", "channel_shuffle", "pixel_shuffle", "dropout", "feature_dropout", "_to_copy", "clone",
}  # fmt: skip
_FARTHEST = 64


def _spatial_mean(node: fx.Node) -> Match | None:
    if operator(node) != "mean" or not is_floating(node):
        return None
    named = arguments(node)
    x = tensor_of(named["self"])
    dims = named.get("dim")
    if x is None or x.dim() not in _POOLS or not dims or x.dtype != node.meta["val"].dtype:
        return None
    if sorted(d % x.dim() for d in dims) != list(range(2, x.dim())):
        return None
    if x.dim() == 3 and not _convolution_before(named["self"]):
        return None  # the last axis of [batch, tokens, width], as every norm has it
    return Match(node, {"x": named["self"], "keepdim": bool(named.get("keepdim"))})


def behind_convolution(match: Match, program: Program) -> str:
    """The tensor comes from a convolution, with nothing between that moves its axes."""
    start = match.node("x")
    return "" if _convolution_before(start) else f"{start.name} does not come from a convolution"


def _convolution_before(start: fx.Node) -> bool:
    rank, front, seen = start.meta["val"].dim(), [start], {start}
    while front and len(seen) <= _FARTHEST:
        node = front.pop()
        if operator(node).startswith("conv"):
            return True
        target = node.target
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        if node.op != "call_function" or not (pointwise or operator(node) in _KEEP_SPACE):
            continue
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            first = value[0] if isinstance(value, tuple | list) and value else value
            if source not in seen and isinstance(first, torch.Tensor) and first.dim() == rank:
                seen.add(source)
                front.append(source)
    return False


def space_of_fixed_rank(match: Match, program: Program) -> str:
    """No axis is empty, so that the mean is one of numbers."""
    x = tensor_of(match["x"])
    assert x is not None
    return "" if all(not isinstance(s, int) or s > 0 for s in x.shape) else f"{match['x'].name} is empty"


@rule(match=_spatial_mean, needs=[space_of_fixed_rank], worth=[behind_convolution])
def write_global_pool(match: Match, rewriter: Rewriter) -> None:
    x, node = match.node("x"), match.root
    rank = x.meta["val"].dim()
    new = rewriter.insert(_POOLS[rank], x, [1] * (rank - 2), before=node)
    if not match["keepdim"]:
        channels = x.meta["val"].shape[1]
        if isinstance(channels, int):
            new = rewriter.insert(aten.reshape.default, new, [-1, channels], before=node)
        else:
            new = rewriter.insert(aten.squeeze.dims, new, list(range(2, rank)), before=node)
    rewriter.replace(node, new)
    rewriter.touch(node, "mean over space as a global average pool")


RULES = (write_global_pool,)
