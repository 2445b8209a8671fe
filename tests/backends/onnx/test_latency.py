"""The larger model is the slower one, in any order, and the time spent measuring is bounded."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from qdq_graphs import GraphBuilder

from graphopt.backends.onnx.latency import measure_latency
from graphopt.errors import GraphoptError

FEEDS = {"x": np.ones((64, 64), np.float32)}


def chain(path: Path, length: int) -> Path:
    g = GraphBuilder()
    x, w = g.input("x", [64, 64]), g.constant(np.eye(64, dtype=np.float32)[::-1].copy())
    for _ in range(length):
        x = g.node("Tanh", [g.node("MatMul", [x, w])])
    g.output(x)
    return g.save(path)


def test_the_longer_chain_is_slower(tmp_path: Path) -> None:
    models = {"long": chain(tmp_path / "long.onnx", 40), "short": chain(tmp_path / "short.onnx", 2)}
    found = measure_latency(models, FEEDS, min_seconds=0.2, rounds=4)
    assert list(found) == ["long", "short"]
    assert found["long"].median_ms > 4 * found["short"].median_ms
    for each in found.values():
        assert 0 < each.minimum_ms <= each.median_ms
        assert each.minimum_ms == min(each.samples_ms)
        assert each.median_ms == statistics.median(each.samples_ms)
        assert each.samples == len(each.samples_ms) >= 4


def test_a_file_against_itself_gives_one(tmp_path: Path) -> None:
    path = chain(tmp_path / "model.onnx", 10)
    found = measure_latency({"a": path, "b": path}, FEEDS, min_seconds=0.4, rounds=8)
    assert found["a"].minimum_ms == pytest.approx(found["b"].minimum_ms, rel=0.3)


def test_time_is_bounded(tmp_path: Path) -> None:
    models = {str(index): chain(tmp_path / f"{index}.onnx", 5) for index in range(3)}
    start = time.perf_counter()
    found = measure_latency(models, FEEDS, min_seconds=10.0, rounds=5, max_seconds=0.5)
    assert time.perf_counter() - start < 5.0
    assert all(each.samples >= 3 for each in found.values())


def test_models_may_take_fewer_inputs_than_are_given(tmp_path: Path) -> None:
    feeds = {**FEEDS, "unused": np.zeros(1, np.float32)}
    assert measure_latency({"a": chain(tmp_path / "a.onnx", 1)}, feeds, min_seconds=0.01, rounds=1)[
        "a"
    ].samples


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    path = chain(tmp_path / "model.onnx", 1)
    with pytest.raises(GraphoptError, match="must be positive"):
        measure_latency({"a": path}, FEEDS, rounds=0)
    with pytest.raises(GraphoptError, match="input 'x' is not given"):
        measure_latency({"a": path}, {})
    with pytest.raises(GraphoptError, match="cannot run"):
        measure_latency({"a": path}, {"x": np.ones((3, 3), np.float32)})
    with pytest.raises(GraphoptError, match="there is no file"):
        measure_latency({"a": tmp_path / "absent.onnx"}, FEEDS)
