"""Names and metadata in the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from models import Detection
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection

import graphopt
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.backends.onnx.lowering import lower
from graphopt.backends.onnx.naming import dimension_names
from graphopt.ir import Program, operator


class Returns(nn.Module):
    """Returns whatever `make(x, y, weight)` makes of its inputs."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.make = make

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.make(x, y, self.weight)


def _pair() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4), torch.randn(3, 4)


def _twice(x: Tensor, y: Tensor, w: Tensor) -> Any:
    total = x + y
    return total, total


OUTPUTS = {
    "single": (lambda x, y, w: x + y, ["output"]),
    "tuple": (lambda x, y, w: (x + y, x - y), ["output_0", "output_1"]),
    "one in a list": (lambda x, y, w: [x * y], ["output_0"]),
    "dict": (lambda x, y, w: {"b": x + y, "a": x * w}, ["b", "a"]),
    "nested": (lambda x, y, w: (x * w, {"k": [x + y]}), ["output_0", "output_1_k_0"]),
    "dataclass": (lambda x, y, w: Detection(x + y, (x * y, x * w)), ["logits", "maps.0", "maps.1"]),
    "the same twice": (_twice, ["output_0", "output_1"]),
    "an input": (lambda x, y, w: (x, x + y, y), ["output_0", "output_1", "output_2"]),
    "an input twice": (lambda x, y, w: (x, x), ["output_0", "output_1"]),
    "a weight": (lambda x, y, w: (x * w, w), ["output_0", "output_1"]),
    "called as an input": (lambda x, y, w: {"x": x + y, "y": y}, ["x_2", "y_2"]),
    "called as a weight": (lambda x, y, w: {"weight": x * w}, ["weight"]),
    "called as an operator": (lambda x, y, w: {"add": x * w + y, "mul": x + w}, ["add", "mul"]),
    "no tensors beside one": (lambda x, y, w: (x * w, 3, None), ["output_0"]),
}


# Each takes a second; those that the others cover run with the slow tests.
COVERED = {"tuple", "one in a list", "an input twice", "called as an operator", "nested"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in COVERED else ()) for c in OUTPUTS])
def test_outputs(tmp_path: Path, case: str) -> None:
    make, names = OUTPUTS[case]
    program = graphopt.capture(Returns(make), _pair())
    path = tmp_path / "model.onnx"
    OnnxBackend().lower(program, path)
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["x", "y"]
    assert [value.name for value in model.graph.output] == names
    onnx.checker.check_model(model, full_check=True)
    expected = [value for value in program.run(program.flat_example) if isinstance(value, Tensor)]
    for new, old in zip(OnnxBackend().run(path, program.flat_example), expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(new), old.detach())




class Inputs(nn.Module):
    """Has a weight called like an input, an input that nobody reads, a nested one, and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, unread: Tensor, pair: dict[str, Tensor], double: bool = True) -> Tensor:
        return (2 if double else 1) * x * self.x + pair["a"]


def test_inputs(tmp_path: Path) -> None:
    program = graphopt.capture(Inputs(), (torch.randn(4), torch.randn(2), {"a": torch.randn(4)}, True))
    path = tmp_path / "model.onnx"
    OnnxBackend().lower(program, path)
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["x", "unread", "pair.a"]
    assert "x_2" in [tensor.name for tensor in model.graph.initializer]
    report = OnnxBackend().export(program, path, program, measure=False)
    assert report.max_steps is not None and report.max_steps < 1e-3


# --- dimensions


def _sizes(model: ir.Model) -> list[list[int | str]]:
    def size(dim: Any) -> int | str:
        return dim if isinstance(dim, int) else str(dim.value)

    return [[size(dim) for dim in value.shape] for value in (*model.graph.inputs, *model.graph.outputs) if value.shape]


class Joined(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, y], 1), x.reshape(-1)


def _shapes(x: Any, y: Any) -> dict[str, dict[int, Any]]:
    return {"x": x, "y": y}


BATCH, LENGTH = Dim("batch"), Dim("length")
DIMENSIONS: dict[str, tuple[Any, dict[str, str]]] = {
    "by name": (_shapes({0: BATCH}, {0: BATCH, 1: LENGTH}), {"rows": "batch", "columns": "length"}),
    "by position": (({0: BATCH}, {0: BATCH, 1: LENGTH}), {"rows": "batch", "columns": "length"}),
    "as a list": (([BATCH, None], [BATCH, LENGTH]), {"rows": "batch", "columns": "length"}),
    "automatic": (({0: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.DYNAMIC}), {"rows": "x_dim_0", "columns": "y_dim_1"}),
    "mixed": (({0: Dim.AUTO}, {0: Dim.AUTO, 1: LENGTH}), {"rows": "x_dim_0", "columns": "length"}),
}


@pytest.mark.parametrize("case", DIMENSIONS)
def test_dimensions_are_called_as_the_user_does(case: str) -> None:
    shapes, names = DIMENSIONS[case]
    program = graphopt.capture(Joined(), (torch.randn(3, 4), torch.randn(3, 5)), dynamic_shapes=shapes)
    assert sorted(dimension_names(program).values()) == sorted(names.values())


def test_every_shape_of_the_file_has_the_users_names(tmp_path: Path) -> None:
    shapes, _ = DIMENSIONS["by name"]
    program = graphopt.capture(Joined(), (torch.randn(3, 4), torch.randn(3, 5)), dynamic_shapes=shapes)
    program.clone().save(tmp_path / "program.pt2")
    model = lower(Program.load(tmp_path / "program.pt2"))
    assert _sizes(model) == [["batch", 4], ["batch", "length"], ["batch", "length + 4"], ["4*batch"]]
    sizes = {str(size) for node in model.graph for value in node.outputs for size in value.shape or ()}
    assert not any(re.search(r"\bs\d+\b", size) for size in sizes)


def test_derived_dimensions_are_expressions() -> None:
    half = Dim("half")
    shapes = ({0: half}, {0: 2 * half})
    program = graphopt.capture(Sides(), (torch.randn(3, 4), torch.randn(6, 4)), dynamic_shapes=shapes)
    assert _sizes(lower(program)) == [["half", 4], ["2*half", 4], ["half", 4], ["2*half", 4]]


class Sides(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, y + 1


class Tree(nn.Module):
    def forward(self, tree: dict[str, list[Tensor]]) -> Tensor:
        return tree["a"][0] + tree["a"][1]


def test_dimensions_of_nested_inputs() -> None:
    inputs = ({"a": [torch.randn(3, 4), torch.randn(3, 4)]},)
    shapes = ({"a": [{0: BATCH}, {0: BATCH}]},)
    program = graphopt.capture(Tree(), inputs, dynamic_shapes=shapes)
    assert list(dimension_names(program).values()) == ["batch"]


def test_dimensions_of_a_shapes_collection() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    shapes[x] = (BATCH, 4)  # type: ignore[no-untyped-call]
    shapes[y] = (BATCH, 4)  # type: ignore[no-untyped-call]
    program = graphopt.capture(Sides(), (x, y), dynamic_shapes=shapes)
    assert list(dimension_names(program).values()) == ["batch"]


# --- metadata


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.second(torch.relu(self.first(x))), -1)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        query = self.block(x)[:, None]
        return nn.functional.scaled_dot_product_attention(query, query, query)


def _metadata(model: ir.Model) -> dict[str, dict[str, str]]:
    return {str(node.name): dict(node.metadata_props) for node in model.graph}


def test_nodes_tell_their_module_and_pass() -> None:
    calibration = [(torch.randn(2, 3, 4),) for _ in range(2)]
    result = graphopt.optimize(Outer(), (torch.randn(2, 3, 4),), recipe="int8_static", calibration=calibration)
    known = _metadata(lower(result.program))
    assert known["linear"]["module"] == "block.first" == known["linear/Gemm"]["module"]
    assert known["linear"]["pass"] == "quantize_static"
    assert known["relu"] == {"module": "block"} or known["relu"] == {"module": "block", "pass": "quantize_static"}
    assert known["linear_1"]["module"] == "block.second"
    quantizers = {node.name for node in result.program.graph.nodes if "quantize" in node.name}
    assert {name for name in known if "quantize" in name} <= quantizers


def test_parts_of_an_operator_carry_its_name() -> None:
    """The exporter numbers its nodes anew; ours keep the names that the trace shows."""
    program = graphopt.capture(Outer(), (torch.randn(2, 3, 4),))
    names = {node.name for node in program.graph.nodes}
    written = [str(node.name).partition("/")[0] for node in lower(program).graph]
    assert set(written) <= names
    assert written.count("scaled_dot_product_attention") > 3


class Chunks(nn.Module):
    def forward(self, x: Tensor) -> Any:
        values, places = x.max(-1)
        left, right = x.chunk(2, -1)
        return values, places, left * 2, right


def test_results_of_one_operator_are_told_apart() -> None:
    model = lower(graphopt.capture(Chunks(), (torch.randn(3, 4),)))
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == len(names)
    assert [value.name for value in model.graph.outputs] == ["output_0", "output_1", "output_2", "output_3"]


def test_scale_and_zero_point_of_a_dynamic_value_are_not_swapped() -> None:
    program = graphopt.optimize(nn.Linear(4, 4), (torch.randn(3, 4),), recipe="int8_dynamic").program
    known = {node.name: node for node in program.graph.nodes}
    (dynamic,) = [node for node in lower(program).graph if node.op_type == "DynamicQuantizeLinear"]
    codes, scale, zero = (known[str(value.name)] for value in dynamic.outputs)
    assert operator(codes) == "graphopt.quantize" and (scale.args[1], zero.args[1]) == (0, 1)


def test_no_trace_of_the_users_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    OnnxBackend().lower(graphopt.capture(Outer(), (torch.randn(2, 3, 4),)), path)
    data = path.read_bytes()
    assert not any(text in data for text in (b"graphopt:linear", b"File ", b".py", b"stack_trace", b"fx_node"))
    assert b"test_naming" not in data and str(Path.home()).encode() not in data
