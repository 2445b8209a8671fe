"""Which kernels a file really runs on: read from the graph that ONNX Runtime made of it, whoever wrote it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

INTEGER = frozenset(
    (
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearConvTranspose",
        "QLinearMatMul",
    )
)
FLOAT = frozenset(
    ("Attention", "Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul")
)
CASTS = frozenset(("QuantizeLinear", "DequantizeLinear"))


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def optimized_graph(path: str) -> Any:
    """The graph after ONNX Runtime's extended optimizations, the level at which it fuses Q and DQ."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph


def count_kernels(path: str) -> dict[str, int]:
    """Count heavy operators on integer and float kernels, and the Q/DQ left over.

    A Q at a graph input and a DQ at a graph output are borders of the integer part and not counted. `unfused`
    is the sum of float heavy operators and leftover Q/DQ.
    """
    graph = optimized_graph(path)
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    integer = floating = leftover = 0
    for node in _nodes(graph):
        integer += node.op_type in INTEGER
        floating += node.op_type in FLOAT
        border = (node.op_type == "QuantizeLinear" and node.input[0] in inputs) or (
            node.op_type == "DequantizeLinear" and node.output[0] in outputs
        )
        leftover += node.op_type in CASTS and not border
    return {
        "integer_kernels": integer,
        "float_kernels": floating,
        "leftover_qdq": leftover,
        "unfused": floating + leftover,
    }
