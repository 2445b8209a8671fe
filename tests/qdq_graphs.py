"""Small QDQ graphs for the tests of the ONNX backend, written node by node with onnx.helper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper


class GraphBuilder:
    """Collects nodes in order; every method returns the name of the tensor (or tensors) that it made."""

    def __init__(self, opset: int = 17) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.random = np.random.default_rng(0)

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int = TensorProto.FLOAT) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, None))
        return name

    def constant(self, value: npt.ArrayLike, name: str | None = None) -> str:
        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def tensor(self, proto: TensorProto) -> str:
        self.initializers.append(proto)
        return proto.name

    def nodes_of(
        self, op_type: str, inputs: Sequence[str], name: str, count: int, **attributes: Any
    ) -> list[str]:
        outputs = [f"{name}:{index}" for index in range(count)]
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=name, **attributes))
        return outputs

    def node(self, op_type: str, inputs: Sequence[str], name: str | None = None, **attributes: Any) -> str:
        return self.nodes_of(op_type, inputs, name or f"{op_type}_{len(self.nodes)}", 1, **attributes)[0]

    def quantize(self, x: str, name: str, scale: float = 0.02, zero: int = 128, kind: Any = np.uint8) -> str:
        return self.node(
            "QuantizeLinear", [x, self.constant(np.float32(scale)), self.constant(kind(zero))], name=name
        )

    def dequantize(
        self, x: str, name: str, scale: float = 0.02, zero: int = 128, kind: Any = np.uint8
    ) -> str:
        return self.node(
            "DequantizeLinear", [x, self.constant(np.float32(scale)), self.constant(kind(zero))], name=name
        )

    def qdq(self, x: str, name: str, scale: float = 0.02, zero: int = 128, kind: Any = np.uint8) -> str:
        """Q `name`.q and DQ `name`.dq with the same parameters."""
        return self.dequantize(
            self.quantize(x, f"{name}.q", scale, zero, kind), f"{name}.dq", scale, zero, kind
        )

    def weight(self, shape: Sequence[int], name: str, axis: int = 0, kind: Any = np.int8) -> str:
        """DQ `name` of random integer codes too small to overflow in pairs, one scale per channel along `axis`."""
        codes = self.random.integers(1, 64, shape).astype(kind)
        channels = shape[axis]
        scale, zero = np.full(channels, 0.002, np.float32), np.zeros(channels, kind)
        inputs = [self.constant(codes), self.constant(scale), self.constant(zero)]
        return self.node("DequantizeLinear", inputs, name=name, axis=axis)

    def bias(self, channels: int, name: str, kind: Any = np.int32) -> str:
        codes, scale = np.arange(channels).astype(kind), np.full(channels, 4e-5, np.float32)
        inputs = [self.constant(codes), self.constant(scale), self.constant(np.zeros(channels, kind))]
        return self.node("DequantizeLinear", inputs, name=name, axis=0)

    def conv(self, x: str, name: str, channels: int = 8, filters: int = 8, kernel: int = 3) -> str:
        weight = self.weight((filters, channels, kernel, kernel), f"{name}.weight")
        pads = [kernel // 2] * 4
        return self.node("Conv", [x, weight, self.bias(filters, f"{name}.bias")], name=name, pads=pads)

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def save(self, path: Path) -> Path:
        onnx.save(self.model(), path)
        return path
