"""Attention in ONNX operators, for ONNX Runtime's CPU kernels.

    softmax(q kᵀ s + m) v,  where a row of m that is -inf everywhere gives zeros

The exporter's own form asks every probability whether it is NaN, which costs a sixth to a half of the attention. Only a
row that a mask hides completely can be NaN: without a mask, and with the causal one, there is none; else it is the mask
that is asked, row by row, and the result that is zeroed. A NaN among the inputs stays one, as in torch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir


def attention(
    op: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Write torch's scaled_dot_product_attention of [..., n, d] tensors; `mask` broadcasts to [..., n, m]."""
    rank, dtype, rows, columns = len(query.shape), query.dtype, query.shape[-2], key.shape[-2]
    if enable_gqa:
        key, value = _repeated(op, key, query), _repeated(op, value, query)
    factor = scale if scale is not None else _default_scale(op, query)
    factor = op.CastLike(factor, query) if not isinstance(factor, int | float) else _number(op, factor, dtype)
    turned = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=turned))
    if is_causal:
        mask = _causal(op, scores, rows, columns, dtype)
    hides_rows = mask is not None and not is_causal
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        shown = op.ReduceMax(op.Cast(mask, to=int(ir.DataType.INT32)), _axis(op), keepdims=1) if hides_rows else None
        shown = op.Cast(shown, to=int(ir.DataType.BOOL)) if hides_rows else None
        mask = op.Where(mask, _number(op, 0.0, dtype), _number(op, -math.inf, dtype))
    elif hides_rows:
        largest = op.ReduceMax(mask, _axis(op), keepdims=1)
        shown = op.Not(op.Equal(largest, _number(op, -math.inf, dtype)))
    if mask is not None:
        scores = op.Add(scores, mask)
    result = op.MatMul(op.Softmax(scores, axis=-1), value)
    return op.Where(shown, result, _number(op, 0.0, dtype)) if hides_rows else result


def _number(op: Any, value: float, dtype: Any) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype.numpy()), dtype=dtype))


def _axis(op: Any) -> Any:
    return op.Constant(value_ints=[-1])


def _default_scale(op: Any, query: Any) -> Any:
    size = query.shape[-1]
    if isinstance(size, int):
        return 1.0 / math.sqrt(size)
    return op.Reciprocal(op.Sqrt(op.Cast(op.Shape(query, start=-1), to=int(ir.DataType.FLOAT))))


def _causal(op: Any, scores: Any, rows: Any, columns: Any, dtype: Any) -> Any:
    """Return 0 on and below the diagonal of [rows, columns], -inf above."""
    if isinstance(rows, int) and isinstance(columns, int):
        hidden = np.triu(np.full((rows, columns), -np.inf, dtype=np.float32), 1)
        return op.Constant(value=ir.tensor(hidden.astype(dtype.numpy()), dtype=dtype))
    full = op.Expand(_number(op, -math.inf, dtype), op.Shape(scores, start=-2))
    return op.Trilu(full, op.Constant(value_int=1), upper=1)


def _repeated(op: Any, value: Any, like: Any) -> Any:
    """Return [..., h, n, d] with each of its h heads repeated to as many as `like` has."""
    heads, wanted = value.shape[-3], like.shape[-3]
    if heads == wanted:
        return value
    rank, times = len(value.shape), wanted // heads
    wide = op.Unsqueeze(value, op.Constant(value_ints=[rank - 2]))
    shape = op.Constant(value_ints=[1] * (rank - 2) + [times] + [1, 1])
    wide = op.Expand(wide, shape)
    sizes = [op.Shape(value, start=0, end=rank - 3), op.Constant(value_ints=[wanted]), op.Shape(value, start=rank - 2)]
    return op.Reshape(wide, op.Concat(*sizes, axis=0))
