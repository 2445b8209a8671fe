"""Every kind of model from PyTorch to ONNX Runtime: optimize, export, look at the file and at what the runtime does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import MODELS, TestModel
from onnx import TensorProto

import graphopt
from graphopt.backend import ExportReport
from graphopt.backends.onnx.backend import OnnxBackend
from graphopt.backends.onnx.compare import max_steps, output_scales, sqnr_db
from graphopt.backends.onnx.qdq_graph import DEQUANTIZE, QUANTIZE, QdqGraph
from graphopt.result import Result

# A kernel's rounding may differ from the emulation's by one code where a value lies between two (torch sums floats, the
# runtime integers and one float multiplication), and such a code may tip one more on its way to the output.
MAX_STEPS = 2.0

# Measured with these seeds, less 4 dB: a wrong scale, a wrong axis or a lost bias costs far more. The second output of
# `bert` is clipped: four calibration batches do not span what its class token takes.
SQNR_DB = {
    "residual_cnn": 40, "depthwise_cnn": 43, "vision_transformer": 36, "bert": 20, "masked_encoder": 36, "unet": 47,
    "two_inputs_dict": 30, "two_inputs_dataclass": 30, "shared_modules": 53, "tied_language_model": 33, "mlp_bf16": 37,
    "conv1d_net": 45, "nothing_quantizable": 100,
}  # fmt: skip

# Where int8 begins behind a float operator there is a Q left, at its border; these are the float operators allowed.
BORDERS = {
    "vision_transformer": {"LayerNormalization", "MatMul", "Gelu", "Gather", "Concat"},
    "bert": {"LayerNormalization", "MatMul", "Gelu", "Gather"},
    "masked_encoder": {"LayerNormalization", "Gelu", "Gather", "Tanh", "Where"},
    "unet": {"ConvTranspose"},
    "tied_language_model": {"Mul", "MatMul"},
    "mlp_bf16": {"LayerNormalization"},
}

FUSED = {
    "residual_cnn": {"QLinearConv": 9, "QLinearAdd": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "depthwise_cnn": {"QLinearConv": 10, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "vision_transformer": {"QLinearConv": 1, "QGemm": 9},
    "bert": {"QGemm": 13},
    "masked_encoder": {"QGemm": 10},
    "unet": {"QLinearConv": 11, "QLinearConcat": 2},
    "two_inputs_dict": {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 2},
    "two_inputs_dataclass": {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 2},
    "shared_modules": {"QLinearConv": 3, "QGemm": 2},
    "tied_language_model": {"MatMulIntegerToFloat": 4, "QGemm": 2},
    "mlp_bf16": {"QGemm": 3},
    "conv1d_net": {"QLinearConv": 2, "QLinearLeakyRelu": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "nothing_quantizable": {},
}
LINEARS = {
    "vision_transformer": 9, "bert": 13, "masked_encoder": 10, "tied_language_model": 6, "mlp_bf16": 3,
    "two_inputs_dataclass": 2, "residual_cnn": 1, "nothing_quantizable": 0,
}  # fmt: skip

SLOW = {("bert", "int8_static"), ("two_inputs_dict", "int8_static"), ("conv1d_net", "int8_static")}
SLOW |= {(name, "int8_dynamic") for name in LINEARS if name != "masked_encoder"}


def _cases(*pairs: tuple[str, str]) -> list[Any]:
    return [pytest.param(*pair, marks=pytest.mark.slow if pair in SLOW else ()) for pair in pairs]


STATIC = [(name, "int8_static") for name in SQNR_DB]
DYNAMIC = [(name, "int8_dynamic") for name in LINEARS]
RESIZABLE = ("residual_cnn", "depthwise_cnn", "vision_transformer", "bert", "masked_encoder")


@dataclass(frozen=True)
class Exported:
    model: TestModel
    result: Result
    report: ExportReport

    @property
    def graph(self) -> QdqGraph:
        model = onnx.load(self.report.path)
        return QdqGraph.of(model.graph, self.report.opset, self.report.path.parent)


Export = Callable[[str, str], Exported]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Optimize and export a model, once for all tests of this file."""
    made: dict[tuple[str, str], Exported] = {}

    def run(name: str, recipe: str) -> Exported:
        if (name, recipe) not in made:
            model = MODELS[name]()
            result = graphopt.optimize(
                model.module,
                model.example_inputs,
                recipe=recipe,
                calibration=model.calibration if recipe == "int8_static" else None,
                dynamic_shapes=model.dynamic_shapes,
            )
            path = tmp_path_factory.mktemp("export") / f"{name}.onnx"
            # Without the float model: writing its file as well would double the time of these tests.
            report = OnnxBackend().export(result.program, path, None, measure=False)
            assert result.original is not None
            flat = result.original.flat_example
            with torch.no_grad():
                floats = [value.float().numpy() for value in result.original.run(flat) if value.is_floating_point()]
            written = [value for value in OnnxBackend().run(path, flat) if np.issubdtype(value.dtype, np.floating)]
            report.sqnr_db = min(sqnr_db(old, new) for old, new in zip(floats, written, strict=True))
            made[name, recipe] = Exported(model, result, report)
        return made[name, recipe]

    return run


@pytest.mark.parametrize(("name", "recipe"), _cases(*STATIC, *DYNAMIC))
def test_the_runtime_computes_what_the_emulation_does(export: Export, name: str, recipe: str) -> None:
    report = export(name, recipe).report
    assert report.max_steps is not None and report.max_steps <= MAX_STEPS
    assert report.sqnr_db is not None and report.sqnr_db >= SQNR_DB[name]


@pytest.mark.parametrize(("name", "recipe"), _cases(*STATIC))
def test_static_models_run_on_integer_kernels(export: Export, name: str, recipe: str) -> None:
    report = export(name, recipe).report
    assert {kind: report.fused.get(kind, 0) for kind in FUSED[name]} == FUSED[name]
    types = {node.name: node.op_type for node in onnx.load(report.path).graph.node}
    floats = {
        _neighbour(reason) if types[node] in (QUANTIZE, DEQUANTIZE) else types[node] for node, reason in report.unfused
    }
    assert floats == BORDERS.get(name, set()), report.unfused


def _neighbour(reason: str) -> str:
    """The type of the float operator beside a Q or DQ, as its reason names it."""
    found = re.search(r"(?:producer|consumer) '[^']+' \((\w+)\)", reason)
    assert found is not None, reason
    return found[1]


@pytest.mark.parametrize(("name", "recipe"), _cases(*DYNAMIC))
def test_dynamic_models_run_every_linear_on_integer_kernels(export: Export, name: str, recipe: str) -> None:
    report = export(name, recipe).report
    integer = report.fused.get("DynamicQuantizeMatMul", 0) + report.fused.get("MatMulIntegerToFloat", 0)
    assert integer == LINEARS[name]
    assert report.unfused == []


@pytest.mark.parametrize(("name", "recipe"), _cases(*STATIC, *DYNAMIC))
def test_the_file_is_sound(export: Export, name: str, recipe: str) -> None:
    case = export(name, recipe)
    onnx.checker.check_model(str(case.report.path), full_check=True)
    graph = case.graph
    assert case.report.opset == 20
    for index, node in enumerate(graph.nodes):
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            assert len(node.input) == 3, f"{node.name} has no zero point"
        if node.op_type == QUANTIZE:
            assert graph.value(node.input[1]) is not None and graph.value(node.input[1]).size == 1, "scale per channel"
            source = graph.producer_of(node.input[0])
            assert source is None or source.op_type != DEQUANTIZE, f"{node.name} requantizes what {source.name} wrote"
        if node.op_type == DEQUANTIZE and graph.is_constant(node.input[0]):
            maker = graph.producer_of(node.input[0])  # a tied weight is turned when the file is loaded
            stored = node.input[0] if maker is None or maker.op_type != "Transpose" else maker.input[0]
            assert stored in graph.initializers, f"{node.name} reads a computed weight"
        if node.op_type in ("Conv", "Gemm") and recipe == "int8_static":
            _check_product(graph, index)


def _check_product(graph: QdqGraph, index: int) -> None:
    """A convolution or Gemm has an int8 weight, and an int32 bias on the grid of its accumulator."""
    node = graph.nodes[index]
    makers = [graph.producer_of(name) for name in node.input]
    if makers[0] is not None and makers[0].op_type == "Reshape":  # rows of more than two axes
        makers[0] = graph.producer_of(makers[0].input[0])
    assert all(maker is not None and maker.op_type == DEQUANTIZE for maker in makers), f"{node.name} reads floats"
    x, weight, *bias = (maker for maker in makers if maker is not None)
    assert graph.initializers[weight.input[0]].data_type == TensorProto.INT8
    for each in bias:
        assert graph.initializers[each.input[0]].data_type == TensorProto.INT32
        scale, x_scale, weight_scale = (graph.value(part.input[1]) for part in (each, x, weight))
        assert scale is not None and x_scale is not None and weight_scale is not None
        np.testing.assert_allclose(scale, x_scale * weight_scale, rtol=1e-6)


@pytest.mark.parametrize(("name", "recipe"), _cases(*STATIC, *DYNAMIC))
def test_the_file_tells_where_its_nodes_come_from(export: Export, name: str, recipe: str) -> None:
    case = export(name, recipe)
    text = case.report.path.read_bytes()
    assert str(Path(__file__).parents[3]).encode() not in text and b"site-packages" not in text and b".py" not in text
    model = onnx.load(case.report.path)
    keys = {entry.key for node in model.graph.node for entry in node.metadata_props}
    assert keys <= {"module", "pass", "from"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
    passes = {entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == "pass"}
    if LINEARS.get(name, 1):
        assert ("quantize_static" if recipe == "int8_static" else "quantize_dynamic") in passes
    modules = {path for path, _ in case.model.module.named_modules()}
    told = {entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == "module"}
    assert told <= modules, told - modules


def _rows(value: torch.Tensor, batch: int) -> torch.Tensor:
    return value[torch.arange(batch) % value.shape[0]]


@pytest.mark.parametrize(
    ("name", "recipe"), _cases(*(case for case in (*STATIC, *DYNAMIC) if case[0] in RESIZABLE))
)
def test_other_sizes_run(export: Export, name: str, recipe: str) -> None:
    case = export(name, recipe)
    program, path = case.result.program, case.report.path
    lengths = name in ("masked_encoder", "bert")
    for batch, length in [(1, 7), (5, 12), (3, 25)] if lengths else [(1, 0), (5, 0)]:
        flat = [_rows(value, batch) for value in program.flat_example]
        if lengths:
            flat = [value[:, torch.arange(length) % value.shape[1]] for value in flat]
        written = OnnxBackend().run(path, flat)
        with torch.no_grad():
            emulated = program.run(flat)
        scales = output_scales(path)
        for output, new, old in zip(onnx.load(path).graph.output, written, emulated, strict=True):
            scale = scales.get(output.name) or float(old.max() - old.min()) / 255
            assert max_steps(old.numpy(), new, scale) <= MAX_STEPS


def test_symbolic_dimensions_have_the_users_names(export: Export) -> None:
    model = onnx.load(export("masked_encoder", "int8_static").report.path)
    sizes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert sizes == [["batch", "length"], ["batch", "length"], ["batch", 3]]
    parameters = {
        dim.dim_param for value in model.graph.value_info for dim in value.type.tensor_type.shape.dim if dim.dim_param
    }
    assert not any(re.search(r"\bs\d+\b", parameter) for parameter in parameters)


def test_outputs_are_called_after_their_fields(export: Export) -> None:
    model = onnx.load(export("two_inputs_dataclass", "int8_static").report.path)
    assert [value.name for value in model.graph.input] == ["image", "context"]
    assert [value.name for value in model.graph.output] == ["logits", "maps.0", "maps.1"]


def test_a_tied_weight_is_stored_once(export: Export) -> None:
    case = export("tied_language_model", "int8_static")
    tables: list[Any] = [
        each for each in case.graph.initializers.values() if sorted(each.dims) == [32, 64] and "tokens" in each.name
    ]
    assert [(each.name, each.data_type) for each in tables] == [("tokens.weight", TensorProto.INT8)]
