"""What kernels compute, in numpy: every rounding where the kernel has it, without its threads, layouts and addresses.

Integer and float32 arithmetic is the same to the bit. Products of halves are those of an ideal tensor core
(`arithmetic.mma16`), as in the host executor and the PTX interpreter: a real one adds in another order, so there the
bound of `linear_bound` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.cuda import arithmetic
from graphopt.backends.cuda.arithmetic import F32, U16
from graphopt.backends.cuda.expressions import evaluated
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, RowPlan


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


def _finished(plan: LinearPlan | Int8Plan, acc: F32, inputs: Mapping[str, U16]) -> U16:
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

    c·2⁻²³·Σ|x·w| with c = 4: a tensor core cuts the products that it adds at once to a few bits more than the largest
    one has, once in sixteen inputs, where the specification rounds. weight: [n, k], dequantized.
    """
    wide = np.abs(arithmetic.widened(x, plan.dtype).astype(np.float64))
    return (4 * 2.0**-23 * (wide @ np.abs(weight.astype(np.float64)).T)).astype(np.float32)


def dequantize(
    plan: DequantizePlan, codes: NDArray[Any], scale: NDArray[np.float32], zero_point: NDArray[Any] | None = None
) -> U16:
    """Return the matrix [n, k] as bits; the rest as `pack_linear` takes it."""
    zero: Any = 1 << (plan.bits - 1)
    if zero_point is not None:
        zero = np.repeat(zero_point, plan.group or plan.k, axis=1)[:, : plan.k].astype(np.int64)
    steps = (codes.astype(np.int64) - zero).astype(np.float32)
    wide = np.repeat(scale.astype(plan.scale_dtype).astype(np.float32), plan.group or plan.k, axis=1)[:, : plan.k]
    made = arithmetic.narrowed(arithmetic.mul(steps, wide), plan.dtype)
    if not plan.paired:
        return made
    return np.ascontiguousarray(made.reshape(-1, 2, 8, plan.k).swapaxes(0, 1)).reshape(plan.n, plan.k)


# Bytes ----------------------------------------------------------------------------------------------------------------


def int8(
    plan: Int8Plan,
    x: NDArray[np.uint8],
    x_scale: U16,
    x_zero_point: NDArray[np.uint8] | None,
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    inputs: Mapping[str, U16] | None = None,
) -> U16:
    """Return y [m, n] as bits; x [m, k] and zero points are bytes, signed ones by their bits; [m] or [1] scales."""
    type = np.int8 if plan.signed else np.uint8
    total = x.view(type).astype(np.int64) @ codes.astype(np.int64).T
    if x_zero_point is not None:
        total -= x_zero_point.view(type).astype(np.int64)[:, None] * codes.sum(axis=1, dtype=np.int64)
    by_token = arithmetic.mul(total.astype(np.float32), arithmetic.widened(x_scale, plan.dtype)[:, None])
    return _finished(plan, arithmetic.mul(by_token, scale), inputs or {})


# Rows -----------------------------------------------------------------------------------------------------------------


def row(plan: RowPlan, inputs: Mapping[str, U16], signs: NDArray[np.bool_] | None = None) -> dict[str, NDArray[Any]]:
    """Return what the kernel writes, by the names of its parameters: kept, y, codes, scale, zero_point.

    inputs: in0, … [m, n] and v0, … [n] as bits. signs: [n], true for minus.
    """
    values = {name: arithmetic.widened(each, plan.dtype) for name, each in inputs.items()}
    x = evaluated(plan.prologue, values, plan.dtype)
    written: dict[str, NDArray[Any]] = {}
    if plan.keep:
        written["kept"] = arithmetic.narrowed(x, plan.dtype)
    if plan.norm != "none":
        x = _normalized(plan, x)
    if plan.affine != "x":
        x = evaluated(plan.affine, {**values, "x": x}, plan.dtype)
    if plan.block:
        x = _rotated(plan, x, signs)
    if plan.output == "half":
        return {**written, "y": arithmetic.narrowed(x, plan.dtype)}
    return {**written, **_quantized(plan, x)}


def _held_elements(plan: RowPlan, x: F32) -> F32:
    """Return x [m, n] as the threads hold it, [m, threads, per_thread]; 0 where a thread holds nothing."""
    m = len(x)
    if not plan.block:
        full = np.zeros((m, plan.repeats * plan.threads * plan.width), np.float32)
        full[:, : plan.n] = x
        return full.reshape(m, plan.repeats, plan.threads, plan.width).swapaxes(1, 2).reshape(m, plan.threads, -1)
    upper = plan.held - 3
    blocks = x.reshape(m, plan.n // plan.block, 1 << upper, -1, 8).swapaxes(2, 3)
    held = np.zeros((m, plan.threads, plan.per_thread), np.float32)
    held[:, : plan.workers] = blocks.reshape(m, plan.workers, plan.per_thread)
    return held


def _over_row(each: NDArray[Any], combine: Callable[[Any, Any], Any]) -> NDArray[Any]:
    """Combine [m, threads] as shuffles and then warps do; return [m, 1]."""
    lanes = each.reshape(len(each), -1, 32)
    for distance in (16, 8, 4, 2, 1):
        lanes = combine(lanes, lanes[:, :, np.arange(32) ^ distance])
    total = lanes[:, :1, 0]
    for warp in range(1, lanes.shape[1]):
        total = combine(total, lanes[:, warp : warp + 1, 0])
    return total


def _sum(plan: RowPlan, x: F32, square: bool) -> F32:
    held = _held_elements(plan, x)
    total = np.zeros(held.shape[:2], np.float32)
    for i in range(plan.per_thread):
        each = held[:, :, i]
        total = arithmetic.fma(each, each, total) if square else arithmetic.add(total, each)
    return _over_row(total, arithmetic.add)


def _normalized(plan: RowPlan, x: F32) -> F32:
    count = np.float32(plan.n)
    if plan.norm == "layer":
        x = arithmetic.sub(x, arithmetic.div(_sum(plan, x, square=False), count))
    variance = arithmetic.div(_sum(plan, x, square=True), count)
    root = arithmetic.sqrt(arithmetic.add(variance, np.float32(plan.eps)))
    return arithmetic.mul(x, arithmetic.div(np.float32(1), root))


def _rotated(plan: RowPlan, x: F32, signs: NDArray[np.bool_] | None) -> F32:
    if signs is not None and not plan.transpose:
        x = np.where(signs, arithmetic.neg(x), x)
    blocks = x.reshape(-1, plan.block)
    turned: set[int] = set()
    for held in plan.stages:
        for digit in held:
            if digit not in turned:
                pairs = blocks.reshape(len(blocks), -1, 2, 1 << digit)
                low, high = pairs[:, :, 0], pairs[:, :, 1]
                both = arithmetic.add(low, high), arithmetic.sub(low, high)
                blocks = np.stack(both, axis=2).reshape(len(blocks), -1)
        turned.update(held)
    x = blocks.reshape(x.shape)
    if plan.output == "half":
        x = arithmetic.mul(x, _shrink(plan))
    return np.where(signs, arithmetic.neg(x), x) if signs is not None and plan.transpose else x


def _shrink(plan: RowPlan) -> np.float32:
    return np.float32(1 / math.sqrt(plan.block))


def _quantized(plan: RowPlan, x: F32) -> dict[str, NDArray[Any]]:
    """Quantize rows; rotated ones are still √block times too large, and so are range and divisor."""
    least, most = (-128, 127) if plan.output == "int8" else (0, 255)
    if not plan.zero_points:
        sizes = arithmetic.absolute(x).view(np.uint32).max(axis=1, keepdims=True)
        step = arithmetic.div(sizes.view(np.float32), np.float32(127))
        step = arithmetic.mul(step, _shrink(plan)) if plan.block else step
        step = np.where(step < np.finfo(np.float32).tiny, np.float32(1), step)
        step = np.where(sizes >= 0x7F800000, np.float32(np.nan), step)
    else:
        zeros = np.zeros((len(x), 1), np.float32)
        with np.errstate(invalid="ignore"):
            low = np.concatenate([zeros, x], axis=1).min(axis=1, keepdims=True)
            high = np.concatenate([zeros, x], axis=1).max(axis=1, keepdims=True)
        step = arithmetic.div(arithmetic.sub(high, low), np.float32(255))
        step = arithmetic.mul(step, _shrink(plan)) if plan.block else step
    scale = arithmetic.narrowed(step, plan.dtype)
    step = arithmetic.widened(scale, plan.dtype)
    if plan.zero_points:
        step = np.where(step == 0, np.float32(1), step)
        scale = arithmetic.narrowed(step, plan.dtype)
    divisor = arithmetic.div(step, _shrink(plan)) if plan.block else step
    steps = arithmetic.to_int(arithmetic.div_by(x, divisor, arithmetic.div(np.float32(1), divisor)))
    written: dict[str, NDArray[Any]] = {"scale": scale[:, 0]}
    if plan.zero_points:
        zero = arithmetic.to_int(arithmetic.sub(np.float32(least), arithmetic.div(low, divisor))).clip(least, most)
        steps = steps.clip(-512, 512) + zero
        written["zero_point"] = zero[:, 0].astype(np.int16).astype(np.uint8)
    return {**written, "codes": steps.clip(least, most).astype(np.int16).astype(np.uint8)}
