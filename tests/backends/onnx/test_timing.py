"""Timing files on made-up inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt.backends.onnx.timing import made_up_feeds, measure
from graphopt.errors import GraphoptError

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def lookup(path: Path, length: int | str = "tokens") -> Path:
    """A file that gathers rows of a table of two, ids [1, length] -> [1, length, 4]; an index of 2 would fail."""
    table = helper.make_tensor("table", FLOAT, [2, 4], list(range(8)))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "take"),
        helper.make_node("Relu", ["rows"], ["y"], "clip"),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("ids", INT64, [1, length])],
        [helper.make_tensor_value_info("y", FLOAT, [1, length, 4])],
        [table],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_times_and_nodes(tmp_path: Path) -> None:
    timings = measure({"a": lookup(tmp_path / "a.onnx"), "b": lookup(tmp_path / "b.onnx")}, threads=1)
    assert list(timings) == ["a", "b"]
    for each in timings.values():
        assert 0 < each.minimum_ms <= each.latency_ms
        assert each.runs > 10
        assert {operator for _, operator, _ in each.nodes} == {"Gather", "Relu"}
        assert [time for _, _, time in each.nodes] == sorted((time for _, _, time in each.nodes), reverse=True)
        assert each.inputs == ["ids: int64[1, 1]"]


def test_files_of_other_inputs_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="take different inputs"):
        measure({"a": lookup(tmp_path / "a.onnx"), "b": lookup(tmp_path / "b.onnx", 7)}, threads=1)


def test_feeds_are_seeded_and_of_the_declared_types() -> None:
    declared = {
        "x": ("tensor(float)", ("batch", 3)),
        "half": ("tensor(float16)", (2,)),
        "mask": ("tensor(bool)", (None, 2)),
        "scalar": ("tensor(double)", ()),
        "ids": ("tensor(int32)", (4,)),
    }
    feeds, again = made_up_feeds(declared), made_up_feeds(declared)
    assert {name: (str(each.dtype), each.shape) for name, each in feeds.items()} == {
        "x": ("float32", (1, 3)),
        "half": ("float16", (2,)),
        "mask": ("bool", (1, 2)),
        "scalar": ("float64", ()),
        "ids": ("int32", (4,)),
    }
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)
    assert feeds["mask"].all()
    assert (feeds["ids"] == 1).all()


@pytest.mark.parametrize("kind", ["tensor(string)", "tensor(bfloat16)", "seq(tensor(float))"])
def test_types_that_cannot_be_made_up(kind: str) -> None:
    with pytest.raises(GraphoptError, match="cannot be made up"):
        made_up_feeds({"x": (kind, (1,))})
