"""Activations behind products with weights that only the file holds as integers.

    relu(Gemm(x, DQ(w), b))         ->   relu(Sum(MatMul(x, DQ(w)), b))
    relu(MatMul(x, DQ(w)) + b)      ->   relu(Sum(MatMul(x, DQ(w)), b))
    relu(MatMul(x, DQ(w)))          ->   relu(Sum(MatMul(x, DQ(w))))

The runtime would merge Gemm and activation, for which it also makes a Gemm of MatMul and Add, before it looks for the
packed kernel (MatMulNBits); and it takes no product for that kernel whose only reader is a Relu or a Clip. Sum is
merged with nothing; of one value it is a copy.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx.cleanup.editor import Editor, constant_dequantize, flag, producer

_MERGED = frozenset((
    "Clip", "Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh",
    "ThresholdedRelu",
))  # fmt: skip


def keep_activations_apart(editor: Editor) -> None:
    """Rewrite every product of a float value and a dequantized weight that an activation alone reads."""
    for node in editor.nodes:
        source = producer(node, 0) if node.op_type in _MERGED else None
        if source is None or len(source.outputs[0].uses()) > 1 or source.outputs[0].is_graph_output():
            continue
        product = producer(source, 0) if source.op_type == "Add" else source
        if product is None or not _packed(product) or len(product.outputs[0].uses()) > 1:
            continue
        dtype, addends = source.outputs[0].dtype, list(source.inputs[1:2])
        total = product.outputs[0]
        if product.op_type == "Gemm":
            addends = list(product.inputs[2:3])
            total = editor.insert(product, "MatMul", list(product.inputs[:2]), f"{product.name}/MatMul", dtype)
        elif source is product:
            addends = []
            total = editor.insert(product, "MatMul", list(product.inputs), f"{product.name}/MatMul", dtype)
        values = [total, *(each for each in addends if each is not None)]
        editor.take_place(source, editor.insert(source, "Sum", values, f"{source.name}/Sum", dtype))


def _packed(product: ir.Node) -> bool:
    """True for a plain product of a float value and a constant that is dequantized."""
    left = producer(product, 0)
    if left is not None and left.op_type == "DequantizeLinear":
        return False
    if product.op_type == "Gemm":
        plain = all(flag(product, name, 1) == 1 for name in ("alpha", "beta"))
        if not plain or any(flag(product, name) for name in ("transA", "transB")):
            return False
    return product.op_type in ("Gemm", "MatMul") and constant_dequantize(producer(product, 1))
