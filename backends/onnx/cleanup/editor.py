"""Graph surgery: inserting operators and initializers under fresh names, and putting one value in another's place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Editor:
    """One model while it is changed."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        values = [value for node in model.graph for value in node.outputs]
        self._taken = {value.name for value in (*values, *model.graph.inputs, *model.graph.initializers.values())}

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes in order, as a list that stays the same while the graph changes."""
        return list(self.model.graph)

    def fresh(self, name: str) -> str:
        """Return `name`, with a number behind it where something is called so already."""
        candidate, count = name, 1
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None,
        **attributes: int | list[int],
    ) -> ir.Value:
        """Insert an operator in front of `before`, from whose module it is, and return its value."""
        node = ir.node(op_type, inputs, attributes, name=self.fresh(name))
        if "module" in before.metadata_props:
            node.metadata_props["module"] = before.metadata_props["module"]
        node.outputs[0].name = node.name
        if dtype is not None:
            node.outputs[0].dtype = dtype
        self.model.graph.insert_before(before, node)
        return node.outputs[0]

    def initializer(self, array: npt.NDArray[np.generic], name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """Add a constant; `dtype` where NumPy's type does not tell."""
        name = self.fresh(name)
        tensor = ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        self.model.graph.register_initializer(value)
        return value

    def take_place(self, node: ir.Node, final: ir.Value) -> None:
        """Make `final` stand where the one result of `node` stood, under its name, and remove `node`."""
        result, maker = node.outputs[0], final.producer()
        assert maker is not None
        final.type, final.shape = result.type, result.shape
        maker.metadata_props.update(node.metadata_props)
        name, maker.name = result.name, node.name
        result.replace_all_uses_with(final, replace_graph_outputs=True)
        self.remove(node)
        final.name = name

    def remove(self, node: ir.Node) -> None:
        self.model.graph.remove(node, safe=True)

    def remove_dead(self) -> None:
        """Remove operators and initializers that nobody reads."""
        for node in reversed(self.nodes):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.remove(node)
        for name, value in list(self.model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.model.graph.initializers[name]


def producer(node: ir.Node, index: int) -> ir.Node | None:
    """Return the node that computes an input, or None where there is none."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return value.producer() if value is not None else None


def constant(value: ir.Value | None) -> bool:
    """True for an initializer and for its transpose, which every runtime computes once, when it loads the file."""
    if value is None:
        return False
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose":
        return constant(maker.inputs[0])
    return value.is_initializer() and not value.is_graph_input()


def constant_dequantize(node: ir.Node | None) -> bool:
    """True for a DequantizeLinear of a weight."""
    if node is None or node.op_type != "DequantizeLinear":
        return False
    return all(value is None or constant(value) for value in node.inputs)


def axis_of(dequantize: ir.Node) -> int:
    """Return the axis of a Q or DQ; the standard's default is 1."""
    return int(dequantize.attributes["axis"].as_int()) if "axis" in dequantize.attributes else 1


def block_size(dequantize: ir.Node) -> int:
    """Return how many codes share a scale along the axis; 0 without blocks."""
    return int(dequantize.attributes["block_size"].as_int()) if "block_size" in dequantize.attributes else 0


def flag(node: ir.Node, name: str, default: float = 0) -> float:
    """Return a numeric attribute."""
    attribute = node.attributes.get(name)
    return float(attribute.value) if attribute is not None else default
