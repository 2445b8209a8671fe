"""Linears and convolutions as products of matrices: their weights [P, K, R] and their inputs [P, T, K].

P parts have nothing to do with each other (the groups of a convolution; one otherwise); in each, R output channels read
K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.arguments import arguments


def to_matrix(weight: Tensor, site: fx.Node, parts: int = 1) -> Tensor:
    """Return a weight [R, ...] as [P, K, R / P]: P the groups of a convolution, or `parts` where it has none."""
    groups = max(int(arguments(site).get("groups", 1)), parts)
    return weight.flatten(1).reshape(groups, weight.shape[0] // groups, -1).mT.contiguous()


def from_matrix(matrix: Tensor, like: Tensor) -> Tensor:
    """Return [P, K, R / P] in the shape and dtype of a weight."""
    return matrix.mT.reshape(like.shape).to(like.dtype)


def patches(x: Tensor, weight_shape: tuple[int, ...], named: Mapping[str, Any]) -> Tensor:
    """Return what a linear or a convolution multiplies with its weight: [P, T, K] for x as the operator reads it.

    Args:
        x: [..., K] of a linear, [N, C, *sizes] (or without N) of a convolution.
        weight_shape: [R, K], or [R, C / P, *kernel].
        named: the convolution's arguments (stride, padding, dilation, groups); empty for a linear.

    K is the product of what follows R, in the weight's own order.
    """
    kernel = weight_shape[2:]
    if not kernel:
        return x.reshape(1, -1, weight_shape[1])
    if x.dim() == len(kernel) + 1:
        x = x.unsqueeze(0)
    dims = len(kernel)
    stride, dilation = (_each(named.get(key, 1), dims) for key in ("stride", "dilation"))
    padded = _padded(x, named.get("padding", 0), kernel, dilation)
    groups = int(named.get("groups", 1))
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        reach = gap * (size - 1) + 1
        # Each unfold moves its window to the end: [N, C, *positions, *kernel] after the last.
        padded = padded.unfold(2 + axis, reach, step)[..., ::gap]
    batch, channels, *rest = padded.shape
    positions = rest[:dims]
    grouped = padded.reshape(batch, groups, channels // groups, *positions, *kernel)
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    return grouped.permute(order).reshape(groups, -1, weight_shape[1] * math.prod(kernel))


def _padded(x: Tensor, padding: Any, kernel: tuple[int, ...], dilation: list[int]) -> Tensor:
    if padding == "valid":
        return x
    if padding == "same":
        both = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        ends = [(width // 2, width - width // 2) for width in both]  # an odd one is wider at the far end
    else:
        ends = [(width, width) for width in _each(padding, len(kernel))]
    flat = [width for pair in reversed(ends) for width in pair]
    return torch.nn.functional.pad(x, flat)


def _each(value: Any, dims: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [int(v) for v in (values * dims if len(values) == 1 else values)]
