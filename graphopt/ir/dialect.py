# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""The `graphopt::` dialect: quantized numerics as four torch operators, and the rotation that quantization likes.

    codes       = quantize(x, scale, zero_point?, axis, group_size, format)
    x'          = dequantize(codes, scale, zero_point?, table?, axis, group_size, format)
    scale, zero = dynamic_scale(x, axis, group_size, format)
    x'          = fake_quantize(x, scale, zero_point?, axis, group_size, format)     dequantize(quantize(x)), trainable
    x Q         = hadamard(x, small?, signs?, block, transpose)      Q orthogonal, along the last axis, never held whole
    y           = linear/conv/...  stay ATen: integer execution is what a backend makes of dequantize -> op -> quantize

Granularity follows from `scale` and `group_size` (K = size of `axis`); a zero point has the shape of its scale:

    per tensor     scale []                      group_size 0
    per channel    scale [K]                     group_size 0
    per group      scale [..., ceil(K/g), ...]   group_size g > 0   blocks of g along `axis`; the last may be short
    per token      scale [..., 1, ...]           group_size -1      one block is all of `axis` (the last: a token)

`format` names a grid (`graphopt.quantization.grids`). `table` holds a codebook grid's values, [n] or a row [n] for each
entry of the first axis of codes; no other grid takes one, and `quantize` has none: a codebook is for weights.
`hadamard` rotates blocks of the last axis (block 0: all of it) by Q = diag(signs) · (H ⊗ small), or Qᵀ; small is [k, k]
and orthogonal, signs are [n] or [block]; see `graphopt.ir.hadamard`.

`dequantize` gives the dtype of `scale`, `fake_quantize` and `hadamard` that of x. Every operator is an ATen composite,
so any backend can decompose it (`decomposition_table`), and has a fake rule for tracing. `dequantize` and
`fake_quantize` have gradients: straight-through for x inside the range, exact for scale and table. `quantize` and
`dynamic_scale` have none: a dynamic range is a constant to training, as codes are. `hadamard` has one for x; to it
small and signs are constants.

A scale, zero point, table, `small` or `signs` of the wrong shape raises ValueError, an unknown format GraphoptError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.hadamard import split, transform
from graphopt.quantization.grids import grid

LIBRARY = torch.library.Library("graphopt", "DEF")
_WHERE = "int axis=0, int group_size=0, str format='int8'"
LIBRARY.define(f"quantize(Tensor x, Tensor scale, Tensor? zero_point=None, {_WHERE}) -> Tensor")
LIBRARY.define(
    f"dequantize(Tensor codes, Tensor scale, Tensor? zero_point=None, Tensor? table=None, {_WHERE}) -> Tensor"
)
LIBRARY.define(f"dynamic_scale(Tensor x, {_WHERE}) -> (Tensor, Tensor)")
LIBRARY.define(f"fake_quantize(Tensor x, Tensor scale, Tensor? zero_point=None, {_WHERE}) -> Tensor")
LIBRARY.define(
    "hadamard(Tensor x, Tensor? small=None, Tensor? signs=None, int block=0, bool transpose=False) -> Tensor"
)


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


def _gather(gradient: Tensor, parameter: Tensor, axis: int, group_size: int) -> Tensor:
    """Sum `gradient` [..., K, ...] over the elements that share an entry of `parameter`: the adjoint of `spread`."""
    if group_size == 0:
        if parameter.dim() == 0:
            return gradient.sum()
        others = [d for d in range(gradient.dim()) if d != axis % gradient.dim()]
        return gradient.sum(dim=others) if others else gradient
    return _by_block(gradient, axis, group_size, torch.sum).sum_to_size(parameter.shape)


def _by_block(x: Tensor, axis: int, group_size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Return [..., blocks, ...]: every block of `axis` reduced to one element."""
    if group_size < 0:
        return reduce(x, dim=axis, keepdim=True)
    return torch.cat([reduce(block, dim=axis, keepdim=True) for block in x.split(group_size, dim=axis)], dim=axis)


def _block_shape(x: Tensor, axis: int, group_size: int) -> list[Any]:
    """Return the shape of the scale that `dynamic_scale` gives."""
    if group_size == 0:
        return []
    shape: list[Any] = list(x.shape)
    shape[axis] = 1 if group_size < 0 else (shape[axis] + group_size - 1) // group_size
    return shape


def _check(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group_size: int, table: Tensor | None = None
) -> None:
    """Refuse what would broadcast to something that nobody meant; symbolic sizes are taken at their word."""
    if zero_point is not None and _differ(zero_point.shape, scale.shape):
        raise ValueError(
            f"zero_point has shape {list(zero_point.shape)}, scale {list(scale.shape)}; give both one shape"
        )
    if group_size == 0:
        fits = scale.dim() == 0 or not _differ(scale.shape, x.shape[axis:][:1])
        wanted = f"[] or [{x.shape[axis]}]" if x.dim() else "[]"
    else:
        blocks = _block_shape(x, axis, group_size)
        sizes = zip(scale.shape, blocks, strict=False)
        others = [size for size, block in sizes if _differ([size], [block]) and _differ([size], [1])]
        fits = scale.dim() == x.dim() and not others and not _differ([scale.shape[axis]], [blocks[axis]])
        wanted = str(blocks)
    if not fits:
        raise ValueError(
            f"scale has shape {list(scale.shape)}; x of shape {list(x.shape)} along axis {axis} with group_size "
            f"{group_size} takes {wanted}"
        )
    if table is not None and table.dim() == 2 and (x.dim() == 0 or _differ(table.shape[:1], x.shape[:1])):
        raise ValueError(f"table has shape {list(table.shape)}; codes of shape {list(x.shape)} take a row for each [0]")


def _differ(a: Any, b: Any) -> bool:
    a, b = list(a), list(b)
    if len(a) != len(b):
        return True
    return any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a, b, strict=True))


# Values ----------------------------------------------------------------------------------------------------------


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int = 0,
    group_size: int = 0,
    format: str = "int8",
) -> Tensor:
    _check(x, scale, zero_point, axis, group_size)
    zero = None if zero_point is None else spread(zero_point, x, axis, group_size)
    return grid(format).encode(x, spread(scale, x, axis, group_size), zero)


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    table: Tensor | None = None,
    axis: int = 0,
    group_size: int = 0,
    format: str = "int8",
) -> Tensor:
    _check(codes, scale, zero_point, axis, group_size, table)
    zero = None if zero_point is None else spread(zero_point, codes, axis, group_size)
    return grid(format).decode(codes, spread(scale, codes, axis, group_size), zero, table)


def _dynamic_scale(x: Tensor, axis: int = 0, group_size: int = 0, format: str = "int8") -> tuple[Tensor, Tensor]:
    """Range of what is there: min and max per tensor (group_size 0) or per block of `axis`, zero always inside.

    The arithmetic is ONNX DynamicQuantizeLinear's, so that a runtime's operator gives the same codes. Half precision is
    computed in float32, where the width of the range cannot overflow. Where nothing or only zeros is there, scale is 1;
    where NaN or infinity is, scale is not finite either, and the result shows it. A grid that takes no zero point has
    the scale that brings the largest magnitude to its end; its zero points are zeros, to be left out.
    """
    target = grid(format)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = x.numel()
    if isinstance(count, int) and count == 0:
        low = high = wide.new_zeros(_block_shape(x, axis, group_size))
    elif group_size == 0:
        low, high = wide.amin(), wide.amax()
    else:
        low = _by_block(wide, axis, group_size, torch.amin)
        high = _by_block(wide, axis, group_size, torch.amax)
    if not target.affine:
        largest = torch.maximum(low.abs(), high.abs())
        scale = torch.where(largest.isfinite(), target.scale_for(largest), torch.nan).to(x.dtype)
        return scale, torch.zeros_like(scale, dtype=target.storage)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (target.code_max - target.code_min)).to(x.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (target.code_min - low / scale).round().clamp(target.code_min, target.code_max)
    return scale, torch.where(zero_point.isnan(), torch.zeros_like(zero_point), zero_point).to(target.storage)


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int = 0,
    group_size: int = 0,
    format: str = "int8",
) -> Tensor:
    codes = _quantize(x, scale, zero_point, axis, group_size, format)
    return _dequantize(codes, scale, zero_point, None, axis, group_size, format).to(x.dtype)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "dynamic_scale": _dynamic_scale,
    "fake_quantize": _fake_quantize,
    "hadamard": transform,
}
for _name, _function in _IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


# Shapes and dtypes -----------------------------------------------------------------------------------------------


@torch.library.register_fake("graphopt::quantize", lib=LIBRARY)
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int = 0,
    group_size: int = 0,
    format: str = "int8",
) -> Tensor:
    _check(x, scale, zero_point, axis, group_size)
    return torch.empty_like(x, dtype=grid(format).storage)


@torch.library.register_fake("graphopt::dequantize", lib=LIBRARY)
def _(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    table: Tensor | None = None,
    axis: int = 0,
    group_size: int = 0,
    format: str = "int8",
) -> Tensor:
    _check(codes, scale, zero_point, axis, group_size, table)
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.register_fake("graphopt::dynamic_scale", lib=LIBRARY)
def _(x: Tensor, axis: int = 0, group_size: int = 0, format: str = "int8") -> tuple[Tensor, Tensor]:
    shape = _block_shape(x, axis, group_size)
    return x.new_empty(shape), x.new_empty(shape, dtype=grid(format).storage)


@torch.library.register_fake("graphopt::fake_quantize", lib=LIBRARY)
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int = 0,
    group_size: int = 0,
    format: str = "int8",
) -> Tensor:
    _check(x, scale, zero_point, axis, group_size)
    return torch.empty_like(x)


@torch.library.register_fake("graphopt::hadamard", lib=LIBRARY)
def _(
    x: Tensor, small: Tensor | None = None, signs: Tensor | None = None, block: int = 0, transpose: bool = False
) -> Tensor:
    split(x, small, signs, block)
    return x.new_empty(x.shape)  # contiguous, however x lies


# Gradients -------------------------------------------------------------------------------------------------------


def _save_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scale, zero_point, table, ctx.axis, ctx.group_size, ctx.format = inputs
    ctx.save_for_backward(codes, scale, zero_point, table)


def _dequantize_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point, table = ctx.saved_tensors
    to_scale = to_table = None
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if ctx.needs_input_grad[1]:
        zero = None if zero_point is None else spread(zero_point, codes, ctx.axis, ctx.group_size)
        unit = grid(ctx.format).decode(codes, wide.new_ones(()), zero, table)
        to_scale = _gather(wide * unit, scale, ctx.axis, ctx.group_size).to(scale.dtype)
    if table is not None and ctx.needs_input_grad[3]:  # arguments left at their default have no entry
        weighted = wide * spread(scale, codes, ctx.axis, ctx.group_size).to(wide.dtype)
        rows = (1 if table.dim() == 1 else len(table), -1)
        to_table = wide.new_zeros(rows[0], table.shape[-1])
        to_table.scatter_add_(1, codes.reshape(rows).to(torch.int64), weighted.reshape(rows))
        to_table = to_table.reshape(table.shape).to(table.dtype)
    return None, to_scale, None, to_table, None, None, None


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.axis, ctx.group_size, ctx.format = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through for x inside the range; for scale the rounding residual inside and the clipped code outside.

    Source: "Learned Step Size Quantization" (without its gradient scaling). NaN, which has no code, has no gradient.
    """
    x, scale, zero_point = ctx.saved_tensors
    target = grid(ctx.format)
    compute = torch.promote_types(x.dtype, torch.float32)
    wide_scale = spread(scale, x, ctx.axis, ctx.group_size).to(compute)
    zero = None if zero_point is None else spread(zero_point, x, ctx.axis, ctx.group_size)
    steps = x.to(compute) / wide_scale
    shift = 0 if zero is None else zero.to(compute)
    low, high = target.ends
    inside = (steps >= low - shift) & (steps <= high - shift)
    to_x = torch.where(inside, gradient, torch.zeros_like(gradient)) if ctx.needs_input_grad[0] else None
    to_scale = None
    if ctx.needs_input_grad[1]:
        unit = target.decode(target.encode(x, wide_scale, zero), steps.new_ones(()), zero)
        residual = torch.where(inside, unit - steps, unit)
        to_scale = _gather(gradient.to(compute) * residual, scale, ctx.axis, ctx.group_size).to(scale.dtype)
    return to_x, to_scale, None, None, None, None


def _save_hadamard(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, small, signs, ctx.block, ctx.transpose = inputs
    ctx.save_for_backward(small, signs)


def _hadamard_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    small, signs = ctx.saved_tensors
    return hadamard(gradient, small, signs, ctx.block, not ctx.transpose), None, None, None, None


def _mark_constant(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


torch.library.register_autograd(
    "graphopt::dequantize", _dequantize_backward, setup_context=_save_dequantize, lib=LIBRARY
)
torch.library.register_autograd(
    "graphopt::fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize, lib=LIBRARY
)
torch.library.register_autograd("graphopt::hadamard", _hadamard_backward, setup_context=_save_hadamard, lib=LIBRARY)
torch.library.register_autograd(
    "graphopt::quantize", lambda ctx, gradient: (None,) * 6, setup_context=_mark_constant, lib=LIBRARY
)
torch.library.register_autograd(
    "graphopt::dynamic_scale", lambda ctx, *gradients: (None,) * 4, setup_context=_mark_constant, lib=LIBRARY
)

quantize = torch.ops.graphopt.quantize.default
dequantize = torch.ops.graphopt.dequantize.default
dynamic_scale = torch.ops.graphopt.dynamic_scale.default
fake_quantize = torch.ops.graphopt.fake_quantize.default
hadamard = torch.ops.graphopt.hadamard.default


def decomposition_table() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return how each operator decomposes to ATen, in the form that `ExportedProgram.run_decompositions` takes."""
    return {getattr(torch.ops.graphopt, name).default: function for name, function in _IMPLEMENTATIONS.items()}
