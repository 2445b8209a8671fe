"""Lower a Program to an ONNX model.

Through torch.onnx with a translation table for the dialect, not straight to onnx-ir: the exporter knows several hundred
ATen operators at every opset, and Q/DQ are already where they belong, so all that is ours is five operators and the
clean-up (`graphopt.backends.onnx.cleanup`). Its optimizer runs after our clean-up, because it would fold the transposed
weights under names nobody knows.

    graphopt::quantize       QuantizeLinear
    graphopt::dequantize     DequantizeLinear; for codes looked up by row (one block a row) Cast, Sub and Mul
    graphopt::dynamic_scale  DynamicQuantizeLinear
    graphopt::fake_quantize  QuantizeLinear + DequantizeLinear
    adaptive_avg_pool(1)     GlobalAveragePool, which has an integer kernel; ReduceMean has none
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import onnxscript
import onnxscript.optimizer
import torch
from torch import fx

from graphopt.backends.onnx.cleanup import clean
from graphopt.backends.onnx.naming import name_after
from graphopt.errors import GraphoptError
from graphopt.ir import Program, arguments, dialect, operator, source_line, to_exported
from graphopt.quantization.grids import grid

PLAIN_OPSET = 20  # Gelu is an operator from 20 on; Q/DQ of 8 bits need 13
BLOCK_OPSET = 21  # int4, uint4, block_size


def translation_table(opset: int, pools: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how torch.onnx writes the dialect at `opset`; `pools`: every adaptive pool goes to one position."""
    op: Any = onnxscript.opset21 if opset >= BLOCK_OPSET else onnxscript.opset20

    def quantize(
        x: Any, scale: Any, zero_point: Any = None, axis: int = 0, group_size: int = 0, format: str = "int8"
    ) -> Any:
        if group_size != 0:
            raise GraphoptError("ONNX has no quantize by group or token; keep such activations float for this target")
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
        wide = op.CastLike(codes, scale)
        if zero_point is not None:
            wide = op.Sub(wide, op.CastLike(zero_point, scale))
        return op.Mul(wide, scale)

    def dynamic_scale(x: Any, axis: int = 0, group_size: int = 0, format: str = "int8") -> Any:
        if group_size != 0 or format != "uint8":
            raise GraphoptError("ONNX computes scales at run time per tensor in uint8 only")
        _codes, scale, zero_point = op.DynamicQuantizeLinear(x)
        return scale, zero_point

    def fake_quantize(
        x: Any, scale: Any, zero_point: Any = None, axis: int = 0, group_size: int = 0, format: str = "int8"
    ) -> Any:
        codes = quantize(x, scale, zero_point, axis, group_size, format)
        return dequantize(codes, scale, zero_point, None, axis, group_size, format)

    def global_average_pool(self: Any, output_size: Any) -> Any:
        return op.GlobalAveragePool(self)

    table: dict[Callable[..., Any], Callable[..., Any]] = {
        dialect.quantize: quantize,
        dialect.dequantize: dequantize,
        dialect.dynamic_scale: dynamic_scale,
        dialect.fake_quantize: fake_quantize,
    }
    if pools:
        aten = torch.ops.aten
        for pool in (aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d):
            table[pool.default] = global_average_pool
    return table


def lower(program: Program) -> ir.Model:
    """Return the ONNX model of `program`.

    Raises GraphoptError naming the operator and the user's line where ONNX has no form for it.
    """
    opset = needed_opset(program)
    pools = all(_pools_to_one(node) for node in program.graph.nodes)
    model = _export(program, opset, translation_table(opset, pools))
    _drop_default_attributes(model)
    name_after(program, model)
    clean(model)
    with _quiet():
        onnxscript.optimizer.optimize_ir(model, onnx_shape_inference=False)
    _narrow_codes(program, model)
    model.producer_name = "graphopt"
    model.producer_version = None
    return model


def needed_opset(program: Program) -> int:
    """Return the smallest opset that has everything the program needs."""
    for node in program.graph.nodes:
        if operator(node) == "graphopt.dequantize":
            named = arguments(node)
            if named["group_size"] > 0 or _packed_type(node) is not None or grid(named["format"]).bits == 16:
                return BLOCK_OPSET
    return PLAIN_OPSET


def _export(program: Program, opset: int, table: dict[Callable[..., Any], Callable[..., Any]]) -> ir.Model:
    exported = to_exported(program)
    try:
        with _quiet():
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                custom_translation_table=table,  # type: ignore[arg-type]
            )
    except GraphoptError:
        raise
    except Exception as error:
        raise GraphoptError(_why(program, error)) from error
    assert made is not None
    return made.model  # type: ignore[return-value, unused-ignore]


def _why(program: Program, error: Exception) -> str:
    """Return one sentence for the exporter's failure: which operator, and where the user wrote it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for each in reversed(chain):
        if isinstance(each, GraphoptError):
            return str(each)
    text = " ".join(str(each) for each in chain)
    for node in program.graph.nodes:
        if node.op == "call_function" and (str(node.target) in text or f"%{node.name} " in text):
            if "No ONNX function found" in text or "No decompositions registered" in text:
                where = source_line(node)
                return (
                    f"ONNX has no form for the operator {node.target}{f' at {where}' if where else ''}; replace it in the "
                    "model by operators that ONNX has"
                )
    first = next((line.strip() for line in str(chain[-1]).splitlines() if line.strip()), type(chain[-1]).__name__)
    return f"torch.onnx could not export the program: {first}"


def _pools_to_one(node: fx.Node) -> bool:
    return not operator(node).startswith("adaptive_avg_pool") or all(s == 1 for s in arguments(node)["output_size"])


def _drop_default_attributes(model: ir.Model) -> None:
    """Remove the attributes of Q/DQ that hold their defaults: older readers do not know them all."""
    defaults = {"block_size": 0, "output_dtype": 0, "saturate": 1}
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name, default in defaults.items():
                if name in node.attributes and node.attributes[name].value == default:
                    node.attributes.pop(name)


def _packed_type(node: fx.Node) -> ir.DataType | None:
    """Return the ONNX type that packs a weight's codes, or None where they take a byte each."""
    codes = node.args[0]
    if not isinstance(codes, fx.Node) or codes.op != "get_attr":
        return None
    form = grid(arguments(node)["format"])
    if form.bits > 4:
        return None
    return ir.DataType.INT4 if form.signed else ir.DataType.UINT4


def _narrow_codes(program: Program, model: ir.Model) -> None:
    """Store codes of up to four bits, and their zero points, two in a byte."""
    for node in program.graph.nodes:
        if operator(node) != "graphopt.dequantize":
            continue
        packed = _packed_type(node)
        if packed is None:
            continue
        for part in (arguments(node)["codes"], arguments(node)["zero_point"]):
            value = model.graph.initializers.get(str(part.target)) if isinstance(part, fx.Node) else None
            if value is None or value.dtype == packed or value.const_value is None:
                continue
            array = value.const_value.numpy().astype(packed.numpy())
            value.const_value = ir.Tensor(array, dtype=packed, name=value.name)
            value.dtype = packed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines, warnings and log; what matters comes back as an exception."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(logging.NOTSET)
        logger.setLevel(level)
