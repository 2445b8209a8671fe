"""Files for ARM: signed activations, whose products ARM multiplies at full width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import targets
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnx.compare import run_onnx
from graphopt.backends.onnx.fusion import check_fusion, has_signed_activations
from graphopt.ir import operator


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def result() -> graphopt.Result:
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 8, 8),) for _ in range(3)]
    return graphopt.optimize(
        Residual().eval(), batches[0], recipe="int8_static", calibration=batches, target="onnxruntime-arm64"
    )


def test_the_graph(result: graphopt.Result) -> None:
    nodes = [node for node in result.program.graph.nodes if node.op == "call_function"]
    kinds = [operator(node).removeprefix("graphopt.") for node in nodes]
    assert kinds.count("quantize") == 6  # input, relu, body, relu of the sum, pool, output: the border of the head
    assert [kind for kind in kinds if kind not in ("quantize", "dequantize")] == [
        "conv2d", "relu", "conv2d", "add", "relu", "adaptive_avg_pool2d", "reshape", "linear",
    ]  # fmt: skip
    formats = {node.args[-1] for node in nodes if operator(node) == "graphopt.quantize"}
    assert formats == {"int8"}


def test_the_file(result: graphopt.Result, tmp_path: Path) -> None:
    report = result.export(tmp_path / "m.onnx", measure=False)
    graph = onnx.load(report.path).graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    quantizes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantizes and all(values[node.input[2]].dtype == np.int8 for node in quantizes)
    makers = {name: node for node in graph.node for name in node.output}
    behind_relu = [node for node in quantizes if node.input[0] in makers and makers[node.input[0]].op_type == "Relu"]
    assert behind_relu and all(int(values[node.input[2]]) == -128 for node in behind_relu)  # so the ReLU is absorbed
    weights = [each for each in graph.initializer if each.data_type == TensorProto.INT8 and len(each.dims) > 1]
    assert len(weights) == 3
    for weight in weights:  # symmetric, one scale for each output channel
        assert np.abs(numpy_helper.to_array(weight).astype(int)).max() <= 127


def test_the_file_as_written_computes_what_the_emulation_does(result: graphopt.Result, tmp_path: Path) -> None:
    """Both dequantize the same codes, so that only the order of float additions is left."""
    result.export(tmp_path / "m.onnx", measure=False)
    (name,) = [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input]
    for seed in range(3):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        (made,) = run_onnx(tmp_path / "m.onnx", {name: x.numpy()}, disable_optimizations=True).values()
        np.testing.assert_allclose(made, result(x).detach().numpy(), rtol=0, atol=1e-6)


def test_the_report_tells_what_fuses_on_arm(result: graphopt.Result, tmp_path: Path) -> None:
    report = result.export(tmp_path / "m.onnx")
    assert report.fused["QLinearConv"] == 2 and report.fused["QGemm"] == 1 and report.fused["QLinearAdd"] == 1
    assert report.unfused == []
    here = check_fusion(report.path)
    if here.fused == report.fused:  # this is an ARM machine
        assert report.latency_ms is not None
    else:
        assert "QLinearConv" not in here.fused
        assert report.latency_ms is None and report.baseline_latency_ms is None and report.slow_nodes == []
        assert any("on ARM, not here" in note for note in report.notes)
    assert report.sqnr_db is not None and report.sqnr_db > 30 and report.max_steps is not None and report.max_steps <= 1


def test_unsigned_files_are_told_as_they_run_here(tmp_path: Path) -> None:
    module, example = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), (torch.randn(1, 3, 4, 4),)
    made = graphopt.optimize(module, example, recipe="int8_static", calibration=[example], target=targets.EXACT)
    report = made.export(tmp_path / "m.onnx")
    assert not has_signed_activations(report.path)
    assert report.latency_ms is not None and not any("ARM" in note for note in report.notes)


def test_scales_at_run_time_are_left_out_with_the_reason() -> None:
    module = nn.Sequential(nn.Linear(8, 8))
    result = graphopt.optimize(module, (torch.randn(2, 8),), recipe="int8_dynamic", target="onnxruntime-arm64")
    assert any("no fast linear" in site.reason for site in result.trace["quantize_dynamic"].skipped)
