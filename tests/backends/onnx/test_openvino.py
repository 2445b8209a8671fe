"""The second runtime loads, runs and times the files; what it cannot do is one sentence."""

from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import targets
import torch
from cli_models import static
from onnx import TensorProto, helper
from qdq_graphs import GraphBuilder

import graphopt
from graphopt.backends.onnx import openvino_runtime
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.backends.onnx.openvino_runtime import compare_with_openvino
from graphopt.cli import bench, main
from graphopt.errors import GraphoptError

installed = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO, an optional extra, is not installed"
)


def _inputs(path: Path) -> list[str]:
    return [value.name for value in onnx.load(path).graph.input]


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    module, inputs = static()
    torch.manual_seed(0)
    result = graphopt.optimize(
        module, inputs, recipe="int8_static", calibration=[inputs] * 2, target="onnxruntime-avx2"
    )
    result.export(tmp_path / "m.onnx", measure=False)
    return tmp_path / "m.onnx"


@installed
def test_both_runtimes_agree_within_steps(quantized: Path) -> None:
    _, inputs = static()
    name = _inputs(quantized)[0]
    found = compare_with_openvino(quantized, {name: inputs[0].numpy()})
    assert found.latency_ms > 0 and found.onnxruntime_ms > 0
    assert found.max_steps <= 3 and found.sqnr_db > 25
    assert found.version[0].isdigit() and found.output


@installed
def test_a_difference_is_told_in_steps(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = static()
    real = openvino_runtime.run_onnx

    def shifted(*arguments: Any, **options: Any) -> Any:
        return {name: value + 1.0 for name, value in real(*arguments, **options).items()}

    monkeypatch.setattr(openvino_runtime, "run_onnx", shifted)
    found = compare_with_openvino(quantized, {_inputs(quantized)[0]: inputs[0].numpy()})
    assert found.max_steps > 5


@installed
def test_the_command_shows_both(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(quantized), "--runtime", "openvino"]) == 0
    shown = capsys.readouterr().out
    assert "other runtime" in shown and "openvino 2" in shown and "steps" in shown
    assert main(["bench", str(quantized), "--runtime", "tensorflow"]) == 2
    assert "there are onnxruntime and openvino" in capsys.readouterr().err


def test_onnxruntime_always_runs(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(quantized), "--runtime", "onnxruntime"]) == 0
    assert "other runtime" not in capsys.readouterr().out


@pytest.mark.parametrize("named", ["openvino", "tensorflow"])
def test_a_runtime_that_is_not_there_is_told_before_anything_is_timed(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    def timed(*arguments: Any) -> Any:
        raise AssertionError("timed first")

    monkeypatch.setattr(openvino_runtime.importlib, "import_module", absent)  # type: ignore[attr-defined]
    monkeypatch.setattr(OnnxBackend, "measure", timed)
    (tmp_path / "m.onnx").touch()
    assert main(["bench", str(tmp_path / "m.onnx"), "--runtime", named]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_backend_with_one_runtime_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        name, file = "other", "model.onnx"

    monkeypatch.setattr(bench, "backend_by_name", lambda name: Other())
    (tmp_path / "m.onnx").touch()
    with pytest.raises(GraphoptError, match="the backend 'other' has one runtime only; leave out --runtime"):
        bench.bench_text(tmp_path / "m.onnx", None, "other", 1, ["openvino"])


@installed
def test_scalars_and_integer_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Cast", ["y"], ["z"], to=TensorProto.INT32)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xy")
    z = helper.make_tensor_value_info("z", TensorProto.INT32, [])
    graph = helper.make_graph(nodes, "scalars", [x], [y, z])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    feeds = {"x": np.array(3.0, np.float32)}
    assert compare_with_openvino(tmp_path / "m.onnx", feeds).max_steps == 0
    real = openvino_runtime.run_onnx

    def other_integer(*arguments: Any, **options: Any) -> Any:
        return {name: value + (name == "z") for name, value in real(*arguments, **options).items()}

    monkeypatch.setattr(openvino_runtime, "run_onnx", other_integer)
    found = compare_with_openvino(tmp_path / "m.onnx", feeds)
    assert found.output == "z" and found.max_steps == np.inf


@installed
def test_what_openvino_does_not_take_is_one_sentence(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.input("x", [2, 4])
    g.output(g.node("QGemm", [x], name="odd", domain="nowhere"))
    path = g.save(tmp_path / "odd.onnx")
    with pytest.raises(GraphoptError, match=r"OpenVINO does not load .*odd\.onnx") as caught:
        compare_with_openvino(path, {"x": np.zeros((2, 4), np.float32)})
    assert "\n" not in str(caught.value)


def test_without_openvino_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "openvino":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(
        openvino_runtime.importlib, "import_module", lambda name: without(name)  # type: ignore[attr-defined]
    )
    with pytest.raises(GraphoptError, match=r"pip install 'graphopt\[openvino\]'"):
        compare_with_openvino(tmp_path / "m.onnx", {})


def test_profiles_of_the_targets() -> None:
    from graphopt.pipeline import target

    assert target("onnxruntime-avx2").saturates_pairs and not target("onnxruntime-avx2").measurable
    assert not target("onnxruntime-arm64").saturates_pairs
    assert not targets.EXACT.saturates_pairs
