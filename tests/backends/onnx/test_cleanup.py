"""Each clean-up on graphs written by hand: it fires, it declines, and the numbers stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from qdq_graphs import GraphBuilder

from graphopt.backends.onnx.cleanup import clean
from graphopt.backends.onnx.compare import run_onnx
from graphopt.backends.onnx.fusion import check_fusion

Feeds = dict[str, npt.NDArray[Any]]


class Graph(GraphBuilder):
    """The forms in which torch.onnx writes products."""

    def __init__(self) -> None:
        super().__init__(opset=21)

    def linear_weight(self, outer: int, inner: int, axis: int = 0, name: str = "w", block: int = 0) -> str:
        """DQ of int8 codes [outer, inner], one scale each along `axis` or a block of it."""
        codes = self.constant(self.random.integers(-63, 64, (outer, inner)).astype(np.int8), name)
        shape: tuple[int, ...] = (outer, inner)[axis : axis + 1]
        if block:
            shape = (outer, -(-inner // block))
        scale = self.constant((self.random.random(shape) * 0.01 + 0.001).astype(np.float32), f"{name}_scale")
        zero = self.constant(self.random.integers(-3, 4, shape).astype(np.int8), f"{name}_zero")
        attributes = {"block_size": block} if block else {}
        axis = 1 if block else axis
        return self.node("DequantizeLinear", [codes, scale, zero], f"{name}_dq", axis=axis, **attributes)

    def turned(self, weight: str, name: str = "turn") -> str:
        return self.node("Transpose", [weight], name, perm=[1, 0])

    def dynamic(self, x: str, name: str = "dyn") -> str:
        """Q and DQ with a scale computed at run time, as the dialect writes them."""
        _, scale, zero = self.nodes_of("DynamicQuantizeLinear", [x], name, 3)
        codes = self.node("QuantizeLinear", [x, scale, zero], f"{name}.q")
        return self.node("DequantizeLinear", [codes, scale, zero], f"{name}.dq")

    def int32_bias(self, weight: str, name: str = "b") -> str:
        """DQ of int32 codes on the grid of the accumulator, of a weight and an input whose scale is that of `qdq`."""
        scales = next(numpy_helper.to_array(each) for each in self.initializers if each.name == f"{weight}_scale")
        codes = self.constant(self.random.integers(-5000, 5000, scales.shape).astype(np.int32), name)
        scale = self.constant(scales * np.float32(0.02), f"{name}_scale")
        zero = self.constant(np.zeros(scales.shape, np.int32), f"{name}_zero")
        return self.node("DequantizeLinear", [codes, scale, zero], f"{name}_dq", axis=0)


def cleaned(graph: Graph, tmp_path: Path, feeds: Feeds) -> onnx.ModelProto:
    """Clean the graph; what it computes, as written and as ONNX Runtime optimizes it, must not change."""
    before = run_onnx(graph.save(tmp_path / "before.onnx"), feeds, disable_optimizations=True)
    model = ir.from_proto(_with_shapes(graph.model()))
    clean(model)
    after = tmp_path / "after.onnx"
    ir.save(model, after)
    onnx.checker.check_model(str(after), full_check=True)
    for plain in (True, False):
        result = run_onnx(after, feeds, disable_optimizations=plain)
        for name, value in before.items():
            spread = np.abs(value).max()
            # Optimized, weights of blocks meet inputs of eight bits (MatMulNBits).
            loose = 0.02 if "MatMulNBits" in check_fusion(after).fused and not plain else 1e-5
            np.testing.assert_allclose(result[name], value, rtol=0, atol=loose * spread, err_msg=f"{name}, {plain=}")
    return onnx.load(after)


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model)


def types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def weights(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def normal(*shape: int) -> npt.NDArray[Any]:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def node_of(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name), None)


# --- transposed


def test_a_dequantized_weight_is_stored_transposed(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 8])
    graph.node("MatMul", [x, graph.turned(graph.linear_weight(6, 8))], "y")
    graph.output("y:0")
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 8)})
    assert types(model) == ["DequantizeLinear", "MatMul"]
    assert weights(model) == {"w": [8, 6], "w_scale": [6], "w_zero": [6]}
    dequantize = node_of(model, "DequantizeLinear")
    assert attribute(dequantize, "axis") == 1 and dequantize.name == "w_dq"


def test_blocks_are_transposed_with_their_codes(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 32])
    graph.node("MatMul", [x, graph.turned(graph.linear_weight(6, 32, block=16))], "y")
    graph.output("y:0")
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 32)})
    assert weights(model) == {"w": [32, 6], "w_scale": [2, 6], "w_zero": [2, 6]}
    assert attribute(node_of(model, "DequantizeLinear"), "axis") == 0
    assert attribute(node_of(model, "DequantizeLinear"), "block_size") == 16
    assert check_fusion(tmp_path / "after.onnx").fused == {"MatMulNBits": 1}


def test_a_float_weight_is_stored_transposed_under_its_name(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 8])
    weight = graph.constant(normal(6, 8), "fc.weight")
    graph.node("MatMul", [x, graph.turned(weight)], "y")
    graph.output("y:0")
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 8)})
    assert types(model) == ["MatMul"] and weights(model) == {"fc.weight": [8, 6]}


def test_two_readers_of_the_transpose_share_it(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 8])
    weight = graph.constant(normal(8, 8), "w")
    first = graph.node("MatMul", [x, graph.turned(weight, "t1")], "first")
    graph.node("MatMul", [first, graph.turned(weight, "t2")], "y")
    graph.output("y:0")
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 8)})
    assert types(model) == ["MatMul", "MatMul"] and weights(model) == {"w": [8, 8]}


@pytest.mark.parametrize("quantized", [True, False])
def test_a_weight_read_both_ways_is_stored_once(tmp_path: Path, quantized: bool) -> None:
    graph = Graph()
    x, rows = graph.input("x", [2, 3, 8]), graph.input("rows", [4], TensorProto.INT64)
    source = graph.linear_weight(6, 8) if quantized else graph.constant(normal(6, 8), "w")
    graph.node("MatMul", [x, graph.turned(source)], "y")
    graph.node("Cast", [graph.node("Gather", ["w", rows], "taken")], "looked_up", to=TensorProto.FLOAT)
    graph.output("y:0")
    graph.output("looked_up:0")
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 8), "rows": np.array([0, 5, 2, 2])})
    assert weights(model)["w"] == [6, 8] and [size for size in weights(model).values() if len(size) == 2] == [[6, 8]]
    product = node_of(model, "MatMul")
    if quantized:
        # The dequantize itself feeds the product; the codes are turned in front of it.
        assert product.input[1] == node_of(model, "DequantizeLinear").output[0]
        assert node_of(model, "DequantizeLinear").input[0] == node_of(model, "Transpose").output[0]
        assert check_fusion(tmp_path / "after.onnx").fused.get("MatMulNBits") == 1


def test_a_transposed_weight_that_is_returned_stays(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 8])
    turned = graph.turned(graph.linear_weight(6, 8))
    graph.node("MatMul", [x, turned], "y")
    graph.output("y:0")
    graph.output(turned)
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 8)})
    assert types(model) == ["DequantizeLinear", "Transpose", "MatMul"]


def test_an_activation_stays_transposed(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [8, 3])
    graph.node("Relu", [graph.turned(x)], "y")
    graph.output("y:0")
    assert types(cleaned(graph, tmp_path, {"x": normal(8, 3)})) == ["Transpose", "Relu"]


def test_a_users_weight_called_transposed_keeps_its_name(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [2, 8])
    graph.node("Mul", [x, graph.constant(normal(8), "scale_transposed")], "y")
    graph.output("y:0")
    assert weights(cleaned(graph, tmp_path, {"x": normal(2, 8)})) == {"scale_transposed": [8]}


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_scales_along_the_sum_never_reach_a_product_of_codes(tmp_path: Path, block: int, how: str) -> None:
    """ONNX Runtime would fuse it all the same, and fail or compute something else."""
    graph = Graph()
    x = graph.input("x", [2, 3, 32])
    x = graph.qdq(x, "x") if how == "static" else graph.dynamic(x)
    graph.node("MatMul", [x, graph.turned(graph.linear_weight(6, 32, axis=1, block=block))], "y")
    graph.output("y:0")
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 32)})
    assert node_of(model, "MatMul").input[1] == node_of(model, "Sum").output[0]
    assert check_fusion(tmp_path / "after.onnx").fused == {}


# --- Gemm


def _gemm(graph: Graph, x: str, **attributes: Any) -> None:
    bias = graph.constant(normal(6), "bias")
    graph.node("Gemm", [x, graph.linear_weight(6, 8), bias], "y", transB=1, **attributes)
    graph.output("y:0")


def test_a_gemm_of_a_weight_alone_reads_it_the_other_way(tmp_path: Path) -> None:
    graph = Graph()
    _gemm(graph, graph.input("x", [4, 8]))
    model = cleaned(graph, tmp_path, {"x": normal(4, 8)})
    assert types(model) == ["DequantizeLinear", "Gemm"] and weights(model)["w"] == [8, 6]
    assert not attribute(node_of(model, "Gemm"), "transB")
    assert check_fusion(tmp_path / "after.onnx").fused == {"MatMulNBits": 1}


def test_a_gemm_with_a_fixed_scale_stays(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.qdq(graph.input("x", [4, 8]), "x")
    graph.node("Gemm", [x, graph.linear_weight(6, 8), graph.int32_bias("w")], "y", transB=1)
    graph.output("y:0")
    model = cleaned(graph, tmp_path, {"x": normal(4, 8)})
    assert attribute(node_of(model, "Gemm"), "transB") == 1 and weights(model)["w"] == [6, 8]


# --- dynamic


def test_dynamic_codes_are_computed_once(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 8])
    graph.node("MatMul", [graph.dynamic(x), graph.turned(graph.linear_weight(6, 8))], "y")
    graph.output("y:0")
    model = cleaned(graph, tmp_path, {"x": normal(2, 3, 8)})
    assert types(model) == ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]
    # Of the two scales the one of x comes first, or the runtime does not recognise the product.
    assert list(model.graph.node[3].input) == ["dyn:1", "w_scale"]
    assert check_fusion(tmp_path / "after.onnx").fused == {"DynamicQuantizeMatMul": 1}


def test_a_dynamic_gemm_adds_its_bias_last(tmp_path: Path) -> None:
    graph = Graph()
    _gemm(graph, graph.dynamic(graph.input("x", [4, 8])))
    model = cleaned(graph, tmp_path, {"x": normal(4, 8)})
    assert types(model) == ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul", "Add"]
    assert model.graph.node[-1].name == "y" and model.graph.node[1].name == "y/MatMulInteger"
    assert check_fusion(tmp_path / "after.onnx").fused == {"DynamicQuantizeMatMul": 1}


def test_a_shared_weight_serves_gemm_and_matmul(tmp_path: Path) -> None:
    graph = Graph()
    flat, deep = graph.input("flat", [4, 8]), graph.input("deep", [2, 3, 8])
    weight = graph.linear_weight(8, 8)
    graph.node("Gemm", [graph.dynamic(flat, "d1"), weight, graph.constant(normal(8), "bias")], "y", transB=1)
    graph.node("MatMul", [graph.dynamic(deep, "d2"), graph.turned(weight)], "z")
    graph.output("y:0")
    graph.output("z:0")
    model = cleaned(graph, tmp_path, {"flat": normal(4, 8), "deep": normal(2, 3, 8)})
    assert types(model).count("MatMulInteger") == 2
    assert [size for size in weights(model).values() if len(size) == 2] == [[8, 8]]


def _scaled_gemm(graph: Graph) -> str:
    _gemm(graph, graph.dynamic(graph.input("x", [4, 8])), alpha=0.5)
    return "Gemm"


def _other_scale(graph: Graph) -> str:
    """The codes are of x, their scale of y."""
    x, other = graph.input("x", [2, 3, 8]), graph.input("other", [2, 3, 8])
    _, scale, zero = graph.nodes_of("DynamicQuantizeLinear", [other], "dyn", 3)
    codes = graph.node("QuantizeLinear", [x, scale, zero], "q")
    back = graph.node("DequantizeLinear", [codes, scale, zero], "dq")
    graph.node("MatMul", [back, graph.turned(graph.linear_weight(6, 8))], "y")
    graph.output("y:0")
    return "QuantizeLinear"


def _computed_weight(graph: Graph) -> str:
    x, other = graph.input("x", [2, 3, 8]), graph.input("other", [8, 6])
    graph.node("MatMul", [graph.dynamic(x), graph.qdq(other, "other")], "y")
    graph.output("y:0")
    return "MatMul"


def _scales_of_inputs(graph: Graph) -> str:
    weight = graph.linear_weight(6, 8, axis=1)
    graph.node("Gemm", [graph.dynamic(graph.input("x", [4, 8])), weight], "y", transB=1)
    graph.output("y:0")
    return "Gemm"


@pytest.mark.parametrize("build", [_scaled_gemm, _other_scale, _computed_weight, _scales_of_inputs])
def test_other_dynamic_products_stay(tmp_path: Path, build: Callable[[Graph], str]) -> None:
    graph = Graph()
    kept = build(graph)
    feeds = {each.name: normal(*[d.dim_value for d in each.type.tensor_type.shape.dim]) for each in graph.inputs}
    model = cleaned(graph, tmp_path, feeds)
    assert kept in types(model) and "MatMulInteger" not in types(model)


# --- products


def _static(
    graph: Graph, shape: list[int | str], bias: str | None = None, quantized: bool = False, name: str = "y"
) -> None:
    """Q -> DQ -> MatMul -> Add of `bias`, or of one in int32; then Q -> DQ."""
    x = graph.qdq(graph.input(f"x_{name}", shape), f"x_{name}")
    weight = graph.linear_weight(6, 8, name=f"w_{name}")
    bias = bias or graph.int32_bias(f"w_{name}")
    product = graph.node("MatMul", [x, graph.turned(weight, f"turn_{name}")], f"{name}/MatMul")
    total = graph.node("Add", [product, bias], name)
    if quantized:
        total = graph.qdq(total, f"out_{name}", scale=0.1)
    graph.output(total)


def test_a_float_bias_becomes_a_row(tmp_path: Path) -> None:
    graph = Graph()
    _static(graph, [2, 3, 8], graph.constant(normal(6), "fc.bias"))
    model = cleaned(graph, tmp_path, {"x_y": normal(2, 3, 8)})
    assert weights(model)["fc.bias"] == [1, 1, 6]
    assert check_fusion(tmp_path / "after.onnx").fused == {"MatMulIntegerToFloat": 1}


def test_a_bias_shared_across_ranks_becomes_a_row_of_each(tmp_path: Path) -> None:
    graph = Graph()
    bias = graph.constant(normal(6), "fc.bias")
    _static(graph, [2, 3, 8], bias, name="y")
    _static(graph, [2, 2, 3, 8], bias, name="z")
    model = cleaned(graph, tmp_path, {"x_y": normal(2, 3, 8), "x_z": normal(2, 2, 3, 8)})
    rows = sorted(size for name, size in weights(model).items() if "bias" in name)
    assert rows == [[1, 1, 1, 6], [1, 1, 6]]


@pytest.mark.parametrize("shape", [[2, 3, 8], ["batch", 3, 8], ["batch", "length", 8]])
def test_an_integer_bias_joins_a_gemm(tmp_path: Path, shape: list[int | str]) -> None:
    graph = Graph()
    _static(graph, shape, quantized=True)
    model = cleaned(graph, tmp_path, {"x_y": normal(2, 3, 8)})
    assert "MatMul" not in types(model) and node_of(model, "Gemm").name == "y/Gemm"
    fused = check_fusion(tmp_path / "after.onnx").fused
    assert fused["QGemm"] == 1
    other = run_onnx(tmp_path / "after.onnx", {"x_y": normal(2, 3, 8) if shape[0] == 2 else normal(5, 3, 8)})
    assert next(iter(other.values())).shape == (2 if shape[0] == 2 else 5, 3, 6)


def test_a_sum_of_two_activations_is_no_bias(tmp_path: Path) -> None:
    """A residual that was quantized has a dequantize too."""
    graph = Graph()
    _static(graph, [2, 3, 8], graph.qdq(graph.input("residual", [2, 3, 6]), "residual"))
    model = cleaned(graph, tmp_path, {"x_y": normal(2, 3, 8), "residual": normal(2, 3, 6)})
    assert "Gemm" not in types(model) and "MatMul" in types(model)


def test_a_product_that_is_read_twice_keeps_its_bias_apart(tmp_path: Path) -> None:
    graph = Graph()
    _static(graph, [2, 3, 8])
    graph.node("Relu", ["y/MatMul:0"], "also")
    graph.output("also:0")
    model = cleaned(graph, tmp_path, {"x_y": normal(2, 3, 8)})
    assert "Gemm" not in types(model)


def test_clean_up_of_a_clean_graph_changes_nothing(tmp_path: Path) -> None:
    graph = Graph()
    _static(graph, ["batch", "length", 8], quantized=True)
    first = cleaned(graph, tmp_path, {"x_y": normal(2, 3, 8)})
    model = ir.from_proto(_with_shapes(first))
    clean(model)
    assert types(ir.to_proto(model)) == types(first)
