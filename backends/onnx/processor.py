"""What the runtime does to integers on this processor, asked of it: one product tells more than a list of versions."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


@functools.cache
def saturates_pairs() -> bool:
    """True where two products of uint8 and int8 are added in 16 bits, which overflow."""
    codes, weights = np.full((1, 4), 255, dtype=np.uint8), np.full((4, 16), 127, dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, codes.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (1, 16))],
        [numpy_helper.from_array(weights, "w")],
    )
    (made,) = _run(graph, 13, x=codes)
    return not np.array_equal(made, codes.astype(np.int32) @ weights.astype(np.int32))


def multiplies_packed(packed: ir.DataType, channels: int, block: int, opset: int) -> bool:
    """True where a product with weights [K, channels] in a packed type, in blocks along K (0: none), comes out right.

    A kernel that reads several channels at a time may do so beyond the last (two bits a weight and a number of channels
    that four does not divide: what ONNX Runtime 1.31 then computes has nothing to do with the product). Tried at a
    few channels, as many as leave the same remainder, and two blocks.
    """
    return _multiplies_packed(packed, channels if channels < 32 else 32 + channels % 32, block, opset)


@functools.cache
def _multiplies_packed(packed: ir.DataType, channels: int, block: int, opset: int) -> bool:
    random, size = np.random.default_rng(0), block or 32
    inputs = 2 * size
    bits = packed.itemsize * 8
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if packed.name.startswith("INT") else (0, 2**bits)
    shape = (2, channels) if block else (channels,)
    codes = random.integers(int(low), int(high), (inputs, channels))
    zeros = random.integers(int(low), int(high), shape)
    scales = random.uniform(0.5, 1.5, shape).astype(np.float32)
    weights = _dequantized(codes, scales, zeros, size if block else 0)
    where: dict[str, Any] = {"axis": 0, "block_size": size} if block else {"axis": 1}
    tensors = [ir.Tensor(each.astype(packed.numpy()), packed, name=name) for each, name in ((codes, "q"), (zeros, "z"))]
    for rows in (1, 5):
        x = random.normal(size=(rows, inputs)).astype(np.float32)
        graph = helper.make_graph(
            [
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], **where),
                helper.make_node("MatMul", ["x", "w"], ["y"]),
            ],
            "probe",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (rows, channels))],
            [*(ir.serde.serialize_tensor(each) for each in tensors), numpy_helper.from_array(scales, "s")],
        )
        try:
            (made,) = _run(graph, opset, x=x)
        except Exception:  # whatever the runtime says to a type it has no kernel for
            return False
        exact = x @ weights
        # Inputs may go through 8 bits on the way, which costs a percent.
        if not np.linalg.norm(made - exact) < 0.1 * np.linalg.norm(exact):
            return False
    return True


def _dequantized(codes: Array, scales: Array, zeros: Array, block: int) -> Array:
    if block:
        scales, zeros = np.repeat(scales, block, axis=0), np.repeat(zeros, block, axis=0)
    weights: Array = (codes - zeros) * scales
    return weights


def _run(graph: onnx.GraphProto, opset: int, **feeds: np.ndarray) -> list[np.ndarray]:
    version = onnx.helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))
