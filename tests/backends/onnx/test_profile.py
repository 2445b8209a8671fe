"""The profile finds the node that was made slow, and the explanation names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from qdq_graphs import GraphBuilder

from graphopt.backends.onnx.profile import (
    NodeTime,
    by_type,
    compare_profiles,
    explain_slowdown,
    profile_by_node,
)
from graphopt.errors import GraphoptError

FEEDS = {"x": np.ones((1, 192, 192), np.float32)}


def model(path: Path, quantized: bool) -> Path:
    """A large product and a cheap Tanh; quantized, with a pair around the Tanh that can only cost time."""
    g = GraphBuilder()
    x = g.input("x", [1, 192, 192])
    y = g.node("MatMul", [x, g.constant(np.ones((192, 192), np.float32))], name="product")
    y = g.node("Slice", [y, *(g.constant(np.array([each], np.int64)) for each in (0, 1, 1))], name="slice")
    g.output(g.node("Tanh", [g.qdq(y, "pair") if quantized else y], name="tanh"))
    return g.save(path)


def test_the_slowest_node_comes_first(tmp_path: Path) -> None:
    times = profile_by_node(model(tmp_path / "model.onnx", False), FEEDS, runs=10)
    assert [times[0].name, times[0].op_type] == ["product", "MatMul"]
    assert {each.op_type for each in times} == {"MatMul", "Slice", "Tanh"}
    assert [each.milliseconds for each in times] == sorted(
        (each.milliseconds for each in times), reverse=True
    )
    assert all(each.milliseconds > 0 for each in times)


def test_no_profile_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "model.onnx", False)
    monkeypatch.chdir(tmp_path)
    profile_by_node(path, FEEDS, runs=1)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_the_explanation_names_the_conversions(tmp_path: Path) -> None:
    lines = explain_slowdown(
        model(tmp_path / "a.onnx", False), model(tmp_path / "b.onnx", True), FEEDS, runs=5, top=9
    )
    assert lines[0].startswith("all nodes: ")
    assert lines[1].startswith("conversion between float and integer: ")
    assert lines[1].endswith("in 2 nodes")
    assert any(
        line.startswith("QuantizeLinear: ") and line.endswith("none in the baseline") for line in lines
    )
    assert any(line.startswith("node 'product' (MatMul)") for line in lines)


def test_the_lines_of_known_profiles() -> None:
    before = [NodeTime("fc", "Gemm", 2.0), NodeTime("act", "Tanh", 0.5)]
    after = [
        NodeTime("fc", "Gemm", 2.0),
        NodeTime("q", "QuantizeLinear", 1.0),
        NodeTime("d", "DequantizeLinear", 2.0),
    ]
    assert [(each.op_type, each.nodes) for each in by_type([*before, *before])] == [("Gemm", 2), ("Tanh", 2)]
    assert compare_profiles(before, after, top=2) == [
        "all nodes: 5.000 ms against 2.500 ms, 2.00x",
        "conversion between float and integer: 3.000 ms (60%) in 2 nodes",
        "DequantizeLinear: 2.000 ms in 1 nodes; none in the baseline",
        "Gemm: 2.000 ms in 1 nodes; 2.000 ms in 1 there",
        "node 'fc' (Gemm): 2.000 ms (40%)",
        "node 'd' (DequantizeLinear): 2.000 ms (40%)",
    ]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="at least one run"):
        profile_by_node(model(tmp_path / "model.onnx", False), FEEDS, runs=0)
    with pytest.raises(GraphoptError, match="is not given"):
        profile_by_node(tmp_path / "model.onnx", {})
