"""What kernels compute, in numpy: every rounding where the kernel has it, without its threads, layouts and addresses.

Integer and float32 arithmetic is the same to the bit. Products of halves are those of an ideal tensor core
(`arithmetic.mma16`), as in the host executor and the PTX interpreter: a real one adds in another order, so there the bound
of `linear_bound` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.cuda import arithmetic
from graphopt.backends.cuda.arithmetic import F32, U16
from graphopt.backends.cuda.expressions import evaluated
from graphopt.backends.cuda.plan import LinearPlan


def linear(
    plan: LinearPlan,
    x: U16,
    codes: NDArray[Any],
    scale: NDArray[np.float32],
    zero_point: NDArray[Any] | None = None,
    inputs: Mapping[str, U16] | None = None,
) -> U16:
    """Return y [m, outputs] as bits; x [m, k] and inputs are bits, the rest as `pack_linear` takes it."""
    layout, m = plan.layout, len(x)
    width = layout.padded_k // plan.groups  # inputs that share a scale
    steps = np.arange(layout.padded_k).reshape(-1, layout.span // 16, 16)
    order = _order(layout.span)
    values = _codes(plan, codes, zero_point)
    wide = np.zeros((m, layout.padded_k), np.float32)
    wide[:, : plan.k] = arithmetic.widened(x, plan.dtype)
    scales = np.pad(scale, ((0, 0), (0, plan.groups - scale.shape[1])), mode="edge").astype(plan.scale_dtype)
    units = layout.padded_k // layout.unit
    slices = []
    for s in range(plan.slices):
        first, last = units * s // plan.slices * layout.unit, units * (s + 1) // plan.slices * layout.unit
        acc = np.zeros((m, plan.n), np.float32)
        part = np.zeros((m, plan.n), np.float32)
        for step in range(first // 16, last // 16):
            span, inside = divmod(step, layout.span // 16)
            k = steps[span].reshape(-1)[order[inside]]
            part = arithmetic.mma16(part, wide[:, None, k], values[None, :, k])
            end = (step + 1) * 16
            if plan.group and end % width == 0:
                acc = arithmetic.fma(part, scales[:, end // width - 1].astype(np.float32), acc)
                part = np.zeros_like(part)
        slices.append(acc if plan.group else part)
    total = _added(plan, slices)
    if not plan.group:
        total = arithmetic.mul(total, scales[:, 0].astype(np.float32))
    return _finished(plan, total, inputs or {})


def _order(span: int) -> NDArray[np.int64]:
    """Return [steps, 16]: which inputs of a span each product multiplies, in the order of its k."""
    k = np.arange(16)
    t, h, e = k % 8 // 2, k // 8, k % 2
    return np.stack([span // 4 * t + 4 * s + 2 * h + e for s in range(span // 16)])


def _codes(plan: LinearPlan, codes: NDArray[Any], zero_point: NDArray[Any] | None) -> F32:
    """Return codes less zero points, [n, padded_k], 0 where k is filled up."""
    zero: Any = 1 << (plan.bits - 1)
    if zero_point is not None:
        zero = np.repeat(zero_point, plan.layout.padded_k // plan.groups, axis=1)[:, : plan.k].astype(np.int64)
    values = np.zeros((plan.n, plan.layout.padded_k), np.float32)
    values[:, : plan.k] = codes.astype(np.int64) - zero
    return values


def _added(plan: LinearPlan, slices: list[F32]) -> F32:
    """Add the slices of each block, then the blocks."""
    blocks = []
    for first in range(0, plan.slices, plan.k_warps):
        total = slices[first]
        for each in slices[first + 1 : first + plan.k_warps]:
            total = arithmetic.add(total, each)
        blocks.append(total)
    if len(blocks) == 1:
        return blocks[0]
    total = np.zeros_like(blocks[0])
    for each in blocks:
        total = arithmetic.add(total, each)
    return total


def _finished(plan: LinearPlan, acc: F32, inputs: Mapping[str, U16]) -> U16:
    """Apply the epilogue to sums [m, n]."""
    values = {name: arithmetic.widened(each, plan.dtype) for name, each in inputs.items()}
    if plan.paired:
        pairs = acc.reshape(len(acc), -1, 2, 8)
        values["acc2"] = pairs[:, :, 1].reshape(len(acc), -1)
        acc = pairs[:, :, 0].reshape(len(acc), -1)
    values["acc"] = acc
    return arithmetic.narrowed(evaluated(plan.epilogue, values, plan.dtype), plan.dtype)


def linear_bound(plan: LinearPlan, x: U16, weight: F32) -> F32:
    """Return [m, n] how far sums of a real tensor core may lie from those of the specification.

    c·2⁻²³·Σ|x·w| with c = 4: a tensor core cuts the products that it adds at once to a few bits more than the largest one
    has, once in sixteen inputs, where the specification rounds. weight: [n, k], dequantized.
    """
    wide = np.abs(arithmetic.widened(x, plan.dtype).astype(np.float64))
    return (4 * 2.0**-23 * (wide @ np.abs(weight.astype(np.float64)).T)).astype(np.float32)
