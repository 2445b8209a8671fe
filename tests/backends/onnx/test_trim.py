"""What the file leaves out says nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto
from qdq_graphs import GraphBuilder

from graphopt.backends.onnx.compare import run_onnx
from graphopt.backends.onnx.fusion import check_fusion
from graphopt.backends.onnx.trim import share_zero_points, trim


def _model() -> GraphBuilder:
    graph = GraphBuilder(opset=20)
    x = graph.qdq(graph.input("x", ["batch", 8, 6, 6]), "x")
    first = graph.conv(x, "first")
    graph.nodes[-1].attribute.extend(
        [onnx.helper.make_attribute("auto_pad", "NOTSET"), onnx.helper.make_attribute("group", 1)]
    )
    graph.nodes[-1].attribute.append(onnx.helper.make_attribute("dilations", [1, 1]))
    y = graph.qdq(graph.node("Relu", [first], "relu"), "y", zero=0)
    second = graph.conv(y, "second")
    graph.output(graph.node("Softmax", [second], "out", axis=-1))
    for node in graph.nodes:
        entry = node.metadata_props.add()
        entry.key, entry.value = "module", "net"
    return graph


def _trimmed(tmp_path: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    before = onnx.shape_inference.infer_shapes(_model().model())
    model = ir.from_proto(before)
    share_zero_points(model)
    trim(model)
    onnx.save(before, tmp_path / "before.onnx")
    ir.save(model, tmp_path / "after.onnx")
    onnx.checker.check_model(str(tmp_path / "after.onnx"), full_check=True)
    return before, onnx.load(tmp_path / "after.onnx")


def test_the_file_means_the_same(tmp_path: Path) -> None:
    _trimmed(tmp_path)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 8, 6, 6)).astype(np.float32)}
    for plain in (True, False):
        old, new = (run_onnx(tmp_path / f"{name}.onnx", feeds, plain) for name in ("before", "after"))
        np.testing.assert_array_equal(next(iter(old.values())), next(iter(new.values())))
    assert check_fusion(tmp_path / "after.onnx").fused == check_fusion(tmp_path / "before.onnx").fused


def test_defaults_go_and_the_rest_stays(tmp_path: Path) -> None:
    _, after = _trimmed(tmp_path)
    nodes = {node.name: {each.name for each in node.attribute} for node in after.graph.node}
    assert nodes["first"] == {"pads", "dilations"}  # the standard gives dilations no default
    assert nodes["x.q"] == set() and nodes["first.weight"] == {"axis"}
    assert nodes["out"] == set()


def test_only_values_of_float_operators_are_described(tmp_path: Path) -> None:
    before, after = _trimmed(tmp_path)
    assert len(before.graph.value_info) > 10
    assert [value.name for value in after.graph.value_info] == ["second:0"]


def test_metadata_stands_where_it_is_needed(tmp_path: Path) -> None:
    _, after = _trimmed(tmp_path)
    assert all(bool(node.metadata_props) != (node.op_type == "DequantizeLinear") for node in after.graph.node)


def test_zero_points_are_shared_by_type_and_shape(tmp_path: Path) -> None:
    _, after = _trimmed(tmp_path)
    zeros = {tensor.name: tensor.data_type for tensor in after.graph.initializer if tensor.name.startswith("zero")}
    assert zeros == {
        "zero_int8_8": TensorProto.INT8, "zero_int32_8": TensorProto.INT32, "zero_uint8": TensorProto.UINT8,
    }  # fmt: skip
    others = {node.input[2] for node in after.graph.node if node.op_type == "QuantizeLinear"} - set(zeros)
    assert len(others) == 1  # that of x, 128
