"""What a file's sites give in ONNX Runtime: as in torch where the file is right, and where it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import MODELS
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.analysis.numerics import site_errors
from graphopt.backends.onnx.observer import OnnxObserver
from graphopt.ir import Program
from graphopt.passes import Canonicalize, QuantizeDynamic, QuantizeStatic, QuantizeWeights, RetypeFloats
from graphopt.result import Result


class Clamped(nn.Module):
    """Convolutions with a clamp behind them, a residual, and a head whose output has three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = y + torch.relu(self.second(y))
        return self.head(y.flatten(2).mT).reshape(x.shape[0], -1, 3, 4).softmax(-1)  # type: ignore[no-any-return]


def _run(
    module: nn.Module, shape: tuple[int, ...], quantize: Any, tmp_path: Path, **more: Any
) -> tuple[Result, Program, Path]:
    data = [(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]
    run = graphopt.optimize(module, data[0], [Canonicalize(), quantize], calibration=data, **more)
    run.export(tmp_path / "model.onnx", measure=False)
    before = next(each.given for each in run.trace if each.given is not None)
    return run, before, tmp_path / "model.onnx"


@pytest.fixture(name="clamped")
def fixture_clamped() -> nn.Module:
    torch.manual_seed(0)
    return Clamped()


@pytest.mark.parametrize("quantize", [QuantizeStatic(), QuantizeDynamic(), QuantizeWeights(grid="int8")])
def test_sites_give_in_the_file_what_they_give_in_torch(clamped: nn.Module, quantize: Any, tmp_path: Path) -> None:
    run, before, path = _run(clamped, (2, 3, 8, 8), quantize, tmp_path)
    batches = [before.flat_example]
    here = site_errors(before, run.program, batches)
    there = site_errors(before, run.program, batches, observer=OnnxObserver(path, run.program))
    assert {each.node for each in here} == {each.node for each in there} and len(here) > 0
    for each in there:
        # Packed products round their inputs to eight bits by themselves.
        packed = isinstance(quantize, QuantizeWeights) and each.kind == "linear"
        assert each.runtime is not None and not each.differs
        assert each.runtime.apart.ratio < (1e-4 if packed else 1e-6)
        rel = 10 if packed else 0.05
        assert each.runtime.local.ratio == pytest.approx(each.runtime.expected.ratio, rel=rel, abs=1e-9)


def test_a_clamp_that_the_runtime_fuses_is_where_its_convolution_shows(clamped: nn.Module, tmp_path: Path) -> None:
    run, before, path = _run(clamped, (2, 3, 8, 8), QuantizeStatic(), tmp_path)
    observer, seen = OnnxObserver(path, run.program), {}
    flat = before.flat_example
    exact: dict[str, Any] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            exact[node.name] = super().run_node(node)
            return exact[node.name]

    with torch.no_grad():
        Keep(before.graph_module).run(*flat)
    observer.local(flat, exact, ["conv2d"], lambda site, *shown: seen.update({site: shown}))
    where, value, rounds = seen["conv2d"]
    assert where == "relu" and rounds is not None
    # Codes of the runtime, and those of the exact value, are on one grid: their differences are whole steps.
    scale = float(run.program.weight("relu_scale"))
    steps = (value - rounds(exact["relu"])) / scale
    assert torch.allclose(steps, steps.round(), atol=1e-3) and float(steps.abs().max()) <= 2


@pytest.mark.parametrize("rows", [2, 5])
def test_another_size_of_an_open_axis_is_fed_as_well(clamped: nn.Module, rows: int, tmp_path: Path) -> None:
    shapes = {"x": {0: Dim("batch", min=2)}}
    run, before, path = _run(clamped, (3, 3, 8, 8), QuantizeStatic(), tmp_path, dynamic_shapes=shapes)
    observer = OnnxObserver(path, run.program)
    for count in (rows, rows + 1):
        found = site_errors(before, run.program, [[torch.randn(count, 3, 8, 8)]], observer=observer)
        assert found and not any(each.differs for each in found)


def test_what_is_not_in_the_file_is_left_out(clamped: nn.Module, tmp_path: Path) -> None:
    run, before, path = _run(clamped, (2, 3, 8, 8), QuantizeStatic(), tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = "renamed_" + node.name
    onnx.save(model, path)
    found = site_errors(before, run.program, [before.flat_example], observer=OnnxObserver(path, run.program))
    assert found and all(each.runtime is None for each in found)


def test_a_file_whose_bias_is_wrong_differs_there_alone(clamped: nn.Module, tmp_path: Path) -> None:
    run, before, path = _run(clamped, (2, 3, 8, 8), QuantizeStatic(), tmp_path)
    model = onnx.load(path)
    bias = next(each for each in model.graph.initializer if each.name == "second.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.int32(4000), bias.name))
    onnx.save(model, path)
    found = site_errors(before, run.program, [before.flat_example], observer=OnnxObserver(path, run.program))
    assert [each.node for each in found if each.differs] == ["conv2d_1"] and found[0].node == "conv2d_1"


def test_inputs_in_bfloat16_are_cast(tmp_path: Path) -> None:
    case = MODELS["mlp_bf16"]()
    passes = [Canonicalize(), RetypeFloats(), QuantizeDynamic()]
    run = graphopt.optimize(case.module, case.example_inputs, passes, calibration=case.calibration)
    run.export(tmp_path / "model.onnx", measure=False)
    before = next(each.given for each in run.trace if each.given is not None)
    observer = OnnxObserver(tmp_path / "model.onnx", run.program)
    found = site_errors(before, run.program, [before.flat_example], observer=observer)
    assert found and all(each.runtime is not None and not each.differs for each in found)
