"""The `graphopt::` dialect: quantized numerics as five torch operators.

    codes        = quantize(x, scale, zero_point?, axis, group_size, format)
    x'           = dequantize(codes, scale, zero_point?, table?, axis, group_size, format)
    scale, zero  = dynamic_scale(x, axis, group_size, format)
    x'           = fake_quantize(x, scale, zero_point?, axis, group_size, format)      dequantize(quantize(x)), trainable
    y            = linear/conv/...  stay ATen: integer execution is what a backend makes of dequantize -> op -> quantize

Granularity follows from `scale` and `group_size` (K = size of `axis`):

    per tensor     scale []                        group_size 0
    per channel    scale [K]                       group_size 0
    per group      scale [..., ceil(K/g), ...]     group_size g > 0   blocks of g along `axis`; the last may be short
    per token      scale [..., 1, ...]             group_size -1      one block is all of `axis` (the last axis: a token)

`format` names a grid (`graphopt.quantization.grids`). `table` is for codebook grids; no integer grid takes one.
Every operator is an ATen composite, so any backend can decompose it (`decomposition_table`), has a fake rule for tracing,
and `dequantize` and `fake_quantize` have gradients: straight-through for x inside the range, exact for scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.quantization.grids import grid

LIBRARY = torch.library.Library("graphopt", "DEF")
LIBRARY.define("quantize(Tensor x, Tensor scale, Tensor? zero_point, int axis, int group_size, str format) -> Tensor")
LIBRARY.define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? table, int axis, int group_size, str format) -> Tensor"
)
LIBRARY.define("dynamic_scale(Tensor x, int axis, int group_size, str format) -> (Tensor, Tensor)")
LIBRARY.define("fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, int axis, int group_size, str format) -> Tensor")


def spread(parameter: Tensor, x: Tensor, axis: int, group_size: int) -> Tensor:
    """Return `parameter` (a scale or zero point) shaped so that it broadcasts against `x` [..., K, ...]."""
    if group_size == 0:
        if parameter.dim() == 0:
            return parameter
        shape = [1] * x.dim()
        shape[axis] = parameter.shape[0]
        return parameter.reshape(shape)
    if group_size < 0 or parameter.shape[axis] == 1:
        return parameter
    wide = parameter.repeat_interleave(group_size, dim=axis)
    return wide.narrow(axis, 0, x.shape[axis])


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group_size: int, format: str) -> Tensor:
    zero = None if zero_point is None else spread(zero_point, x, axis, group_size)
    return grid(format).encode(x, spread(scale, x, axis, group_size), zero)


def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, axis: int, group_size: int, format: str
) -> Tensor:
    if table is not None:
        raise GraphoptError(f"the integer grid {format!r} takes no table; pass table=None")
    zero = None if zero_point is None else spread(zero_point, codes, axis, group_size)
    return grid(format).decode(codes, spread(scale, codes, axis, group_size), zero)


def _dynamic_scale(x: Tensor, axis: int, group_size: int, format: str) -> tuple[Tensor, Tensor]:
    """Range of what is there: min and max per tensor (group_size 0) or per block of `axis`, zero always inside.

    The arithmetic is ONNX DynamicQuantizeLinear's, so that a runtime's operator gives the same codes.
    """
    target = grid(format)
    if group_size == 0:
        low, high = x.amin(), x.amax()
    else:
        low, high = _block_range(x, axis, group_size)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (target.code_max - target.code_min)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (target.code_min - low / scale).round().clamp(target.code_min, target.code_max)
    return scale, zero_point.to(target.storage)


def _block_range(x: Tensor, axis: int, group_size: int) -> tuple[Tensor, Tensor]:
    size = x.shape[axis]
    if group_size < 0 or group_size >= size:
        return x.amin(dim=axis, keepdim=True), x.amax(dim=axis, keepdim=True)
    blocks = x.split(group_size, dim=axis)
    low = torch.cat([block.amin(dim=axis, keepdim=True) for block in blocks], dim=axis)
    high = torch.cat([block.amax(dim=axis, keepdim=True) for block in blocks], dim=axis)
    return low, high


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group_size: int, format: str) -> Tensor:
    codes = _quantize(x, scale, zero_point, axis, group_size, format)
    return _dequantize(codes, scale, zero_point, None, axis, group_size, format).to(x.dtype)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "dynamic_scale": _dynamic_scale,
    "fake_quantize": _fake_quantize,
}
for _name, _function in _IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("graphopt::quantize", lib=LIBRARY)
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group_size: int, format: str) -> Tensor:
    return torch.empty_like(x, dtype=grid(format).storage)


@torch.library.register_fake("graphopt::dequantize", lib=LIBRARY)
def _(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, axis: int, group_size: int, format: str
) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.register_fake("graphopt::dynamic_scale", lib=LIBRARY)
def _(x: Tensor, axis: int, group_size: int, format: str) -> tuple[Tensor, Tensor]:
    shape: list[Any] = []
    if group_size != 0:
        shape = list(x.shape)
        shape[axis] = 1 if group_size < 0 else (shape[axis] + group_size - 1) // group_size
    return x.new_empty(shape), x.new_empty(shape, dtype=grid(format).storage)


@torch.library.register_fake("graphopt::fake_quantize", lib=LIBRARY)
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group_size: int, format: str) -> Tensor:
    return torch.empty_like(x)


def _sum_to(gradient: Tensor, parameter: Tensor, axis: int, group_size: int) -> Tensor:
    """Sum `gradient` [..., K, ...] over the elements that share one entry of `parameter`: the adjoint of `spread`."""
    if group_size == 0:
        if parameter.dim() == 0:
            return gradient.sum()
        others = [d for d in range(gradient.dim()) if d != axis % gradient.dim()]
        return gradient.sum(dim=others) if others else gradient
    blocks = gradient.split(gradient.shape[axis] if group_size < 0 else group_size, dim=axis)
    summed = torch.cat([block.sum(dim=axis, keepdim=True) for block in blocks], dim=axis)
    return summed.sum_to_size(parameter.shape)


def _save_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scale, zero_point, _table, ctx.axis, ctx.group_size, _format = inputs
    ctx.save_for_backward(codes, scale, zero_point)


def _dequantize_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point = ctx.saved_tensors
    steps = codes.to(gradient.dtype)
    if zero_point is not None:
        steps = steps - spread(zero_point, codes, ctx.axis, ctx.group_size).to(gradient.dtype)
    to_scale = _sum_to(gradient * steps, scale, ctx.axis, ctx.group_size) if ctx.needs_input_grad[1] else None
    return None, to_scale, None, None, None, None, None


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.axis, ctx.group_size, ctx.format = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through for x inside the range; for scale the rounding residual inside and the clipped code outside.

    Source: "Learned Step Size Quantization" (without its gradient scaling).
    """
    x, scale, zero_point = ctx.saved_tensors
    target = grid(ctx.format)
    wide_scale = spread(scale, x, ctx.axis, ctx.group_size)
    zero = 0.0 if zero_point is None else spread(zero_point, x, ctx.axis, ctx.group_size).to(x.dtype)
    steps = x / wide_scale
    low, high = target.code_min - zero, target.code_max - zero
    inside = (steps >= low) & (steps <= high)
    to_x = gradient * inside if ctx.needs_input_grad[0] else None
    to_scale = None
    if ctx.needs_input_grad[1]:
        clipped = torch.maximum(torch.minimum(steps, torch.as_tensor(high)), torch.as_tensor(low))
        residual = torch.where(inside, steps.round() - steps, clipped)
        to_scale = _sum_to(gradient * residual, scale, ctx.axis, ctx.group_size)
    return to_x, to_scale, None, None, None, None


torch.library.register_autograd(
    "graphopt::dequantize", _dequantize_backward, setup_context=_save_dequantize, lib=LIBRARY
)
torch.library.register_autograd(
    "graphopt::fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize, lib=LIBRARY
)

quantize = torch.ops.graphopt.quantize.default
dequantize = torch.ops.graphopt.dequantize.default
dynamic_scale = torch.ops.graphopt.dynamic_scale.default
fake_quantize = torch.ops.graphopt.fake_quantize.default


def decomposition_table() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return how each operator of the dialect decomposes to ATen, as `ExportedProgram.run_decompositions` takes it."""
    return {getattr(torch.ops.graphopt, name).default: function for name, function in _IMPLEMENTATIONS.items()}
