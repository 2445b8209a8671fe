"""Leave out of the file what says nothing: defaults, copies of zero points, types of dequantized values.

A small model's file is to a good part descriptions. Readers fill in the defaults of attributes, and infer the types of
values behind Q and DQ from what they read; both are stated by the standard.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

_QDQ = ("QuantizeLinear", "DequantizeLinear")


def trim(model: ir.Model) -> None:
    """Remove defaults, inferable types and repeated metadata in place; the file means the same."""
    drop_defaults(model)
    drop_inferable_types(model)
    drop_repeated_metadata(model)


def drop_defaults(model: ir.Model) -> None:
    """Remove attributes that hold the standard's default, and the axis of Q/DQ with one scale for all."""
    opset = model.opset_imports[""]
    for node in model.graph:
        if node.domain:
            continue
        known = onnx.defs.get_schema(node.op_type, opset, "").attributes
        for name, attribute in list(node.attributes.items()):
            if name in known and _is_default(attribute, known[name]):
                node.attributes.pop(name)
        if node.op_type in _QDQ and "axis" in node.attributes and _one_scale(node):
            node.attributes.pop("axis")


def _is_default(attribute: ir.Attr, schema: onnx.defs.OpSchema.Attribute) -> bool:
    default = schema.default_value
    if not default.name or attribute.is_ref():
        return False
    value = onnx.helper.get_attribute_value(default)
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, float):
        return bool(ir.AttrFloat32("", value).value == attribute.value)
    return bool(value == attribute.value)


def _one_scale(node: ir.Node) -> bool:
    scale = node.inputs[1]
    return scale is not None and scale.shape is not None and len(scale.shape) == 0


def share_zero_points(model: ir.Model) -> None:
    """Let Q/DQ of one type and shape read one zero point of zeros, called after what it is."""
    shared: dict[tuple[ir.DataType, tuple[int, ...]], ir.Value] = {}
    taken = set(model.graph.initializers)
    for node in model.graph:
        if node.op_type not in _QDQ or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        value = node.inputs[2]
        if not value.is_initializer() or value.const_value is None or value.is_graph_output():
            continue
        if value.const_value.numpy().any():
            continue
        key = (value.const_value.dtype, value.const_value.numpy().shape)
        if key not in shared:
            name = "_".join(["zero", key[0].name.lower(), *map(str, key[1])])
            if name in taken:
                continue
            taken.add(name)
            tensor = ir.Tensor(value.const_value.numpy(), dtype=key[0], name=name)
            shared[key] = ir.Value(name=name, const_value=tensor, type=value.type, shape=value.shape)
            model.graph.register_initializer(shared[key])
        node.replace_input_with(2, shared[key])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def drop_inferable_types(model: ir.Model) -> None:
    """Remove the type and shape of what Q and DQ write, and of what only a Q reads; graph outputs keep theirs.

    The latter are values inside an integer operator: no runtime that fuses Q/DQ ever computes them. Initializers carry
    their type and shape with their data.
    """
    for value in model.graph.initializers.values():
        if not value.is_graph_output():
            value.type = value.shape = None
    hidden: set[ir.Value] = set()
    for node in reversed(list(model.graph)):
        for value in node.outputs:
            if value.is_graph_output():
                continue
            readers = [reader for reader, _ in value.uses()]
            inside = [reader.op_type == "QuantizeLinear" or _hides(reader, hidden) for reader in readers]
            if node.op_type in _QDQ or (inside and all(inside)):
                hidden.add(value)
                value.type = value.shape = None


def _hides(reader: ir.Node, hidden: set[ir.Value]) -> bool:
    return reader.op_type in ("Relu", "Clip") and reader.outputs[0] in hidden


def drop_repeated_metadata(model: ir.Model) -> None:
    """Remove from every DQ what its reader says as well."""
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            node.metadata_props.clear()
