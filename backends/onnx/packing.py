"""Weights of two to four bits, several in a byte.

A program holds a code in a byte. The file holds codes of up to four bits as INT4 or UINT4, those of two bits as INT2 or
UINT2 where the installed onnx knows these types. Codes that an integer kernel reads stay in their byte: it takes eight
bits only. Where the runtime does not multiply right by weights of a type, they take the next wider one.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from torch import fx

from graphopt.backends.onnx.cleanup.editor import constant_dequantize, producer
from graphopt.backends.onnx.processor import multiplies_packed
from graphopt.ir import Program, arguments, operator
from graphopt.quantization.grids import grid, integer_grid

PACKED_OPSET = 21  # int4, uint4, block_size
_TWO_BIT_OPSET = 25  # int2, uint2
_WIDER = (
    {ir.DataType.INT2: ir.DataType.INT4, ir.DataType.UINT2: ir.DataType.UINT4} if hasattr(ir.DataType, "INT2") else {}
)


def needed_opset(node: fx.Node) -> int:
    """Return the smallest opset with the types and blocks of a dequantize; 0 where any will do."""
    named = arguments(node)
    bits = grid(named["format"]).bits
    if bits <= 2 and _is_weight(node) and two_bits_known():
        return _TWO_BIT_OPSET
    blocks = named["group_size"] > 0
    return PACKED_OPSET if blocks or (bits <= 4 and _is_weight(node)) or bits == 16 else 0


def two_bits_known() -> bool:
    """True where onnx and onnx-ir have the two-bit types."""
    return hasattr(ir.DataType, "INT2") and onnx.defs.onnx_opset_version() >= _TWO_BIT_OPSET


def packed_type(format: str, opset: int) -> ir.DataType | None:
    """Return the type that packs the codes of a grid at `opset`; None where a code takes a byte."""
    form = integer_grid(format)
    if form.bits > 4 or opset < PACKED_OPSET:
        return None
    if form.bits <= 2 and opset >= _TWO_BIT_OPSET and two_bits_known():
        return ir.DataType.INT2 if form.signed else ir.DataType.UINT2
    return ir.DataType.INT4 if form.signed else ir.DataType.UINT4


def pack(program: Program, model: ir.Model) -> None:
    """Store the codes of weights, and their zero points, in the smallest type the file's opset has for them."""
    opset = model.opset_imports[""]
    formats = {
        node.name: packed
        for node in program.graph.nodes
        if operator(node) == "graphopt.dequantize" and (packed := packed_type(arguments(node)["format"], opset))
    }
    wanted = {}
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or node.name not in formats or _feeds_integer_kernel(node):
            continue
        if (packed := _multiplied(node, formats[node.name], opset)) is not None:
            wanted[node] = packed
    # Codes and zero point have one type, and may be shared: all who read them are packed, or none.
    while True:
        kept = {node: packed for node, packed in wanted.items() if all(_only_read_by(v, wanted) for v in _codes(node))}
        if len(kept) == len(wanted):
            break
        wanted = kept
    for node, packed in wanted.items():
        for value in _codes(node):
            if value.dtype != packed:
                _narrow(value, packed)


def _multiplied(dequantize: ir.Node, packed: ir.DataType, opset: int) -> ir.DataType | None:
    """Return the narrowest type, from `packed` on, by which the runtime multiplies right; None where none does."""
    products = [reader for reader, _ in dequantize.outputs[0].uses() if reader.op_type in ("MatMul", "Gemm")]
    shape = dequantize.inputs[0].shape if dequantize.inputs[0] is not None else None
    if not products or shape is None or len(shape) != 2:
        return packed
    channels, block = shape.numpy()[-1], dequantize.attributes.get_int("block_size", 0)
    for candidate in (packed, _WIDER.get(packed)):
        if candidate is not None and multiplies_packed(candidate, channels, block, opset):
            return candidate
    return None


def _codes(dequantize: ir.Node) -> list[ir.Value]:
    return [value for value in (dequantize.inputs[0], *dequantize.inputs[2:]) if value is not None]


def _only_read_by(value: ir.Value, readers: dict[ir.Node, ir.DataType]) -> bool:
    types = {readers.get(reader) if index != 1 else None for reader, index in value.uses()}
    return value.is_initializer() and not value.is_graph_output() and len(types) == 1 and None not in types


def _is_weight(node: fx.Node) -> bool:
    codes = arguments(node)["codes"]
    return isinstance(codes, fx.Node) and codes.op == "get_attr"


def _feeds_integer_kernel(dequantize: ir.Node) -> bool:
    """True where the weight meets a dequantized activation."""
    for reader, index in dequantize.outputs[0].uses():
        other = producer(reader, 0)
        product = reader.op_type in ("MatMul", "Gemm", "Conv") and index == 1
        if product and other is not None and other.op_type == "DequantizeLinear" and not constant_dequantize(other):
            return True
    return False


def _narrow(value: ir.Value, packed: ir.DataType) -> None:
    assert value.const_value is not None
    array = value.const_value.numpy().astype(packed.numpy())
    value.const_value = ir.Tensor(array, dtype=packed, name=value.name)
    value.dtype = packed
