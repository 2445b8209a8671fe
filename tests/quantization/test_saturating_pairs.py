"""Which weights each kernel adds in 16 bits, found by trying every pair: what `paired_rows` rests on.

    x = 255 everywhere, w_i = w_j = 127 and 0 elsewhere:   exact 64770, saturated 32767

One output channel a pair. Any pair that is off must be neighbours in `paired_rows`; on a processor that adds in 32 bits
none is.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

import graphopt
from graphopt.backends.onnx.compare import run_onnx
from graphopt.backends.onnx.openvino_runtime import load_openvino
from graphopt.backends.onnx.processor import saturates_pairs
from graphopt.ir import operator
from graphopt.quantization.saturation import paired_rows

Array = npt.NDArray[Any]
Pair = tuple[int, int]
_MICROSOFT = "com.microsoft"

pytestmark = pytest.mark.skipif(not saturates_pairs(), reason="this processor adds products of eight bits in 32")


def _model(nodes: list[onnx.NodeProto], kind: int, shape: list[int], values: dict[str, Array]) -> ModelProto:
    """A model from "x" of `shape` to "y"."""
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    integer = nodes[-1].op_type == "MatMulInteger"
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32 if integer else TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(
        helper.make_graph(nodes, "pairs", inputs, outputs, initializers), opset_imports=opsets, ir_version=10
    )


def _scalars() -> dict[str, Array]:
    """Scales that make one step of x and of w count 1, and outputs in steps of 1000."""
    return {
        "one": np.array(1, np.float32),
        "thousand": np.array(1000, np.float32),
        "zero": np.array(0, np.uint8),
        "zero_w": np.array(0, np.int8),
    }


def _off(found: Array, pairs: list[Pair]) -> set[Pair]:
    """The pairs whose channel (axis 0) is not the exact sum anywhere, within the 1000 of an output's rounding."""
    wrong = np.abs(found.astype(np.float64) - 2 * 255 * 127).reshape(len(pairs), -1).max(1) > 1500
    return {pair for pair, is_wrong in zip(pairs, wrong, strict=True) if is_wrong}


_LINEARS: dict[str, Callable[[], list[onnx.NodeProto]]] = {
    "MatMulInteger": lambda: [helper.make_node("MatMulInteger", ["x", "w", "zero", "zero_w"], ["y"])],
    "MatMulIntegerToFloat": lambda: [
        helper.make_node(
            "MatMulIntegerToFloat", ["x", "w", "one", "one", "zero", "zero_w"], ["y"], domain=_MICROSOFT
        )
    ],
    "DynamicQuantizeMatMul": lambda: [
        helper.make_node("DynamicQuantizeMatMul", ["x", "w", "one", "zero_w"], ["y"], domain=_MICROSOFT)
    ],
    "QGemm": lambda: [
        helper.make_node("QGemm", ["x", "one", "zero", "w", "one", "zero_w"], ["y"], domain=_MICROSOFT)
    ],
    "QLinearMatMul": lambda: [
        helper.make_node("QLinearMatMul", ["x", "one", "zero", "w", "one", "zero_w", "thousand", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "thousand", "zero"], ["y"]),
    ],
}


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("kind", _LINEARS)
def test_linears_add_neighbours(kind: str, rows: int, tmp_path: Path) -> None:
    for size in (2, 5, 16, 31):
        pairs = list(itertools.combinations(range(size), 2))
        weight = np.zeros((size, len(pairs)), np.int8)
        for column, pair in enumerate(pairs):
            weight[list(pair), column] = 127
        dtype = np.float32 if kind == "DynamicQuantizeMatMul" else np.uint8
        model = _model(
            _LINEARS[kind](), helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [rows, size],
            _scalars() | {"w": weight},
        )  # fmt: skip
        onnx.save(model, tmp_path / "m.onnx")
        found = run_onnx(tmp_path / "m.onnx", {"x": np.full((rows, size), 255, dtype)})["y"]
        assert _off(found.T, pairs) == {(first, first + 1) for first in range(0, size - 1, 2)}


def _rows(channels: int, kernel: tuple[int, ...], groups: int) -> tuple[Any, int]:
    """The convolution's node for `paired_rows`, and the length of a row."""
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    module = kinds[len(kernel)](channels, groups * 2, kernel, groups=groups, bias=False)  # type: ignore[arg-type]
    program = graphopt.capture(module, (torch.zeros(1, channels, *(size + 1 for size in kernel)),))
    node = next(node for node in program.graph.nodes if operator(node).startswith("conv"))
    return node, channels // groups * math.prod(kernel)


def _convolution(
    channels: int, kernel: tuple[int, ...], groups: int, pairs: list[Pair], place: Array, run: Callable[..., Array]
) -> set[Pair]:
    """Pairs of places in a row that are off; `place` [row] says where in a weight [channels / groups, *kernel] each is.

    Q/DQ around the convolution, since that is what every runtime reads.
    """
    single = np.zeros((len(pairs), channels // groups * math.prod(kernel)), np.int8)
    for index, pair in enumerate(pairs):
        single[index, place[list(pair)]] = 127
    weight = np.concatenate([single.reshape(-1, channels // groups, *kernel)] * groups)
    many = np.ones(len(weight), np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["w", "many", "zeros_w"], ["weights"], axis=0),
        helper.make_node("Conv", ["values", "weights"], ["product"], group=groups),
        helper.make_node("QuantizeLinear", ["product", "thousand", "zero"], ["out_codes"]),
        helper.make_node("DequantizeLinear", ["out_codes", "thousand", "zero"], ["y"]),
    ]
    shape = [1, channels, *(size + 2 for size in kernel)]
    values = _scalars() | {"w": weight, "many": many, "zeros_w": np.zeros(len(weight), np.int8)}
    found = run(_model(nodes, TensorProto.FLOAT, shape, values), np.full(shape, 255, np.float32))
    per_group = found[0].reshape(groups, len(pairs), -1).swapaxes(0, 1)
    return _off(per_group, pairs)


def _onnxruntime(path: Path, written: bool, model: ModelProto, x: Array) -> Array:
    onnx.save(model, path)
    return run_onnx(path, {"x": x}, disable_optimizations=written)["y"]


def _openvino(path: Path, model: ModelProto, x: Array) -> Array:
    onnx.save(model, path)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = load_openvino().Core().compile_model(str(path), "CPU", options)
    return np.array(compiled({"x": x})[compiled.output(0)])


_SHAPES = [(1, (3, 3), 1), (3, (3, 3), 1), (4, (2, 2), 1), (5, (2, 2), 1), (16, (1, 1), 1), (7, (1, 1), 1),
           (6, (2, 2), 2), (8, (3,), 1), (3, (5,), 1), (3, (2, 2, 2), 1)]  # fmt: skip


@pytest.mark.parametrize(("channels", "kernel", "groups"), _SHAPES)
def test_convolutions_add_neighbours_in_the_order_of_positions_then_channels(
    channels: int, kernel: tuple[int, ...], groups: int, tmp_path: Path
) -> None:
    place, size = _place(channels, kernel, groups)
    pairs = list(itertools.combinations(range(size), 2))
    run = functools.partial(_onnxruntime, tmp_path / "m.onnx", False)
    found = _convolution(channels, kernel, groups, pairs, place, run)
    assert found == {(first, first + 1) for first in range(0, size - 1, 2)}
    exact = functools.partial(_onnxruntime, tmp_path / "m.onnx", True)  # in floats: the model itself is right
    assert _convolution(channels, kernel, groups, pairs, place, exact) == set()


def _place(channels: int, kernel: tuple[int, ...], groups: int) -> tuple[Array, int]:
    """Where each place of a row of `paired_rows` stands in the weight [channels / groups, *kernel], flattened."""
    node, size = _rows(channels, kernel, groups)
    weight = torch.arange(size).reshape(1, channels // groups, *kernel)
    rows = paired_rows(torch.cat([weight, weight]), node)  # of one output it would be taken for depthwise
    assert rows is not None
    return rows[0].numpy(), size


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize(("channels", "kernel", "groups"), _SHAPES[1:4])
def test_openvino_adds_neighbours_too_but_others(
    channels: int, kernel: tuple[int, ...], groups: int, tmp_path: Path
) -> None:
    """It pairs channels within a position; with an odd number of channels these start at odd places of a row."""
    place, size = _place(channels, kernel, groups)
    pairs = list(itertools.combinations(range(size), 2))
    found = _convolution(channels, kernel, groups, pairs, place, functools.partial(_openvino, tmp_path / "m.onnx"))
    assert found and found <= {(first, first + 1) for first in range(size - 1)}
    assert any(first % 2 for first, _ in found) == bool(channels % 2)


@pytest.mark.parametrize("channels", [None, 1, 3, 16])
@pytest.mark.parametrize("kernel", [(3,), (3, 3), (5, 5), (2, 2, 2)])
def test_depthwise_kernels_add_in_32_bits(kernel: tuple[int, ...], channels: int | None, tmp_path: Path) -> None:
    """With `channels` None there are as many as pairs."""
    pairs = list(itertools.combinations(range(math.prod(kernel)), 2))
    width = channels or len(pairs)
    shape = [1, width, *(size + 2 for size in kernel)]
    for start in range(0, len(pairs), width):
        weight = np.zeros((width, math.prod(kernel)), np.int8)
        for index in range(width):
            weight[index, list(pairs[min(start + index, len(pairs) - 1)])] = 127
        names = ["x", "one", "zero", "w", "one", "zero_w", "thousand", "zero"]
        nodes = [
            helper.make_node("QLinearConv", names, ["codes"], group=width),
            helper.make_node("DequantizeLinear", ["codes", "thousand", "zero"], ["y"]),
        ]
        values = _scalars() | {"w": weight.reshape(width, 1, *kernel)}
        onnx.save(_model(nodes, TensorProto.UINT8, shape, values), tmp_path / "m.onnx")
        found = run_onnx(tmp_path / "m.onnx", {"x": np.full(shape, 255, np.uint8)})["y"]
        assert not _off(found[0], [(index, index) for index in range(width)])
