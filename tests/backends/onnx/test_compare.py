"""SQNR and steps at their edges, and running files as written or optimized."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from qdq_graphs import GraphBuilder

from graphopt.backends.onnx.compare import max_steps, output_scales, output_steps, run_onnx, sqnr_db
from graphopt.errors import GraphoptError


def test_sqnr_is_the_formula() -> None:
    assert sqnr_db([3.0, 4.0], [3.0, 4.5]) == pytest.approx(20.0)
    assert sqnr_db(np.float16([100.0]), np.float32([101.0])) == pytest.approx(40.0)


def test_sqnr_of_equal_tensors_is_infinite() -> None:
    assert sqnr_db([1.0, -2.0], [1.0, -2.0]) == math.inf
    assert sqnr_db([0.0, 0.0], [0.0, -0.0]) == math.inf
    assert sqnr_db([], []) == math.inf
    assert sqnr_db([math.nan, math.inf, 1.0], [math.nan, math.inf, 1.0]) == math.inf


def test_sqnr_against_a_zero_reference() -> None:
    assert sqnr_db([0.0, 0.0], [0.0, 1e-30]) == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sqnr_when_one_side_is_not_finite(bad: float) -> None:
    assert sqnr_db([1.0, 2.0], [1.0, bad]) == -math.inf
    assert sqnr_db([1.0, bad], [1.0, 2.0]) == -math.inf


def test_values_that_agree_on_not_being_finite_do_not_count() -> None:
    assert sqnr_db([math.nan, 3.0, 4.0], [math.nan, 3.0, 4.5]) == pytest.approx(20.0)
    assert sqnr_db([math.inf, 1.0], [-math.inf, 1.0]) == -math.inf


def test_sqnr_does_not_overflow() -> None:
    assert sqnr_db([3e300, 4e300], [3e300, 4.5e300]) == pytest.approx(20.0)
    assert sqnr_db([3e-300, 4e-300], [3e-300, 4.5e-300]) == pytest.approx(20.0)


def test_shapes_must_agree() -> None:
    for compare in (sqnr_db, lambda a, b: max_steps(a, b, 1.0)):
        with pytest.raises(GraphoptError, match=r"shapes \[2\] and \[1, 2\]"):
            compare([1.0, 2.0], [[1.0, 2.0]])


def test_steps_are_counted_in_scales() -> None:
    assert max_steps([0.0, 1.0, -1.0], [0.1, 1.0, -1.25], 0.05) == pytest.approx(5.0)
    assert max_steps([[1.0, 1.0]], [[1.1, 1.1]], [[0.1, 0.05]]) == pytest.approx(2.0)
    assert max_steps([1.0], [1.0], 0.1) == 0.0
    assert max_steps([], [], 0.1) == 0.0
    assert max_steps([math.nan], [math.nan], 0.1) == 0.0
    assert max_steps([math.nan], [1.0], 0.1) == math.inf


@pytest.mark.parametrize("scale", [0.0, -0.1, math.nan])
def test_a_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(GraphoptError, match="scales must be positive"):
        max_steps([1.0], [1.0], scale)


def test_steps_of_an_output_without_a_scale_are_those_of_its_range() -> None:
    values = np.array([-1.0, 4.1, np.inf], np.float32)
    assert output_steps(values, values + np.float32(0.02), None) == pytest.approx(1, rel=1e-4)
    assert output_steps(values, values + np.float32(0.02), 0.01) == pytest.approx(2, rel=1e-4)
    assert output_steps(np.full(2, 5.1), np.full(2, 5.14), None) == pytest.approx(2)  # constant: from zero to it
    assert output_steps(np.zeros(2), np.zeros(2), None) == 0
    assert output_steps(np.zeros(2), np.full(2, 1e-9), None) == np.inf
    assert output_steps(np.zeros(0), np.zeros(0), None) == 0


def test_output_scales_are_those_of_the_last_pair(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.qdq(g.input("x", [2, 4]), "x", scale=0.25)
    y = g.output(g.node("Reshape", [x, g.constant(np.array([8]))], name="y"))
    z = g.output(g.node("Tanh", [x], name="z"))
    assert z != y
    assert output_scales(g.save(tmp_path / "model.onnx")) == {y: 0.25}


def linear(path: Path) -> Path:
    g = GraphBuilder()
    x = g.qdq(g.input("x", [3, 16]), "x")
    y = g.node("Gemm", [x, g.weight((8, 16), "w"), g.bias(8, "b")], name="fc", transB=1)
    g.output(g.qdq(y, "y", scale=0.03))
    return g.save(path)


def test_optimized_and_written_graphs_agree_within_a_step(tmp_path: Path) -> None:
    path = linear(tmp_path / "model.onnx")
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)}
    fused, written = run_onnx(path, feeds), run_onnx(path, feeds, disable_optimizations=True)
    assert list(fused) == ["y.dq:0"]
    assert fused["y.dq:0"].shape == (3, 8)
    assert np.any(fused["y.dq:0"])
    assert max_steps(written["y.dq:0"], fused["y.dq:0"], output_scales(path)["y.dq:0"]) <= 1.001


def test_the_graph_is_run_as_written_when_optimizations_are_off(tmp_path: Path) -> None:
    """A bias scale that does not fit is honoured by the graph as written, and by no integer kernel."""
    g = GraphBuilder()
    x = g.qdq(g.input("x", [1, 16]), "x", scale=0.0004)
    codes, scale = g.constant(np.full(8, 1000, np.int32)), g.constant(np.full(8, 1e-3, np.float32))
    bias = g.node("DequantizeLinear", [codes, scale], axis=0)
    g.output(g.node("Gemm", [x, g.weight((8, 16), "w"), bias], name="fc", transB=1))
    path = g.save(tmp_path / "model.onnx")
    feeds = {"x": np.zeros((1, 16), np.float32)}
    written, fused = run_onnx(path, feeds, disable_optimizations=True), run_onnx(path, feeds)
    np.testing.assert_allclose(written["fc:0"], 1.0, atol=1e-6)
    assert sqnr_db(written["fc:0"], fused["fc:0"]) < 1.0


def test_bfloat16_goes_in_and_out_as_float32(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.node("Cast", [g.input("x", [2], TensorProto.BFLOAT16)], to=TensorProto.FLOAT)
    x = g.node("Add", [x, g.constant(np.float32(1))])
    g.output(g.node("Cast", [x], name="y", to=TensorProto.BFLOAT16), TensorProto.BFLOAT16)
    outputs = run_onnx(g.save(tmp_path / "model.onnx"), {"x": np.array([1.0, 2.5], np.float32)})
    assert outputs["y:0"].dtype == np.float32
    np.testing.assert_array_equal(outputs["y:0"], [2.0, 3.5])


def test_feeds_are_checked(tmp_path: Path) -> None:
    path = linear(tmp_path / "model.onnx")
    with pytest.raises(GraphoptError, match=r"input 'x' is not given; the inputs given are \['z'\]"):
        run_onnx(path, {"z": np.zeros(1, np.float32)})
    with pytest.raises(GraphoptError, match="cannot run"):
        run_onnx(path, {"x": np.zeros((3, 5), np.float32)})
    with pytest.raises(GraphoptError, match="there is no file"):
        run_onnx(tmp_path / "absent.onnx", {})
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(GraphoptError, match="does not load"):
        run_onnx(tmp_path / "text.onnx", {})
