"""Clean-up of an exported graph, so that the runtime sees the patterns it knows.

    DQ(w) -> Transpose -> MatMul         DQ(w^T) -> MatMul              the transposed codes are stored
    Transpose(w) -> MatMul               w^T -> MatMul                  under the weight's own name
    DynamicQuantizeLinear, Q(x, s, z)    DynamicQuantizeLinear's codes  the operator computes scale and codes in one go
    MatMul(DQ(x), DQ(w)) + DQ(b)         Reshape, Gemm, Reshape          for more than two axes: the kernel adds the bias and
                                         writes integers; as MatMul and Add the runtime does that for static shapes only
    MatMul(DQ(x), DQ(w)) + b             + b as [1, ..., n]              a bias [n] makes the runtime merge both into a
                                         float Gemm
    Gemm or MatMul(DQ(dynamic), DQ(w))   Cast(MatMulInteger) * (s * s_w), + b
                                         the runtime fuses these into one operator, the bias included; a Gemm of two DQ
                                         with scales computed at run time it does not fuse
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def clean(model: ir.Model) -> None:
    """Apply every clean-up in place."""
    _join_dynamic_quantize(model)
    _store_transposed(model)
    _spell_dynamic_products(model)
    _shape_products(model)
    _remove_dead(model)


def _join_dynamic_quantize(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or node.inputs[1] is None:
            continue
        maker = node.inputs[1].producer()
        if maker is not None and maker.op_type == "DynamicQuantizeLinear" and maker.inputs[0] is node.inputs[0]:
            codes = maker.outputs[0]
            codes.type, codes.shape = node.outputs[0].type, node.outputs[0].shape
            name = node.outputs[0].name
            node.outputs[0].replace_all_uses_with(codes)
            model.graph.remove(node, safe=True)
            codes.name = name


def _store_transposed(model: ir.Model) -> None:
    made: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.inputs[0] is None or "perm" not in node.attributes:
            continue
        order = tuple(node.attributes["perm"].as_ints())
        source = node.inputs[0]
        maker = source.producer()
        if source.is_initializer():
            new = _transposed(model, source, order, made)
        elif maker is not None and maker.op_type == "DequantizeLinear" and _constant(maker) and _movable(maker):
            new = _dequantize_transposed(model, node, maker, order, made)
        else:
            continue
        node.outputs[0].replace_all_uses_with(new)
        model.graph.remove(node, safe=True)


def _spell_dynamic_products(model: ir.Model) -> None:
    made: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type not in ("Gemm", "MatMul") or len(node.inputs) < 2:
            continue
        left, right = (value.producer() if value is not None else None for value in node.inputs[:2])
        if left is None or right is None or {left.op_type, right.op_type} != {"DequantizeLinear"}:
            continue
        source = left.inputs[0].producer() if left.inputs[0] is not None else None
        if source is None or source.op_type != "DynamicQuantizeLinear" or not _constant(right):
            continue
        _spell(model, node, left, right, made)


def _spell(
    model: ir.Model, node: ir.Node, left: ir.Node, right: ir.Node, made: dict[tuple[str, tuple[int, ...]], ir.Value]
) -> None:
    codes, scale, zero_point = left.inputs
    weight, weight_scale, weight_zero_point = right.inputs
    assert codes is not None and scale is not None and weight is not None and weight_scale is not None
    name, result = node.name, node.outputs[0]
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if node.op_type == "Gemm" and node.attributes["transB"].as_int():
        weight = _transposed(model, weight, (1, 0), made)
    operands = [codes, weight, zero_point, weight_zero_point]
    product = _insert(model, node, "MatMulInteger", operands, f"{name}/MatMulInteger", ir.DataType.INT32)
    cast = _insert(model, node, "Cast", [product], f"{name}/Cast", result.dtype, to=ir.DataType.FLOAT)
    scales = _insert(model, node, "Mul", [scale, weight_scale], f"{name}/scale", result.dtype)
    final = _insert(model, node, "Mul", [cast, scales], name if bias is None else f"{name}/Mul", result.dtype)
    if bias is not None:
        final = _insert(model, node, "Add", [final, bias], name, result.dtype)
    _take_place(model, node, final)


def _shape_products(model: ir.Model) -> None:
    for node in list(model.graph):
        product = node.inputs[0].producer() if node.op_type == "Add" and node.inputs[0] is not None else None
        if product is None or product.op_type != "MatMul" or len(product.outputs[0].uses()) != 1:
            continue
        makers = [value.producer() if value is not None else None for value in product.inputs]
        if any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
            continue
        x, bias = product.inputs[0], node.inputs[1]
        if x is None or bias is None or x.shape is None or len(x.shape) <= 2:
            continue
        if bias.is_initializer() and bias.const_value is not None and len(bias.const_value.shape) == 1:
            flat = bias.const_value
            tensor = ir.Tensor(flat.numpy().reshape([1] * (len(x.shape) - 1) + [-1]), name=f"{bias.name}_row")
            node.replace_input_with(1, _initializer(model, tensor))
        elif bias.producer() is not None and bias.producer().op_type == "DequantizeLinear":  # type: ignore[union-attr]
            _flatten_product(model, node, product, bias)


def _flatten_product(model: ir.Model, node: ir.Node, product: ir.Node, bias: ir.Value) -> None:
    x, weight = product.inputs
    assert x is not None and weight is not None and x.shape is not None
    inner, outer = int(_size(weight, 0)), int(_size(weight, 1))
    name, result = node.name, node.outputs[0]
    rows = _initializer(model, ir.Tensor(np.array([-1, inner], dtype=np.int64), name=f"{name}/rows"))
    flat = _insert(model, node, "Reshape", [x, rows], f"{name}/flat", x.dtype)
    gemm = _insert(model, node, "Gemm", [flat, weight, bias], name, result.dtype)
    leading = list(x.shape)[:-1]
    if all(isinstance(size, int) for size in leading):
        back = _initializer(model, ir.Tensor(np.array([*leading, outer], dtype=np.int64), name=f"{name}/shape"))
    else:
        # The sizes of the codes, so that the dequantize in between keeps its one reader.
        maker = x.producer()
        sizes = _insert(model, node, "Shape", [maker.inputs[0] if maker else x], f"{name}/sizes", ir.DataType.INT64)
        sizes_node = sizes.producer()
        assert sizes_node is not None
        sizes_node.attributes["end"] = ir.AttrInt64("end", -1)
        last = _initializer(model, ir.Tensor(np.array([outer], dtype=np.int64), name=f"{name}/columns"))
        back = _insert(model, node, "Concat", [sizes, last], f"{name}/shape", ir.DataType.INT64)
        concat = back.producer()
        assert concat is not None
        concat.attributes["axis"] = ir.AttrInt64("axis", 0)
    final = _insert(model, node, "Reshape", [gemm, back], f"{name}/back", result.dtype)
    _take_place(model, node, final)


def _size(weight: ir.Value, axis: int) -> int:
    """Return a static dimension of a weight."""
    maker = weight.producer()
    codes = maker.inputs[0] if maker is not None else weight
    assert codes is not None and codes.shape is not None
    return int(codes.shape[axis])  # type: ignore[arg-type]


def _initializer(model: ir.Model, tensor: ir.Tensor) -> ir.Value:
    """Return the initializer that holds `tensor`, shared by name."""
    assert tensor.name is not None
    known = model.graph.initializers.get(tensor.name)
    if known is None:
        known = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        model.graph.register_initializer(known)
    return known


def _take_place(model: ir.Model, node: ir.Node, final: ir.Value) -> None:
    """Make `final` stand where the result of `node` stood, under its name, and remove `node`."""
    result = node.outputs[0]
    final.type, final.shape = result.type, result.shape
    maker = final.producer()
    assert maker is not None
    maker.metadata_props.update(node.metadata_props)
    name = result.name
    for position, output in enumerate(model.graph.outputs):
        if output is result:
            model.graph.outputs[position] = final
    result.replace_all_uses_with(final)
    model.graph.remove(node, safe=True)
    final.name = name


def _insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None] | list[ir.Value],
    name: str | None,
    dtype: ir.DataType | None,
    to: ir.DataType | None = None,
) -> ir.Value:
    attributes = [] if to is None else [ir.AttrInt64("to", int(to))]
    node = ir.Node("", op_type, inputs, attributes, name=name)
    node.outputs[0].name = name
    if dtype is not None:
        node.outputs[0].dtype = dtype
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _constant(dequantize: ir.Node) -> bool:
    return all(value is None or value.is_initializer() for value in dequantize.inputs)


def _movable(dequantize: ir.Node) -> bool:
    """A scalar or per-axis scale follows its axis; block scales transpose with the codes."""
    return dequantize.inputs[0] is not None and dequantize.inputs[0].shape is not None


def _dequantize_transposed(
    model: ir.Model, node: ir.Node, maker: ir.Node, order: tuple[int, ...], made: dict[tuple[str, tuple[int, ...]], ir.Value]
) -> ir.Value:
    codes, scale, *rest = maker.inputs
    assert codes is not None and scale is not None
    axis = maker.attributes["axis"].as_int() if "axis" in maker.attributes else 1
    attributes = [ir.AttrInt64("axis", order.index(axis % len(order)))]
    inputs: list[ir.Value | None] = [_transposed(model, codes, order, made), scale, *rest]
    if "block_size" in maker.attributes:
        attributes.append(maker.attributes["block_size"])
        inputs[1:] = [None if each is None else _transposed(model, each, order, made) for each in (scale, *rest)]
    new = ir.Node("", "DequantizeLinear", inputs, attributes, name=maker.name)
    new.metadata_props.update(maker.metadata_props)
    new.outputs[0].name = f"{maker.outputs[0].name}_transposed"
    new.outputs[0].dtype = maker.outputs[0].dtype
    model.graph.insert_before(node, new)
    return new.outputs[0]


def _transposed(
    model: ir.Model, value: ir.Value, order: tuple[int, ...], made: dict[tuple[str, tuple[int, ...]], ir.Value]
) -> ir.Value:
    """Return an initializer with the transposed content; it takes the old name once nobody else reads the old one."""
    assert value.name is not None and value.const_value is not None
    key = (value.name, order)
    if key not in made:
        array = np.ascontiguousarray(np.transpose(value.const_value.numpy(), order))
        tensor = ir.Tensor(array, dtype=value.const_value.dtype, name=f"{value.name}_transposed")
        new = ir.Value(name=tensor.name, const_value=tensor, type=value.type, shape=ir.Shape(array.shape))
        model.graph.register_initializer(new)
        made[key] = new
    return made[key]


def _remove_dead(model: ir.Model) -> None:
    changed = True
    outputs = {id(value) for value in model.graph.outputs}
    while changed:
        changed = False
        for node in reversed(list(model.graph)):
            if all(not value.uses() and id(value) not in outputs for value in node.outputs):
                model.graph.remove(node, safe=True)
                changed = True
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and id(value) not in outputs:
            del model.graph.initializers[name]
    for name, value in list(model.graph.initializers.items()):
        plain = name.removesuffix("_transposed")
        if plain != name and plain not in model.graph.initializers and value.const_value is not None:
            value.name = plain
            value.const_value.name = plain
