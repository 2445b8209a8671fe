"""Every reason fires on the graph seeded with that fault, and correct graphs have nothing unfused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qdq_graphs import GraphBuilder

from graphopt.backends.onnx.fusion import FusionReport, check_fusion
from graphopt.backends.onnx.fusion_rules import UNEXPLAINED, explain
from graphopt.backends.onnx.qdq_graph import QdqGraph
from graphopt.errors import GraphoptError

Build = Callable[[GraphBuilder], None]
IMAGE, TOKENS = [1, 8, 12, 12], [1, 6, 16]


def check(build: Build, tmp_path: Path, opset: int = 17) -> FusionReport:
    graph = GraphBuilder(opset)
    build(graph)
    return check_fusion(graph.save(tmp_path / "model.onnx"))


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# ---------------------------------------------------------------- correct graphs


def residual_block(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", IMAGE), "x")
    a = g.qdq(g.node("Relu", [g.conv(x, "conv_a")], name="relu_a"), "a", zero=0)
    b = g.qdq(g.conv(a, "conv_b"), "b")
    s = g.qdq(g.node("Relu", [g.node("Add", [b, x], name="sum")], name="relu_s"), "s", zero=0)
    p = g.qdq(g.node("MaxPool", [s], name="pool", kernel_shape=[2, 2], strides=[2, 2]), "p", zero=0)
    c = g.qdq(g.node("Concat", [p, p], name="cat", axis=1), "c", zero=0)
    m = g.qdq(g.node("GlobalAveragePool", [c], name="mean"), "m", zero=0)
    f = g.qdq(g.node("Flatten", [m], name="flat"), "f", zero=0)
    g.output(g.node("Gemm", [f, g.weight((4, 16), "fc.weight"), g.bias(4, "fc.bias")], name="fc", transB=1))


def linear_with_kept_apart_bias(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", TOKENS), "x")
    y = g.node("MatMul", [x, g.weight((16, 8), "w", axis=1)], name="mm")
    g.output(g.node("Add", [y, g.constant(np.ones((1, 1, 8), np.float32))], name="bias"))


def linear_with_integer_bias(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", TOKENS), "x")
    y = g.node("MatMul", [x, g.weight((16, 8), "w", axis=1)], name="mm")
    g.output(g.node("Add", [y, g.bias(8, "b")], name="bias"))


def dynamic_linear(g: GraphBuilder) -> None:
    q, scale, zero = g.nodes_of("DynamicQuantizeLinear", [g.input("x", TOKENS)], "dynamic", 3)
    codes, zeros = g.constant(np.ones((16, 8), np.int8)), g.constant(np.zeros(8, np.int8))
    y = g.node("Cast", [g.node("MatMulInteger", [q, codes, zero, zeros], name="mm")], to=TensorProto.FLOAT)
    y = g.node("Mul", [y, g.node("Mul", [scale, g.constant(np.ones(8, np.float32))])])
    g.output(g.node("Add", [y, g.constant(np.ones(8, np.float32))]))


def attention_heads(g: GraphBuilder) -> None:
    x = g.node("Reshape", [g.qdq(g.input("x", TOKENS), "x"), g.constant(int64(1, 6, 2, 8))], name="split")
    x = g.node("Transpose", [x], name="heads", perm=[0, 2, 1, 3])
    g.output(g.node("MatMul", [x, g.weight((8, 4), "w", axis=1)], name="mm"))


def weight_only(g: GraphBuilder) -> None:
    g.output(g.node("MatMul", [g.input("x", TOKENS), g.weight((16, 8), "w", axis=1)], name="mm"))


def clip_that_holds_the_range(g: GraphBuilder) -> None:
    y = g.conv(g.qdq(g.input("x", IMAGE), "x"), "conv")
    y = g.node("Clip", [y, g.constant(np.float32(0)), g.constant(np.float32(6))], name="relu6")
    g.output(g.qdq(y, "y", scale=6 / 255, zero=0))


def signed_activations(g: GraphBuilder) -> None:
    y = g.node("Relu", [g.conv(g.qdq(g.input("x", IMAGE), "x", zero=0, kind=np.int8), "conv")])
    g.output(g.qdq(y, "y", zero=-128, kind=np.int8))


def silu(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", IMAGE), "x")
    s = g.qdq(g.node("Sigmoid", [x], name="sigmoid"), "s", 1 / 256, 0)
    g.output(g.qdq(g.node("Mul", [s, x], name="product"), "y"))


def split_and_upsample(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", IMAGE), "x")
    a, b = g.nodes_of("Split", [x, g.constant(int64(4, 4))], "split", 2, axis=1)
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    g.output(g.qdq(g.node("Resize", [g.qdq(a, "a"), "", scales], name="up", mode="nearest"), "y"))
    g.output(g.qdq(g.node("DepthToSpace", [g.qdq(b, "b")], name="shuffle", blocksize=2), "z"))


def integer_table(g: GraphBuilder) -> None:
    rows = g.node("Gather", [g.constant(np.ones((9, 4), np.int8)), g.input("i", [1, 3], TensorProto.INT64)])
    g.output(g.dequantize(rows, "table", zero=0, kind=np.int8))


CLEAN: list[tuple[Build, dict[str, int]]] = [
    (
        residual_block,
        {
            "Flatten": 1,
            "NhwcMaxPool": 1,
            "QGemm": 1,
            "QLinearAdd": 1,
            "QLinearConcat": 1,
            "QLinearConv": 2,
            "QLinearGlobalAveragePool": 1,
        },
    ),
    (linear_with_kept_apart_bias, {"MatMulIntegerToFloat": 1}),
    (linear_with_integer_bias, {"QGemm": 1}),
    (dynamic_linear, {"DynamicQuantizeMatMul": 1}),
    (attention_heads, {"MatMulIntegerToFloat": 1, "Reshape": 1, "Transpose": 1}),
    (weight_only, {"MatMulNBits": 1}),
    (clip_that_holds_the_range, {"QLinearConv": 1}),
    (signed_activations, {"QLinearConv": 1}),
    (silu, {"QLinearMul": 1, "QLinearSigmoid": 1}),
    (split_and_upsample, {"DepthToSpace": 1, "Resize": 1, "Split": 1}),
    (integer_table, {"Gather": 1}),
]


@pytest.mark.parametrize(("build", "fused"), CLEAN, ids=[build.__name__ for build, _ in CLEAN])
def test_correct_graph_has_nothing_unfused(build: Build, fused: dict[str, int], tmp_path: Path) -> None:
    report = check(build, tmp_path)
    assert report.unfused == []
    assert report.left_over == ()
    # Whether a pool runs channels first or last depends on the machine; that it runs on integers does not.
    assert {name.removeprefix("Nhwc"): count for name, count in report.fused.items()} == {
        name.removeprefix("Nhwc"): count for name, count in fused.items()
    }


@pytest.mark.parametrize("opset", [18, 19, 20, 21])
def test_newer_opsets_fuse_the_same(opset: int, tmp_path: Path) -> None:
    assert check(residual_block, tmp_path, opset).unfused == []
    assert check(linear_with_kept_apart_bias, tmp_path, opset).unfused == []


# ---------------------------------------------------------------- seeded faults

FAULTS: list[tuple[str, Build, int, list[tuple[str, str]]]] = []


def fault(*expected: tuple[str, str], opset: int = 17) -> Callable[[Build], Build]:
    """Register a graph and the entries that its fault must give, word for word."""

    def register(build: Build) -> Build:
        FAULTS.append((build.__name__, build, opset, list(expected)))
        return build

    return register


def image_conv(g: GraphBuilder) -> str:
    return g.conv(g.qdq(g.input("x", IMAGE), "x"), "conv")


@fault(("conv", "its output 'conv:0' is a graph output in float; no QuantizeLinear can take it over"))
def output_is_the_graphs(g: GraphBuilder) -> None:
    g.output(image_conv(g))


@fault(("conv", "its output feeds 'tanh' (Tanh), not a QuantizeLinear"))
def no_quantizer(g: GraphBuilder) -> None:
    g.output(g.node("Tanh", [image_conv(g)], name="tanh"))


@fault(("conv", "its output feeds both 'y.q' (QuantizeLinear) and, in float, 'tanh' (Tanh)"))
def quantizer_and_float_reader(g: GraphBuilder) -> None:
    y = image_conv(g)
    g.output(g.qdq(y, "y"))
    g.output(g.node("Tanh", [y], name="tanh"))


@fault(("conv", "its output feeds 2 QuantizeLinear ('y.q' and 'z.q'); one must serve all readers"))
def two_quantizers(g: GraphBuilder) -> None:
    y = image_conv(g)
    g.output(g.qdq(y, "y"))
    g.output(g.qdq(y, "z", scale=0.03))


@fault(("pool", "its second output 'pool:1' is used; the integer kernel has one output"))
def second_output(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", IMAGE), "x")
    values, indices = g.nodes_of("MaxPool", [x], "pool", 2, kernel_shape=[2, 2])
    g.output(g.qdq(values, "y"))
    g.output(indices, TensorProto.INT64)


@fault(("conv", "input 0 is uint16 ('x.dq' (DequantizeLinear)); integer kernels take 8 bits"), opset=21)
def sixteen_bits(g: GraphBuilder) -> None:
    y = g.conv(g.qdq(g.input("x", IMAGE), "x", zero=32768, kind=np.uint16), "conv")
    g.output(g.qdq(y, "y", zero=32768, kind=np.uint16))


@fault(("conv", "its output is uint16 ('y.q' (QuantizeLinear)); integer kernels take 8 bits"), opset=21)
def sixteen_bit_output(g: GraphBuilder) -> None:
    g.output(g.qdq(image_conv(g), "y", zero=32768, kind=np.uint16))


@fault(("mm", "input 1 is int4 ('w' (DequantizeLinear)); integer kernels take 8 bits"), opset=21)
def four_bit_weight(g: GraphBuilder) -> None:
    codes = g.tensor(helper.make_tensor("codes", TensorProto.INT4, [16, 8], np.zeros(128, np.int8)))
    zero = g.tensor(helper.make_tensor("zero", TensorProto.INT4, [8], np.zeros(8, np.int8)))
    w = g.node("DequantizeLinear", [codes, g.constant(np.ones(8, np.float32)), zero], name="w", axis=1)
    g.output(g.qdq(g.node("MatMul", [g.qdq(g.input("x", TOKENS), "x"), w], name="mm"), "y"))


@fault(("conv", "the scale of 'x.dq' (DequantizeLinear) is computed at run time, not a constant"))
def scale_at_run_time(g: GraphBuilder) -> None:
    scale, zero = g.node("Abs", [g.input("s", [])], name="abs"), g.constant(np.uint8(128))
    x = g.node("QuantizeLinear", [g.input("x", IMAGE), scale, zero], name="x.q")
    g.output(g.qdq(g.conv(g.node("DequantizeLinear", [x, scale, zero], name="x.dq"), "conv"), "y"))


@fault(("x.dq", "consumer 'mm' (MatMul) runs as MatMulNBits, which is float on this side"))
def dynamic_quantization_spelled_with_dq(g: GraphBuilder) -> None:
    parts = g.nodes_of("DynamicQuantizeLinear", [g.input("x", TOKENS)], "dynamic", 3)
    x = g.node("DequantizeLinear", parts, name="x.dq")
    y = g.node("MatMul", [x, g.weight((16, 8), "w", axis=1)], name="mm")
    g.output(g.node("Add", [y, g.constant(np.ones(8, np.float32))], name="bias"))


@fault(
    (
        "conv",
        "'x.dq' (DequantizeLinear) takes its scale from a DynamicQuantizeLinear; dynamic quantization "
        "fuses as DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul",
    )
)
def dynamic_quantization_of_a_convolution(g: GraphBuilder) -> None:
    parts = g.nodes_of("DynamicQuantizeLinear", [g.input("x", IMAGE)], "dynamic", 3)
    g.output(g.qdq(g.conv(g.node("DequantizeLinear", parts, name="x.dq"), "conv"), "y"))


@fault(("sum", "input 1 comes from graph input 'z' in float, not from a DequantizeLinear"))
def float_branch(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", IMAGE), "x")
    g.output(g.qdq(g.node("Add", [x, g.input("z", IMAGE)], name="sum"), "y"))


@fault(("mm", "weight 'w' is a float constant, not a DequantizeLinear of an integer initializer"))
def float_weight(g: GraphBuilder) -> None:
    x, w = g.qdq(g.input("x", TOKENS), "x"), g.constant(np.ones((16, 8), np.float32), "w")
    g.output(g.qdq(g.node("MatMul", [x, w], name="mm"), "y"))


@fault(("conv", "bias 'conv.bias:0' is uint8 ('conv.bias' (DequantizeLinear)), not int32"))
def narrow_bias(g: GraphBuilder) -> None:
    x, w = g.qdq(g.input("x", IMAGE), "x"), g.weight((8, 8, 3, 3), "w")
    b = g.dequantize(g.constant(np.ones(8, np.uint8)), "conv.bias", zero=0)
    g.output(g.qdq(g.node("Conv", [x, w, b], name="conv"), "y"))


@fault(("fc", "bias 'b' is float, not a DequantizeLinear of an int32 initializer"))
def float_bias(g: GraphBuilder) -> None:
    x, b = g.qdq(g.input("x", [2, 16]), "x"), g.constant(np.ones(8, np.float32), "b")
    g.output(g.node("Gemm", [x, g.weight((8, 16), "w"), b], name="fc", transB=1))


@fault(
    (
        "mm",
        "ONNX Runtime merges it with 'bias' (Add) into a Gemm, whose bias must be an int32 DequantizeLinear; "
        "a bias of shape [1, ..., N] keeps them apart",
    )
)
def float_bias_behind_a_matmul(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", TOKENS), "x")
    y = g.node("MatMul", [x, g.weight((16, 8), "w", axis=1)], name="mm")
    g.output(g.node("Add", [y, g.constant(np.ones(8, np.float32))], name="bias"))


@fault(("conv", "input 0 has 8 scales ('x.dq' (DequantizeLinear)); Conv takes one per tensor"))
def activation_per_channel(g: GraphBuilder) -> None:
    scale, zero = g.constant(np.full(8, 0.02, np.float32)), g.constant(np.full(8, 128, np.uint8))
    x = g.node("QuantizeLinear", [g.input("x", IMAGE), scale, zero], name="x.q", axis=1)
    x = g.node("DequantizeLinear", [x, scale, zero], name="x.dq", axis=1)
    g.output(g.qdq(g.conv(x, "conv"), "y"))


@fault(("table", "input 0 has 9 scales ('rows' (DequantizeLinear)); Gather takes one per tensor"))
def table_dequantized_before_the_gather(g: GraphBuilder) -> None:
    g.output(
        g.node("Gather", [g.weight((9, 4), "rows"), g.input("i", [1, 3], TensorProto.INT64)], name="table")
    )


@fault(("fc", "Gemm has beta 0.5; the integer kernel needs 1"))
def gemm_with_a_factor(g: GraphBuilder) -> None:
    inputs = [g.qdq(g.input("x", [2, 16]), "x"), g.weight((8, 16), "w"), g.bias(8, "b")]
    g.output(g.qdq(g.node("Gemm", inputs, name="fc", transB=1, beta=0.5), "y"))


@fault(
    (
        "conv",
        "'relu' (Relu) in front of 'y.q' (QuantizeLinear) is not redundant: the zero point is 128, not 0, "
        "the least of uint8",
    )
)
def relu_with_a_centred_zero_point(g: GraphBuilder) -> None:
    g.output(g.qdq(g.node("Relu", [image_conv(g)], name="relu"), "y"))


@fault(
    (
        "conv",
        "'relu6' (Clip) in front of 'y.q' (QuantizeLinear) cuts at [0, 6], inside the quantized "
        "range [0, 12.75]",
    )
)
def clip_inside_the_range(g: GraphBuilder) -> None:
    y = g.node("Clip", [image_conv(g), g.constant(np.float32(0)), g.constant(np.float32(6))], name="relu6")
    g.output(g.qdq(y, "y", scale=0.05, zero=0))


@fault(
    (
        "relu",
        "the Q behind it makes it redundant, which leaves 'x.dq' (DequantizeLinear) and 'y.q' "
        "(QuantizeLinear) as a float round trip; quantize only behind it",
    )
)
def relu_between_two_pairs(g: GraphBuilder) -> None:
    g.output(g.qdq(g.node("Relu", [g.qdq(g.input("x", IMAGE), "x")], name="relu"), "y", zero=0))


def bare_conv(g: GraphBuilder, x: str, name: str) -> str:
    return g.node("Conv", [x, g.weight((8, 8, 3, 3), f"{name}.weight")], name=name)


@fault(("y.q", "it only requantizes 'x.dq' (DequantizeLinear); share one scale instead"))
def requantization(g: GraphBuilder) -> None:
    x = g.qdq(g.conv(g.qdq(g.input("i", IMAGE), "i"), "conv"), "x")
    g.output(g.qdq(bare_conv(g, x, "conv_b"), "u"))
    g.output(g.qdq(bare_conv(g, g.qdq(x, "y", scale=0.03), "conv_c"), "z"))


@fault(("conv", "the scale of 'conv.bias' (DequantizeLinear) is 50% off input scale x weight scale"))
def bias_scale_does_not_fit(g: GraphBuilder) -> None:
    g.output(g.qdq(g.conv(g.qdq(g.input("x", IMAGE), "x", scale=0.04), "conv"), "y"))


@fault(
    (
        "conv_b",
        "ONNX Runtime merges 'x.dq' (DequantizeLinear) and 'y.dq' (DequantizeLinear) in front of input 0 "
        "into a pair of another scale, which the bias does not fit; write one pair",
    )
)
def pairs_in_a_row(g: GraphBuilder) -> None:
    x = g.qdq(g.conv(g.qdq(g.input("i", IMAGE), "i"), "conv"), "x", zero=0)
    g.output(g.qdq(g.conv(g.qdq(x, "y"), "conv_b"), "z"))


@fault(
    (
        "reshape",
        "'y.q' (QuantizeLinear) has another scale than 'x.dq' (DequantizeLinear); Reshape only moves data",
    )
)
def moved_data_changes_scale(g: GraphBuilder) -> None:
    x = g.node("Reshape", [g.qdq(g.input("x", IMAGE), "x"), g.constant(int64(1, -1))], name="reshape")
    g.output(g.qdq(x, "y", scale=0.03))


@fault(
    (
        "split",
        "'b.q' (QuantizeLinear) has another zero point than 'x.dq' (DequantizeLinear); Split only moves data",
    )
)
def split_changes_zero_point(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", IMAGE), "x")
    a, b = g.nodes_of("Split", [x, g.constant(int64(4, 4))], "split", 2, axis=1)
    g.output(g.qdq(a, "a"))
    g.output(g.qdq(b, "b", zero=100))


@fault(("flat", "'y.q' (QuantizeLinear) does not write its zero point"))
def zero_point_not_written(g: GraphBuilder) -> None:
    scale = g.constant(np.float32(0.02))
    flat = g.node("Flatten", [g.qdq(g.input("x", IMAGE), "x")], name="flat")
    y = g.node("QuantizeLinear", [flat, scale], name="y.q")
    g.output(g.node("DequantizeLinear", [y, scale], name="y.dq"))


@fault(("up", "Resize in mode 'linear' has no integer kernel; mode 'nearest' has"))
def resize_linear(g: GraphBuilder) -> None:
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    x = g.qdq(g.input("x", IMAGE), "x")
    g.output(g.qdq(g.node("Resize", [x, "", scales], name="up", mode="linear"), "y"))


@fault(("pool", "MaxPool has an 8-bit kernel from opset 12 on; the file is opset 11"), opset=11)
def old_max_pool(g: GraphBuilder) -> None:
    g.output(
        g.qdq(g.node("MaxPool", [g.qdq(g.input("x", IMAGE), "x")], name="pool", kernel_shape=[2, 2]), "y")
    )


@fault(("tanh", "Tanh has no integer kernel on the CPU execution provider"))
def operator_without_kernel(g: GraphBuilder) -> None:
    g.output(g.qdq(g.node("Tanh", [g.qdq(g.input("x", IMAGE), "x")], name="tanh"), "y"))


@fault(("act", "HardSwish has no integer kernel on the CPU execution provider"))
def operator_that_is_inlined(g: GraphBuilder) -> None:
    g.output(g.qdq(g.node("HardSwish", [g.qdq(g.input("x", IMAGE), "x")], name="act"), "y"))


@fault(("y.q", "producer 'norm' (LayerNormalization) has no integer kernel"))
def quantizer_behind_float(g: GraphBuilder) -> None:
    y = g.node("LayerNormalization", [g.input("x", TOKENS), g.constant(np.ones(16, np.float32))], name="norm")
    g.output(g.node("MatMul", [g.qdq(y, "y"), g.weight((16, 8), "w", axis=1)], name="mm"))


@fault(("y.q", "producer 'sum' (Add) runs in float: none of its inputs comes from a DequantizeLinear"))
def quantizer_behind_a_float_sum(g: GraphBuilder) -> None:
    y = g.node("Add", [g.input("x", TOKENS), g.input("z", TOKENS)], name="sum")
    g.output(g.node("MatMul", [g.qdq(y, "y"), g.weight((16, 8), "w", axis=1)], name="mm"))


@fault(("y.dq", "consumer 'tanh' (Tanh) has no integer kernel"))
def dequantizer_before_float(g: GraphBuilder) -> None:
    g.output(g.node("Tanh", [g.qdq(image_conv(g), "y")], name="tanh"))


@fault(("x.dq", "consumer 'tanh' (Tanh) has no integer kernel"))
def dequantizer_moved_past_a_reshape(g: GraphBuilder) -> None:
    x = g.node("Reshape", [g.qdq(g.input("x", IMAGE), "x"), g.constant(int64(1, -1))], name="reshape")
    g.output(g.node("Tanh", [x], name="tanh"))


@fault(("x.dq", "consumer 'tanh' (Tanh) has no integer kernel; consumer 'exp' (Exp) has no integer kernel"))
def dequantizer_shared_with_float(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", IMAGE), "x")
    g.output(g.qdq(g.conv(x, "conv"), "y"))
    g.output(g.node("Tanh", [x], name="tanh"))
    g.output(g.node("Exp", [x], name="exp"))


@fault(("i.q2", "the graph input 'i' is quantized more than once"))
def input_quantized_twice(g: GraphBuilder) -> None:
    i = g.input("i", TOKENS)
    g.output(g.node("MatMul", [g.qdq(i, "i"), g.weight((16, 8), "w", axis=1)], name="mm"))
    again = g.dequantize(g.quantize(i, "i.q2", scale=0.05), "i.dq2", scale=0.05)
    g.output(g.node("MatMul", [again, g.weight((16, 8), "v", axis=1)], name="mm2"))


@fault(
    ("bias", "input 1 is int32 ('b' (DequantizeLinear)); integer kernels take 8 bits"),
    ("y.q", "producer 'gelu' (Gelu) has no integer kernel"),
    opset=20,
)
def bias_absorbed_by_a_float_kernel(g: GraphBuilder) -> None:
    x = g.qdq(g.input("x", ["batch", "tokens", 16]), "x")
    y = g.node(
        "Add", [g.node("MatMul", [x, g.weight((16, 8), "w", axis=1)], name="mm"), g.bias(8, "b")], name="bias"
    )
    y = g.qdq(g.node("Gelu", [y], name="gelu"), "y")
    g.output(g.node("MatMul", [y, g.weight((8, 4), "v", axis=1)], name="mm2"))


@pytest.mark.parametrize(("name", "build", "opset", "expected"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_fault_gives_its_reason(
    name: str, build: Build, opset: int, expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    assert check(build, tmp_path, opset).unfused == expected


# ---------------------------------------------------------------- rules that x86 hides or ONNX Runtime mends


def sentence(build: Build, node: str) -> str:
    graph = GraphBuilder()
    build(graph)
    view = QdqGraph.of(graph.model().graph, graph.opset, Path())
    return explain(view, [each.name for each in view.nodes].index(node))


def test_types_that_differ_are_explained() -> None:
    def signed_output(g: GraphBuilder) -> None:
        g.output(g.qdq(image_conv(g), "y", zero=0, kind=np.int8))

    def unsigned_weight(g: GraphBuilder) -> None:
        x = g.qdq(g.input("x", IMAGE), "x", zero=0, kind=np.int8)
        y = g.node("Conv", [x, g.weight((8, 8, 3, 3), "w", kind=np.uint8)], name="conv")
        g.output(g.qdq(y, "y", zero=0, kind=np.int8))

    def mixed_branches(g: GraphBuilder) -> None:
        x, z = g.qdq(g.input("x", IMAGE), "x"), g.qdq(g.input("z", IMAGE), "z", zero=0, kind=np.int8)
        g.output(g.qdq(g.node("Add", [x, z], name="sum"), "y"))

    assert sentence(signed_output, "conv") == "its output is int8 and its input is uint8; they must agree"
    assert (
        sentence(unsigned_weight, "conv")
        == "its activation is int8 and its weight is uint8; both must be signed"
    )
    assert sentence(mixed_branches, "sum") == "input 1 is int8 and input 0 is uint8; they must agree"


def test_transposed_weight_is_explained() -> None:
    def build(g: GraphBuilder) -> None:
        w = g.node("Transpose", [g.weight((8, 16), "w")], name="t", perm=[1, 0])
        g.output(g.node("MatMul", [g.qdq(g.input("x", TOKENS), "x"), w], name="mm"))

    expected = "a Transpose follows the weight's DequantizeLinear; store the transposed initializer"
    assert sentence(build, "mm") == expected


def test_what_no_rule_explains_is_said_so() -> None:
    assert sentence(residual_block, "conv_a") == UNEXPLAINED


# ---------------------------------------------------------------- files


def test_left_over_lists_every_pair_that_an_operator_entry_covers(tmp_path: Path) -> None:
    report = check(relu_with_a_centred_zero_point, tmp_path)
    assert sorted(report.left_over) == ["conv.bias", "conv.weight", "x.dq", "y.q"]
    assert report.fused == {}
    assert report.executed["QuantizeLinear"] == 2


def test_unnamed_nodes_are_named_by_their_output(tmp_path: Path) -> None:
    graph = GraphBuilder()
    operator_without_kernel(graph)
    for node in graph.nodes:
        node.name = ""
    report = check_fusion(graph.save(tmp_path / "model.onnx"))
    assert [entry.node for entry in report.entries] == ["tanh:0"]
    assert [entry.op_type for entry in report.entries] == ["Tanh"]


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    graph = GraphBuilder()
    x = graph.input("x", IMAGE)
    for index in range(2):
        x = graph.conv(graph.qdq(x, f"x{index}"), f"conv{index}")
    x = graph.qdq(x, "y")
    graph.output(graph.node("Tanh", [x]))
    for node in graph.nodes:
        node.name = "node"
    assert check_fusion(graph.save(tmp_path / "model.onnx")).fused == {"QLinearConv": 2}


def test_external_data_is_read_where_it_lies(tmp_path: Path) -> None:
    graph = GraphBuilder()
    relu_with_a_centred_zero_point(graph)
    path = tmp_path / "model.onnx"
    onnx.save(graph.model(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    before = sorted(each.name for each in tmp_path.iterdir())
    assert [entry.node for entry in check_fusion(path).entries] == ["conv"]
    assert "the zero point is 128" in check_fusion(path).entries[0].reason
    assert sorted(each.name for each in tmp_path.iterdir()) == before == ["model.onnx", "model.onnx.data"]


def test_branches_are_looked_into(tmp_path: Path) -> None:
    branches = []
    for name, scale in (("then", 0.02), ("else", 0.03)):
        inner = GraphBuilder()
        y = inner.node("Tanh", [inner.qdq("x", f"{name}.x", scale)], name=f"{name}.tanh")
        inner.output(inner.qdq(y, f"{name}.y", scale))
        branches.append(helper.make_graph(inner.nodes, name, [], inner.outputs, inner.initializers))
    graph = GraphBuilder()
    graph.input("x", IMAGE)
    condition = graph.input("condition", [], TensorProto.BOOL)
    graph.output(graph.node("If", [condition], name="if", then_branch=branches[0], else_branch=branches[1]))
    report = check_fusion(graph.save(tmp_path / "model.onnx"))
    assert sorted(entry.node for entry in report.entries) == ["else.tanh", "then.tanh"]


@pytest.mark.parametrize("content", [b"", b"no protobuf at all"], ids=["empty", "text"])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphoptError, match=r"model\.onnx"):
        check_fusion(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="there is no file"):
        check_fusion(tmp_path / "absent.onnx")
