"""Weights in the layout that the operator reads.

    Transpose(w)              ->   w^T stored, under the name of w
    Transpose(DQ(w))          ->   DQ(w^T), its axis and blocks transposed with it
    Gemm(x, DQ(w), transB=1)  ->   Gemm(x, Transpose(DQ(w))), unless x has a fixed scale: MatMulInteger and MatMulNBits
                                   want [in, out], a QGemm takes both

A runtime matches Q/DQ patterns only where the dequantize itself feeds the operator. A weight that somebody reads in its
own layout too (a table tied to the head) is stored once: the transpose stands on the codes, where loading computes it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx.cleanup.editor import (
    Editor,
    axis_of,
    block_size,
    constant,
    constant_dequantize,
    flag,
    producer,
)

Order = tuple[int, ...]


def open_gemms(editor: Editor) -> None:
    """Give a Gemm whose weight is dequantized, and whose input is not (or dynamically), an explicit transpose."""
    for node in editor.nodes:
        if node.op_type != "Gemm" or not flag(node, "transB") or flag(node, "transA"):
            continue
        left, right = producer(node, 0), producer(node, 1)
        if right is None or not constant_dequantize(right):
            continue
        if left is not None and left.op_type == "DequantizeLinear" and not _dynamic(left):
            continue
        weight = right.outputs[0]
        turned = editor.insert(node, "Transpose", [weight], f"{node.name}/Transpose", weight.dtype, perm=[1, 0])
        node.replace_input_with(1, turned)
        node.attributes["transB"] = ir.AttrInt64("transB", 0)


def _dynamic(dequantize: ir.Node) -> bool:
    maker = producer(dequantize, 1)
    return maker is not None and maker.op_type == "DynamicQuantizeLinear"


def store_transposed(editor: Editor) -> None:
    """Remove every transpose of a weight from the graph, or move it in front of the dequantize."""
    transposes = [node for node in editor.nodes if node.op_type == "Transpose" and "perm" in node.attributes]
    stored = _Stored(editor)
    for node in transposes:
        source, maker, order = node.inputs[0], producer(node, 0), tuple(node.attributes["perm"].as_ints())
        if source is None or node.outputs[0].is_graph_output():
            continue
        if constant(source) and maker is None:
            if not _all_readers_transpose(source, order):
                continue
            new = stored.value(source, order, node)
        elif maker is not None and constant_dequantize(maker):
            new = _dequantize_transposed(editor, node, maker, order, stored)
            if _would_be_misread(node, maker, order):
                new = editor.insert(node, "Sum", [new], f"{maker.name}/Sum", new.dtype)
        else:
            continue
        node.outputs[0].replace_all_uses_with(new)
        editor.remove(node)
    editor.remove_dead()
    stored.take_names()


def _would_be_misread(transpose: ir.Node, dequantize: ir.Node, order: Order) -> bool:
    """True where the runtime's product of codes would take the weight's scales for one per column, which they are not.

    It looks at the operators only, and fails or computes something else. A sum of one term, the plainest operator that
    no optimizer removes or moves, keeps it away.
    """
    scale = dequantize.inputs[1]
    one = scale is not None and scale.shape is not None and len(scale.shape) == 0
    if one or (not block_size(dequantize) and order.index(axis_of(dequantize) % len(order)) == len(order) - 1):
        return False
    for reader, index in transpose.outputs[0].uses():
        other = producer(reader, 0)
        if reader.op_type == "MatMul" and index == 1 and other is not None and other.op_type == "DequantizeLinear":
            return True
    return False


def _all_readers_transpose(weight: ir.Value, order: Order) -> bool:
    """True where whoever reads the weight, through a dequantize or directly, wants it in `order`."""
    if weight.is_graph_output():
        return False
    for reader, _ in weight.uses():
        if reader.op_type == "Transpose":
            if tuple(reader.attributes["perm"].as_ints()) != order or reader.outputs[0].is_graph_output():
                return False
        elif reader.op_type == "DequantizeLinear":
            value = reader.outputs[0]
            onward = value.uses()
            if value.is_graph_output() or any(
                each.op_type != "Transpose" or tuple(each.attributes["perm"].as_ints()) != order for each, _ in onward
            ):
                return False
        else:
            return False
    return True


class _Stored:
    """Weights in new layouts, each made once."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.made: dict[tuple[int, Order], ir.Value] = {}
        self.names: dict[ir.Value, str] = {}
        self.replaced: list[tuple[ir.Node, ir.Node]] = []
        self._sources: list[ir.Value] = []  # keeps the ids above from being used again

    def value(self, source: ir.Value, order: Order, before: ir.Node) -> ir.Value:
        """Return `source` transposed: stored where nobody reads it otherwise, else computed by a Transpose."""
        key = (id(source), order)
        if key not in self.made:
            self._sources.append(source)
            assert source.const_value is not None and source.name is not None
            if _all_readers_transpose(source, order):
                array = np.transpose(source.const_value.numpy(), order)
                new = self.editor.initializer(array, f"{source.name}_transposed", source.const_value.dtype)
                self.names[new] = source.name
            else:
                # In front of everything: the first reader met need not be the first in order.
                first = self.editor.nodes[0]
                name = f"{source.name}_transposed"
                new = self.editor.insert(first, "Transpose", [source], name, source.const_value.dtype, perm=list(order))
                turned = new.producer()
                assert turned is not None
                turned.metadata_props.clear()
                sizes = source.const_value.numpy().shape
                new.shape = ir.Shape([sizes[axis] for axis in order])
            self.made[key] = new
        return self.made[key]

    def take_names(self) -> None:
        """Call what replaced a weight, or its dequantize, by the name of that."""
        for value, name in self.names.items():
            if name not in self.editor.model.graph.initializers and value.is_initializer():
                value.name = name
        for new, old in self.replaced:
            if old.graph is None and old.name is not None:
                new.name = new.outputs[0].name = old.name
                old.name = None


def _dequantize_transposed(editor: Editor, node: ir.Node, maker: ir.Node, order: Order, stored: _Stored) -> ir.Value:
    codes, scale, *rest = maker.inputs
    assert codes is not None and scale is not None
    axis = order.index(axis_of(maker) % len(order))
    inputs: list[ir.Value | None] = [_moved(codes, order, stored, node), scale, *rest]
    attributes = {"axis": axis}
    if block_size(maker):
        attributes["block_size"] = block_size(maker)
        inputs[1:] = [None if each is None else _moved(each, order, stored, node) for each in (scale, *rest)]
    value = editor.insert(node, "DequantizeLinear", inputs, str(maker.name), maker.outputs[0].dtype, **attributes)
    value.shape = node.outputs[0].shape
    new = value.producer()
    assert new is not None
    new.metadata_props.update(maker.metadata_props)
    stored.replaced.append((new, maker))
    return value


def _moved(value: ir.Value, order: Order, stored: _Stored, before: ir.Node) -> ir.Value:
    """Return a constant in the new order; one that is a transpose already is turned from its own source."""
    maker = value.producer()
    if maker is None:
        return stored.value(value, order, before)
    first = tuple(maker.attributes["perm"].as_ints())
    source = maker.inputs[0]
    assert source is not None
    both = tuple(first[axis] for axis in order)
    return source if both == tuple(range(len(both))) else stored.value(source, both, before)
