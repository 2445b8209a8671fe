"""Products of dequantized values over more than two axes, with a bias.

    MatMul(DQ(x), DQ(w)) + DQ(b)   ->   Reshape, Gemm, Reshape   the kernel adds the bias and writes integers; as MatMul
                                                                 and Add the runtime does so for static shapes only
    MatMul(DQ(x), DQ(w)) + b       ->   + b as [1, ..., n]       with [n] the runtime merges both into a float Gemm
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx.cleanup.editor import Editor, constant, constant_dequantize, producer


def shape_products(editor: Editor) -> None:
    """Rewrite every product of a dequantized value and a dequantized weight to which a bias is added."""
    rows: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in editor.nodes:
        product = producer(node, 0) if node.op_type == "Add" else None
        if product is None or product.op_type != "MatMul" or _read_elsewhere(product):
            continue
        left, right = producer(product, 0), producer(product, 1)
        if left is None or left.op_type != "DequantizeLinear" or not constant_dequantize(right):
            continue
        x, weight, bias = product.inputs[0], product.inputs[1], node.inputs[1]
        if x is None or x.shape is None or len(x.shape) <= 2 or bias is None or weight is None:
            continue
        maker = bias.producer()
        if constant(bias) and maker is None and _is_row(bias):
            node.replace_input_with(1, _as_row(editor, bias, len(x.shape), rows))
        elif maker is not None and constant_dequantize(maker) and _is_row(maker.inputs[0]):
            _flatten(editor, node, product, bias)
    editor.remove_dead()
    for (bias, _), row in rows.items():
        if bias.name is not None and bias.name not in editor.model.graph.initializers:
            row.name = bias.name


def _read_elsewhere(product: ir.Node) -> bool:
    return len(product.outputs[0].uses()) != 1 or product.outputs[0].is_graph_output()


def _is_row(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 1


def _as_row(editor: Editor, bias: ir.Value, rank: int, rows: dict[tuple[ir.Value, int], ir.Value]) -> ir.Value:
    """Return the bias as [1, ..., n]; linears over as many axes share it."""
    key = (bias, rank)
    if key not in rows:
        assert bias.const_value is not None
        rows[key] = editor.initializer(bias.const_value.numpy().reshape([1] * (rank - 1) + [-1]), f"{bias.name}_row")
    return rows[key]


def _flatten(editor: Editor, node: ir.Node, product: ir.Node, bias: ir.Value) -> None:
    x, weight = product.inputs
    assert x is not None and x.shape is not None and weight is not None
    inner, outer = _size(weight, 0), _size(weight, 1)
    dtype, stem = node.outputs[0].dtype, str(node.name).partition("/")[0]
    rows = editor.initializer(np.array([-1, inner], dtype=np.int64), f"{stem}/rows")
    flat = editor.insert(node, "Reshape", [x, rows], f"{stem}/flat", x.dtype)
    gemm = editor.insert(node, "Gemm", [flat, weight, bias], f"{stem}/Gemm", dtype)
    back = editor.insert(node, "Reshape", [gemm, _shape(editor, node, x, outer, stem)], f"{stem}/back", dtype)
    editor.take_place(node, back)


def _shape(editor: Editor, node: ir.Node, x: ir.Value, outer: int, stem: str) -> ir.Value:
    """Return the shape [..., outer] with the leading sizes of x."""
    assert x.shape is not None
    leading = list(x.shape)[:-1]
    unknown = [index for index, size in enumerate(leading) if not isinstance(size, int)]
    if len(unknown) <= 1:
        sizes = [size if isinstance(size, int) else -1 for size in leading]
        return editor.initializer(np.array([*sizes, outer], dtype=np.int64), f"{stem}/shape")
    # The sizes of the codes, so that the dequantize in between keeps its one reader.
    maker = x.producer()
    source = maker.inputs[0] if maker is not None else x
    sizes_of = editor.insert(node, "Shape", [source], f"{stem}/sizes", ir.DataType.INT64, end=-1)
    last = editor.initializer(np.array([outer], dtype=np.int64), f"{stem}/columns")
    return editor.insert(node, "Concat", [sizes_of, last], f"{stem}/shape", ir.DataType.INT64, axis=0)


def _size(weight: ir.Value, axis: int) -> int:
    """Return a dimension of a dequantized weight."""
    maker = weight.producer()
    assert maker is not None and maker.inputs[0] is not None and maker.inputs[0].shape is not None
    return int(maker.inputs[0].shape[axis])  # type: ignore[arg-type]
