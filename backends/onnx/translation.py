"""How torch.onnx writes the dialect, and what of it ONNX cannot say.

    graphopt::quantize       QuantizeLinear
    graphopt::dequantize     DequantizeLinear; for codes looked up by row (one block a row) Cast, Sub and Mul
    graphopt::dynamic_scale  DynamicQuantizeLinear
    graphopt::fake_quantize  QuantizeLinear + DequantizeLinear
    graphopt::hadamard       a Mul for the signs, and a MatMul by a constant for each stage, between two or more Reshape
    adaptive_avg_pool to 1   GlobalAveragePool, which has an integer kernel; ReduceMean has none
    attention                MatMul, Softmax, MatMul (`attention`)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor
from torch.export import ExportedProgram

from graphopt.backends.onnx.attention import attention
from graphopt.backends.onnx.packing import PACKED_OPSET
from graphopt.errors import NotExpressible
from graphopt.ir import Program, arguments, dialect, operator, source_line
from graphopt.ir.hadamard import Kernels, stage_matrix, stages
from graphopt.quantization.grids import IntegerGrid, grid

_LIBRARY = torch.library.Library("graphopt_onnx", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("global_average_pool(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


_LIBRARY.impl("global_average_pool", _global_average_pool, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
global_average_pool = torch.ops.graphopt_onnx.global_average_pool.default
_POOLS = {"adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3}


def single_out_global_pools(exported: ExportedProgram) -> None:
    """Give pools to one position an operator of their own: a translation cannot choose by an operator's arguments."""
    for node in exported.graph.nodes:
        axes = _POOLS.get(operator(node))
        # Without a batch axis GlobalAveragePool would take the channels for it.
        if axes is None or node.args[0].meta["val"].dim() != axes + 2:
            continue
        if all(size == 1 for size in arguments(node)["output_size"]):
            node.target, node.args = global_average_pool, node.args[:1]


def refuse(program: Program) -> None:
    """Raise NotExpressible for the first use of the dialect that ONNX has no form for."""
    for node in program.graph.nodes:
        name = operator(node)
        if not name.startswith("graphopt."):
            continue
        named = arguments(node)
        where = source_line(node)
        place = f"{node.name}{f' ({where})' if where else ''}"
        if "format" in named and not isinstance(grid(named["format"]), IntegerGrid):
            raise NotExpressible(
                f"ONNX files hold integer codes here, {place} has {named['format']}; choose an integer grid"
            )
        if name in ("graphopt.quantize", "graphopt.fake_quantize") and named["group_size"] != 0:
            kind = "token" if named["group_size"] < 0 else "group"
            raise NotExpressible(
                f"ONNX cannot quantize activations by {kind}, as {place} does; do it per tensor or keep them float"
            )
        if name == "graphopt.dynamic_scale" and (named["group_size"] != 0 or named["format"] != "uint8"):
            raise NotExpressible(
                f"ONNX computes scales at run time per tensor in uint8 only, unlike {place}; use that, or keep it float"
            )


def translation_table(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how torch.onnx writes the dialect at `opset`."""
    op: Any = onnxscript.opset21 if opset >= PACKED_OPSET else onnxscript.opset20

    def quantize(
        x: Any, scale: Any, zero_point: Any = None, axis: int = 0, group_size: int = 0, format: str = "int8"
    ) -> Any:
        return op.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(
        codes: Any,
        scale: Any,
        zero_point: Any = None,
        table: Any = None,
        axis: int = 0,
        group_size: int = 0,
        format: str = "int8",
    ) -> Any:
        if group_size == 0:
            return op.DequantizeLinear(codes, scale, zero_point, axis=axis)
        if group_size > 0:
            return op.DequantizeLinear(codes, scale, zero_point, axis=axis, block_size=group_size)
        float_type = int(scale.dtype or ir.DataType.FLOAT)
        wide = op.Cast(codes, to=float_type)
        if zero_point is not None:
            wide = op.Sub(wide, op.Cast(zero_point, to=float_type))
        return op.Mul(wide, scale)

    def dynamic_scale(x: Any, axis: int = 0, group_size: int = 0, format: str = "int8") -> Any:
        _codes, scale, zero_point = op.DynamicQuantizeLinear(x)
        return scale, zero_point

    def fake_quantize(
        x: Any, scale: Any, zero_point: Any = None, axis: int = 0, group_size: int = 0, format: str = "int8"
    ) -> Any:
        codes = quantize(x, scale, zero_point, axis, group_size, format)
        return dequantize(codes, scale, zero_point, None, axis, group_size, format)

    def hadamard(x: Any, small: Any = None, signs: Any = None, block: int = 0, transpose: bool = False) -> Any:
        return _hadamard(op, x, small, signs, block, transpose)

    def pool(x: Any) -> Any:
        return op.GlobalAveragePool(x)

    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        return attention(op, query, key, value, attn_mask, is_causal, scale, enable_gqa)

    return {
        dialect.quantize: quantize,
        dialect.dequantize: dequantize,
        dialect.dynamic_scale: dynamic_scale,
        dialect.fake_quantize: fake_quantize,
        dialect.hadamard: hadamard,
        global_average_pool: pool,
        torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    }


def _hadamard(op: Any, x: Any, small: Any, signs: Any, block: int, transpose: bool) -> Any:
    """Write x [..., n] as [..., n/block, m_1, ..., m_last] and multiply each axis by the matrix of its stage.

    Leading axes are zeros to Reshape, which copies them, so any of them may be dynamic. The axis before the last one is
    multiplied from the left, which needs no transposed copy.
    """
    compute = ir.DataType.DOUBLE if x.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    lead, size = [0] * (len(x.shape) - 1), x.shape[-1]
    block = block or size
    k = 1 if small is None else small.shape[0]
    groups = stages(block // k, k)
    # [n] where there is one block; -1 is what n/block is where n is symbolic.
    blocks = [] if block == size else [size // block if isinstance(size, int) else -1]
    by_coordinate = signs is not None and signs.shape[0] != block

    def cast(value: Any) -> Any:
        return value if value.dtype == compute else op.Cast(value, to=int(compute))

    def shaped(value: Any, now: list[int], wanted: list[int]) -> tuple[Any, list[int]]:
        return (value, now) if now == wanted else (op.Reshape(value, lead + wanted), wanted)

    whole = [size if isinstance(size, int) else -1]
    made, shape = cast(x), whole
    if by_coordinate and not transpose:
        made = op.Mul(made, cast(signs))
    if signs is not None and not by_coordinate and not transpose:
        made, shape = shaped(made, shape, [*blocks, block])
        made = op.Mul(made, cast(signs))
    rest, done = block, list(blocks)
    for group in groups[:-1]:
        order = math.prod(group)
        rest //= order
        made, shape = shaped(made, shape, [*done, order, rest])
        made = op.MatMul(_constant(op, group, compute, not transpose), made)
        done.append(order)
    made, shape = shaped(made, shape, [*done, rest])
    made = op.MatMul(made, _last_matrix(op, groups[-1], small and cast(small), k, compute, transpose))
    if signs is not None and not by_coordinate and transpose:
        made, shape = shaped(made, shape, [*blocks, block])
        made = op.Mul(made, cast(signs))
    made, shape = shaped(made, shape, whole)
    if by_coordinate and transpose:
        made = op.Mul(made, cast(signs))
    return made if x.dtype == compute else op.Cast(made, to=int(x.dtype))


def _constant(op: Any, group: Kernels, dtype: ir.DataType, transposed: bool) -> Any:
    """Return the matrix of a stage, which is known here and so is a constant of the file."""
    matrix = stage_matrix(group).T if transposed else stage_matrix(group)
    return op.Constant(value=ir.tensor(np.ascontiguousarray(matrix, dtype=dtype.numpy())))


def _last_matrix(op: Any, group: Kernels, small: Any, k: int, dtype: ir.DataType, transpose: bool) -> Any:
    """Return the Kronecker product of the last stage and `small`; the file's optimizer folds it."""
    if small is None:
        return _constant(op, group, dtype, transpose)
    if not group:
        return op.Transpose(small, perm=[1, 0]) if transpose else small
    order = math.prod(group) * k
    axes = "ij,ab->jbia" if transpose else "ij,ab->iajb"
    return op.Reshape(op.Einsum(_constant(op, group, dtype, False), small, equation=axes), [order, order])
