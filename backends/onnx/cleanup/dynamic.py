"""Products with scales computed at run time, in the form the runtime fuses into one operator, bias included.

    (s, z) = DynamicQuantizeLinear(x); Q(x, s, z)    ->   the codes that DynamicQuantizeLinear computes anyway
    Gemm or MatMul(DQ(codes, s, z), DQ(w, s_w)), b   ->   Cast(MatMulInteger(codes, w, z)) * (s * s_w) + b

A product of two dequantizes whose scale is no constant would run in float.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx.cleanup.editor import (
    Editor,
    axis_of,
    block_size,
    constant_dequantize,
    flag,
    producer,
)

_EIGHT_BIT = (ir.DataType.INT8, ir.DataType.UINT8)


def join_dynamic_quantize(editor: Editor) -> None:
    """Let a QuantizeLinear with the run-time scale and zero point of its own input read that operator's codes."""
    for node in editor.nodes:
        maker = producer(node, 1) if node.op_type == "QuantizeLinear" else None
        if maker is None or maker.op_type != "DynamicQuantizeLinear" or node.outputs[0].is_graph_output():
            continue
        if maker.inputs[0] is not node.inputs[0] or tuple(node.inputs[1:]) != tuple(maker.outputs[1:]):
            continue
        codes, name = maker.outputs[0], node.outputs[0].name
        codes.type, codes.shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(codes)
        editor.remove(node)
        codes.name = name


def spell_dynamic_products(editor: Editor) -> None:
    """Spell products of a dynamically quantized value and a weight of eight bits as MatMulInteger."""
    for node in editor.nodes:
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        left, right = producer(node, 0), producer(node, 1)
        if left is None or right is None or left.op_type != "DequantizeLinear" or not constant_dequantize(right):
            continue
        source = producer(left, 0)
        if source is None or source.op_type != "DynamicQuantizeLinear" or producer(left, 1) is not source:
            continue
        if _scales_columns(right) and _plain(node):
            _spell(editor, node, left, right)


def _scales_columns(weight: ir.Node) -> bool:
    """True where one scale serves all, or one each column of [in, out]: then scaling commutes with the product."""
    codes, scale = weight.inputs[:2]
    if codes is None or scale is None or codes.dtype not in _EIGHT_BIT or block_size(weight):
        return False
    if codes.shape is None or scale.shape is None or len(codes.shape) != 2:
        return False
    return len(scale.shape) == 0 or axis_of(weight) % 2 == 1


def _plain(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        return True
    turned = flag(node, "transA") or flag(node, "transB")
    return not turned and flag(node, "alpha", 1) == 1 and flag(node, "beta", 1) == 1


def _spell(editor: Editor, node: ir.Node, left: ir.Node, right: ir.Node) -> None:
    codes, scale, zero_point = left.inputs
    weight, weight_scale, *rest = right.inputs
    result, stem = node.outputs[0], str(node.name).partition("/")[0]
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    operands = [codes, weight, zero_point, *rest]
    product = editor.insert(node, "MatMulInteger", operands, f"{stem}/MatMulInteger", ir.DataType.INT32)
    wide = editor.insert(node, "Cast", [product], f"{stem}/Cast", result.dtype, to=int(ir.DataType.FLOAT))
    # The scale of x first: the other order is not recognised.
    scales = editor.insert(node, "Mul", [scale, weight_scale], f"{stem}/scale", result.dtype)
    final = editor.insert(node, "Mul", [wide, scales], f"{stem}/Mul", result.dtype)
    if bias is not None:
        final = editor.insert(node, "Add", [final, bias], f"{stem}/Add", result.dtype)
    editor.take_place(node, final)
