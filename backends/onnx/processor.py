"""What the processor does to integers, asked of ONNX Runtime: one product tells more than a list of processors."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": codes})
    return not np.array_equal(made, codes.astype(np.int32) @ weights.astype(np.int32))
