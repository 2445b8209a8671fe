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
from qdq_graphs import GraphBuilder

import graphopt
from graphopt.backends.onnx import openvino_runtime
from graphopt.backends.onnx.openvino_runtime import compare_with_openvino
from graphopt.cli import main
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
    assert "the one beside ONNX Runtime is openvino" in capsys.readouterr().err


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
