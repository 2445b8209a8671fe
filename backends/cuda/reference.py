"""What kernels compute, by torch on any device: in float32, with no care for the order of sums.

It stands in where no GPU is: for tests of whole programs, torch.compile and torch.export. To the bit a kernel is
specified by `specification.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.backends.cuda.expressions import computed
from graphopt.backends.cuda.operands import Bytes, unpack_linear
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, RowPlan
from graphopt.ir.dialect import dynamic_scale, hadamard, quantize


def weight_of(plan: LinearPlan, weights: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Return the matrix [n, k] in float32, its rows as they are packed."""
    codes, scale, zero = unpack_linear(
        plan, _array(weights, np.uint32), _array(scales, np.uint32), None if zeros is None else _array(zeros, np.uint16)
    )
    width = plan.layout.padded_k // plan.groups
    shift: Any = 1 << (plan.bits - 1)
    if zero is not None:
        shift = np.repeat(zero.astype(np.float32), width, axis=1)
    values = (codes.astype(np.float32) - shift) * np.repeat(scale, width, axis=1)
    return torch.from_numpy(np.ascontiguousarray(values[:, : plan.k])).to(weights.device)


def _array(words: Tensor, type: Any) -> NDArray[Any]:
    return words.numpy(force=True).view(type)


def linear(
    plan: LinearPlan, x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor | None, inputs: Sequence[Tensor]
) -> Tensor:
    """Return y [..., outputs] for x [..., k]."""
    acc = x.float() @ weight_of(plan, weights, scales, zeros).T
    if not plan.paired:
        return finished(plan, {"acc": acc}, inputs, x.dtype)
    pairs = acc.reshape(*acc.shape[:-1], -1, 2, 8)
    return finished(plan, {"acc": pairs[..., 0, :].flatten(-2), "acc2": pairs[..., 1, :].flatten(-2)}, inputs, x.dtype)


def finished(
    plan: LinearPlan | Int8Plan, sums: dict[str, Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """Apply the epilogue to sums."""
    values = {name: value.float() for name, value in zip(plan.inputs, inputs, strict=True)}
    return computed(plan.epilogue, {**values, **sums}, dtype).to(dtype).contiguous()


def int8(plan: Int8Plan, given: Bytes, inputs: Sequence[Tensor]) -> Tensor:
    """Return y [..., n] for codes x [..., k]."""
    codes = torch.from_numpy(plan.layout.unpack(_array(given.weights, np.uint32))[:, : plan.k].copy())
    # float64 holds every sum of products of bytes.
    steps = given.x.double()
    if given.x_zero_point is not None:
        steps = steps - given.x_zero_point.double()
    total = (steps @ codes.to(steps).T).float()
    acc = total * given.x_scale.float() * given.scales.view(torch.float32)
    return finished(plan, {"acc": acc}, inputs, given.x_scale.dtype)


def rows(plan: RowPlan, inputs: Sequence[Tensor], signs: Tensor | None) -> list[Tensor]:
    """Return what the kernel writes, in the order of its parameters."""
    dtype = inputs[0].dtype
    values = {name: value.float() for name, value in zip(plan.inputs, inputs, strict=True)}
    x = computed(plan.prologue, values, dtype)
    found = [x.to(dtype).contiguous()] if plan.keep else []
    if plan.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if plan.norm != "none":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + plan.eps)
    if plan.affine != "x":
        x = computed(plan.affine, {**values, "x": x}, dtype)
    if plan.block:
        x = hadamard(x, None, None if signs is None else _signs(signs, plan.n), plan.block, plan.transpose)
    if plan.output == "half":
        return [*found, x.to(dtype).contiguous()]
    scale, zero = (dynamic_scale if plan.zero_points else _symmetric_scale)(x, -1, -1, plan.output)
    scale = scale.to(dtype)
    zeros = zero if plan.zero_points else None
    codes = quantize(x, scale, zeros, -1, -1, plan.output)
    return [*found, codes.contiguous(), scale, *([] if zeros is None else [zeros])]


def _symmetric_scale(x: Tensor, axis: int, group_size: int, format: str) -> tuple[Tensor, None]:
    largest = x.abs().amax(axis, keepdim=True)
    scale = largest / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return torch.where(largest.isfinite(), scale, torch.nan), None


def _signs(packed: Tensor, n: int) -> Tensor:
    bits = packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:n].float()
