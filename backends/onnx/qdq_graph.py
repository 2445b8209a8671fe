"""An indexed view of one ONNX graph: who writes and reads a tensor, what is constant, where Q and DQ are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    helper,
    numpy_helper,
)

Array = npt.NDArray[np.generic]


def words(text: str) -> frozenset[str]:
    """The set of the words in `text`."""
    return frozenset(text.split())


QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"
EIGHT_BIT = (TensorProto.UINT8, TensorProto.INT8)

# Operators whose integer form is the operator itself on 8-bit data: Q and DQ are dropped where their
# parameters agree. DepthToSpace was seen among them (onnxruntime 1.31), SpaceToDepth was not.
MOVES_DATA = words(
    "DepthToSpace Expand Flatten Gather GatherElements MaxPool ReduceMax ReduceMin Reshape Resize Slice "
    "Split Squeeze Tile Transpose Unsqueeze"
)
# Q and DQ travel through these by themselves (QDQPropagation), so that they need no Q/DQ of their own.
PROPAGATES = frozenset(("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"))


@dataclass(frozen=True)
class QdqGraph:
    """One graph of a model with its producers, consumers and constants; nodes go by their index."""

    nodes: tuple[NodeProto, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]
    initializers: dict[str, TensorProto]
    opset: int
    folder: Path
    producer: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def of(graph: GraphProto, opset: int, folder: Path) -> QdqGraph:
        """Index `graph`, whose external data (if any) lies in `folder`."""
        view = QdqGraph(
            tuple(graph.node),
            frozenset(value.name for value in graph.input),
            frozenset(value.name for value in graph.output),
            {tensor.name: tensor for tensor in graph.initializer},
            opset,
            folder,
        )
        for index, node in enumerate(view.nodes):
            for name in node.output:
                if name:
                    view.producer[name] = index
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    view.initializers[node.output[0]] = attribute.t
            # A subgraph reads values of the graph around it: those reads are reads of the node that holds it.
            captured = {name for inner in subgraphs(node) for each in inner.node for name in each.input}
            for name in dict.fromkeys([*node.input, *sorted(captured)]):
                if name:
                    view.consumers.setdefault(name, []).append(index)
        return view

    def label(self, index: int) -> str:
        """The node's name in the file; its first output where it has none."""
        node = self.nodes[index]
        return node.name or node.output[0]

    def described(self, index: int) -> str:
        """`'name' (OperatorType)`."""
        return f"'{self.label(index)}' ({self.nodes[index].op_type})"

    def producer_of(self, tensor: str) -> NodeProto | None:
        """The node that computes `tensor`; None for graph inputs, initializers and outer values."""
        index = self.producer.get(tensor)
        return None if index is None else self.nodes[index]

    def is_constant(self, tensor: str, depth: int = 8) -> bool:
        """Whether `tensor` is known at load time: an initializer, or computed from initializers only."""
        if tensor in self.initializers:
            return tensor not in self.inputs
        node = self.producer_of(tensor)
        if node is None or depth == 0 or not node.input:
            return False
        return all(self.is_constant(name, depth - 1) for name in node.input if name)

    def value(self, tensor: str) -> Array | None:
        """The value of an initializer, from the external file if it lies there; None for anything else."""
        proto = self.initializers.get(tensor)
        if proto is None:
            return None
        if proto.data_location == TensorProto.EXTERNAL:
            loaded = TensorProto()
            loaded.CopyFrom(proto)
            external_data_helper.load_external_data_for_tensor(loaded, str(self.folder))
            proto = loaded
        return numpy_helper.to_array(proto)

    def attribute(self, node: NodeProto, name: str, default: float | int | str) -> float | int | str:
        """A scalar attribute of `node`, or `default`."""
        for attribute in node.attribute:
            if attribute.name == name:
                found = helper.get_attribute_value(attribute)
                return found.decode() if isinstance(found, bytes) else found
        return default

    def quantized_type(self, node: NodeProto) -> int | None:
        """The element type on the integer side of a Q or DQ; None where the file does not say."""
        if len(node.input) > 2 and node.input[2]:
            zero_point = self.initializers.get(node.input[2])
            if zero_point is not None:
                return int(zero_point.data_type)
        if node.op_type == QUANTIZE:
            return int(self.attribute(node, "output_dtype", 0)) or TensorProto.UINT8
        codes = self.initializers.get(node.input[0])
        if codes is not None:
            return int(codes.data_type)
        source = self.producer_of(node.input[0])
        while source is not None and source.op_type in MOVES_DATA:
            source = self.producer_of(source.input[0])
        return self.quantized_type(source) if source is not None and source.op_type == QUANTIZE else None

    def dequantizer(self, tensor: str) -> tuple[int | None, bool]:
        """The DQ that feeds `tensor`, seen through what DQs travel through; whether a Transpose is there."""
        transposed = False
        while (index := self.producer.get(tensor)) is not None:
            node = self.nodes[index]
            if node.op_type == DEQUANTIZE:
                return index, transposed
            if node.op_type not in PROPAGATES:
                break
            transposed = transposed or node.op_type == "Transpose"
            tensor = node.input[0]
        return None, transposed

    def readers(self, tensor: str) -> list[int]:
        """Consumers of `tensor`, seen through single-consumer nodes that Qs travel through."""
        found: list[int] = []
        for index in self.consumers.get(tensor, []):
            node = self.nodes[index]
            onward = self.consumers.get(node.output[0], [])
            if node.op_type in PROPAGATES and len(onward) == 1 and node.output[0] not in self.outputs:
                found.extend(self.readers(node.output[0]))
            else:
                found.append(index)
        return found


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that `node` holds as attributes (branches of If, bodies of Loop and Scan)."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def type_name(data_type: int | None) -> str:
    """`uint8` for TensorProto.UINT8, and so on."""
    return "an unknown type" if data_type is None else TensorProto.DataType.Name(data_type).lower()
