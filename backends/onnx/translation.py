"""How torch.onnx writes the dialect, and what of it ONNX cannot say.

    graphopt::quantize       QuantizeLinear
    graphopt::dequantize     DequantizeLinear; for codes looked up by row (one block a row) Cast, Sub and Mul
    graphopt::dynamic_scale  DynamicQuantizeLinear
    graphopt::fake_quantize  QuantizeLinear + DequantizeLinear
    adaptive_avg_pool to 1   GlobalAveragePool, which has an integer kernel; ReduceMean has none
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor
from torch.export import ExportedProgram

from graphopt.backends.onnx.packing import PACKED_OPSET
from graphopt.errors import NotExpressible
from graphopt.ir import Program, arguments, dialect, operator, source_line

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

    def pool(x: Any) -> Any:
        return op.GlobalAveragePool(x)

    return {
        dialect.quantize: quantize,
        dialect.dequantize: dequantize,
        dialect.dynamic_scale: dynamic_scale,
        dialect.fake_quantize: fake_quantize,
        global_average_pool: pool,
    }


