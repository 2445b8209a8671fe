"""Lowering: opsets, weight formats, pools, and what ONNX cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnx import packing
from graphopt.backends.onnx.backend import OnnxBackend, feeds_of
from graphopt.backends.onnx.compare import run_onnx, sqnr_db
from graphopt.backends.onnx.fusion import check_fusion
from graphopt.backends.onnx.lowering import lower
from graphopt.errors import GraphoptError
from graphopt.ir import dialect
from graphopt.quantization.grids import grid

# The runtime's kernel for weights of few bits computes with inputs of eight.
NBITS_SQNR_DB = 40
EXACT_SQNR_DB = 110


class QuantizedLinear(nn.Module):
    """A linear (or convolution) over codes of `format`: x [..., 64] -> [..., 32].

    `group` 0: a scale per output channel; else blocks along the input. `along_inputs`: a scale per input channel.
    `activation`: "float", "static" or "dynamic" uint8.
    """

    def __init__(
        self,
        format: str,
        group: int = 0,
        bias: bool = True,
        activation: str = "float",
        along_inputs: bool = False,
        convolution: bool = False,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.format, self.group, self.activation, self.convolution = format, group, activation, convolution
        self.axis = int(along_inputs or group > 0)
        target, generator = grid(format), torch.Generator().manual_seed(0)
        low, high = target.code_min, target.code_max + 1
        codes = torch.randint(low, high, (32, 64, 3) if convolution else (32, 64), generator=generator)
        sizes = (32, -(-64 // group)) if group else ((32, 64)[self.axis],)
        zero = torch.zeros(sizes) if symmetric else torch.randint(low, high, sizes, generator=generator)
        self.register_buffer("codes", codes.to(target.storage))
        self.register_buffer("scale", 0.01 + 0.1 * torch.rand(sizes, generator=generator))
        self.register_buffer("zero", zero.to(target.storage))
        self.bias = nn.Parameter(torch.randn(32, generator=generator)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = dialect.dequantize(self.codes, self.scale, self.zero, None, self.axis, self.group, self.format)
        if self.activation != "float":
            scale, zero = torch.tensor(0.05), torch.tensor(128, dtype=torch.uint8)
            if self.activation == "dynamic":
                scale, zero = dialect.dynamic_scale(x, 0, 0, "uint8")
            codes = dialect.quantize(x, scale, zero, 0, 0, "uint8")
            x = dialect.dequantize(codes, scale, zero, None, 0, 0, "uint8")
        if self.convolution:
            return nn.functional.conv1d(x, weight, self.bias)
        return nn.functional.linear(x, weight, self.bias)


def exported(model: nn.Module, shape: tuple[int, ...], path: Path) -> tuple[onnx.ModelProto, float, float]:
    """Export; return the file, and the SQNR in dB against the emulation as written and as the runtime optimizes it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    program = graphopt.capture(model, (x,))
    OnnxBackend().lower(program, path)
    with torch.no_grad():
        emulated = program.run([x])[0].numpy()
    found = [next(iter(run_onnx(path, feeds_of(program), plain).values())) for plain in (True, False)]
    return onnx.load(path), sqnr_db(emulated, found[0]), sqnr_db(emulated, found[1])


def code_types(model: onnx.ModelProto) -> set[int]:
    zero_points = {node.input[2] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {each.data_type for each in model.graph.initializer if each.name == "codes" or each.name in zero_points}


SLOW = pytest.mark.slow  # not by itself, but there are many; the others cover the code
FORMATS = [
    ("int2", 16, TensorProto.INT2 if packing.two_bits_known() else TensorProto.INT4),
    pytest.param("uint2", 0, TensorProto.UINT2 if packing.two_bits_known() else TensorProto.UINT4, marks=SLOW),
    ("int3", 16, TensorProto.INT4),
    pytest.param("uint3", 0, TensorProto.UINT4, marks=SLOW),
    ("int4", 16, TensorProto.INT4),
    ("uint4", 32, TensorProto.UINT4),
    pytest.param("uint6", 16, TensorProto.UINT8, marks=SLOW),
    pytest.param("int7", 16, TensorProto.INT8, marks=SLOW),
    ("uint8", 32, TensorProto.UINT8),
]


@pytest.mark.parametrize(("format", "group", "stored"), FORMATS)
def test_weights_of_every_width(tmp_path: Path, format: str, group: int, stored: int) -> None:
    shape = (2, 3, 64) if format.startswith("u") else (5, 64)
    model, written, optimized = exported(QuantizedLinear(format, group), shape, tmp_path / "model.onnx")
    assert code_types(model) == {stored}
    assert written > EXACT_SQNR_DB and optimized > NBITS_SQNR_DB
    report = check_fusion(tmp_path / "model.onnx")
    assert report.fused == {"MatMulNBits": 1} and report.unfused == []
    (codes,) = [each for each in model.graph.initializer if each.name == "codes"]
    assert list(codes.dims) == [64, 32]
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8}.get(stored, 2)
    assert len(codes.raw_data) == 64 * 32 * bits // 8


class ShortBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(-8, 8, dtype=torch.int8).repeat(9).reshape(3, 48))
        self.register_buffer("scale", torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, dialect.dequantize(self.codes, self.scale, None, None, 1, 32, "int4"))


def test_the_last_block_may_be_short(tmp_path: Path) -> None:
    _, written, optimized = exported(ShortBlock(), (2, 48), tmp_path / "model.onnx")
    assert written > EXACT_SQNR_DB and optimized > NBITS_SQNR_DB


def test_a_convolution_takes_packed_weights(tmp_path: Path) -> None:
    model, written, optimized = exported(
        QuantizedLinear("int4", convolution=True), (2, 64, 8), tmp_path / "model.onnx"
    )
    assert code_types(model) == {TensorProto.INT4}
    assert written > EXACT_SQNR_DB and optimized > EXACT_SQNR_DB


@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_codes_for_an_integer_kernel_keep_their_byte(tmp_path: Path, activation: str) -> None:
    linear = QuantizedLinear("int4", activation=activation, symmetric=True)
    model, written, optimized = exported(linear, (2, 3, 64), tmp_path / "model.onnx")
    assert TensorProto.INT8 in {each.data_type for each in model.graph.initializer if each.name == "codes"}
    assert written > EXACT_SQNR_DB and optimized > EXACT_SQNR_DB
    fused = check_fusion(tmp_path / "model.onnx").fused
    assert fused == {"MatMulIntegerToFloat" if activation == "static" else "DynamicQuantizeMatMul": 1}


class SharedCodes(QuantizedLinear):
    """Reads its weight twice: with a quantized input, and with a float one."""

    def forward(self, x: Tensor) -> Tensor:
        weight = dialect.dequantize(self.codes, self.scale, self.zero, None, 0, 0, self.format)
        return super().forward(x) + nn.functional.linear(torch.sin(x), weight)


def test_shared_codes_have_one_type(tmp_path: Path) -> None:
    linear = SharedCodes("int4", activation="static", symmetric=True)
    model, written, _ = exported(linear, (2, 3, 64), tmp_path / "model.onnx")
    assert [each.data_type for each in model.graph.initializer if each.name == "codes"] == [TensorProto.INT8]
    assert written > EXACT_SQNR_DB


@pytest.mark.parametrize("activation", ["static", "dynamic"])
@pytest.mark.parametrize("where", [pytest.param({"group": 16}, marks=SLOW), {"along_inputs": True}])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_scales_that_an_integer_kernel_cannot_apply(
    tmp_path: Path, activation: str, where: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """The runtime would take them for scales of columns: fail, or compute something else."""
    linear = QuantizedLinear("int8", activation=activation, bias=False, symmetric=True, **where)
    _, written, optimized = exported(linear, shape, tmp_path / "model.onnx")
    assert written > EXACT_SQNR_DB and optimized > EXACT_SQNR_DB


def test_fake_quantize_becomes_a_pair(tmp_path: Path) -> None:
    class Fake(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dialect.fake_quantize(x, torch.tensor(0.05), torch.tensor(3, dtype=torch.int8), 0, 0, "int8") * 2

    model, written, _ = exported(Fake(), (4, 8), tmp_path / "model.onnx")
    assert [node.op_type for node in model.graph.node][:2] == ["QuantizeLinear", "DequantizeLinear"]
    assert written > EXACT_SQNR_DB


@pytest.mark.parametrize(("format", "group", "opset"), [("int8", 0, 20), ("int8", 16, 21), ("int4", 0, 21)])
def test_the_opset_is_what_is_needed(format: str, group: int, opset: int) -> None:
    program = graphopt.capture(QuantizedLinear(format, group), (torch.randn(2, 64),))
    assert lower(program).opset_imports[""] == opset


# --- pools


class Pools(nn.Module):
    def __init__(self, *sizes: Any) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        for size in self.sizes:
            x = nn.functional.adaptive_avg_pool2d(x, size)
        return x


@pytest.mark.parametrize(
    ("sizes", "shape", "types"),
    [
        ((1,), (2, 3, 4, 6), ["GlobalAveragePool"]),
        (((2, 2), 1), (2, 3, 4, 6), ["AveragePool", "GlobalAveragePool"]),
        ((1,), (3, 4, 6), ["ReduceMean"]),  # no batch: GlobalAveragePool would keep the rows
    ],
)
def test_pools(tmp_path: Path, sizes: tuple[Any, ...], shape: tuple[int, ...], types: list[str]) -> None:
    model, written, _ = exported(Pools(*sizes), shape, tmp_path / "model.onnx")
    assert [node.op_type for node in model.graph.node] == types
    assert written > EXACT_SQNR_DB


# --- what ONNX cannot say


class Quantizes(nn.Module):
    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.full((2, 1 if self.group < 0 else 2), 0.1)
        codes = dialect.quantize(x, scale, None, 1, self.group, "int8")
        return dialect.dequantize(codes, scale, None, None, 1, self.group, "int8")


class DynamicTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scale, zero = dialect.dynamic_scale(x, 1, -1, "uint8")
        return dialect.dequantize(dialect.quantize(x, scale, zero, 1, -1, "uint8"), scale, zero, None, 1, -1, "uint8")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Quantizes(-1), r"ONNX cannot quantize activations by token, as quantize \(.*lowering.py:\d+, in forward\)"),
        (Quantizes(4), r"ONNX cannot quantize activations by group, as quantize"),
        (DynamicTokens(), r"ONNX computes scales at run time per tensor in uint8 only, unlike dynamic_scale"),
    ],
)
def test_activations_by_token_or_group_are_refused(model: nn.Module, what: str) -> None:
    with pytest.raises(GraphoptError, match=what):
        lower(graphopt.capture(model, (torch.randn(2, 8),)))


@torch.library.custom_op("graphopt_tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return x.sin()


@unknown.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class CallsUnknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return unknown(y) + 1


class Eigenvalues(nn.Module):
    """The exporter meets what torch decomposes the operator into; the user wrote the operator."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


@pytest.mark.parametrize(
    ("model", "name"),
    [(CallsUnknown(), "graphopt_tests.unknown.default"), (Eigenvalues(), "aten.linalg_eigvalsh.default")],
)
def test_an_operator_without_an_onnx_form(tmp_path: Path, model: nn.Module, name: str) -> None:
    program = graphopt.capture(model, (torch.eye(4),))
    with pytest.raises(GraphoptError) as raised:
        OnnxBackend().lower(program, tmp_path / "model.onnx")
    text = str(raised.value)
    assert text.startswith(f"ONNX has no form for the operator {name} at ") and "\n" not in text
    assert "test_lowering.py:" in text and ", in forward; replace it" in text
    assert list(tmp_path.iterdir()) == []


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(-40, 40, dtype=torch.int8).reshape(10, 8))
        self.register_buffer("scale", torch.linspace(0.1, 1, 10)[:, None])
        self.register_buffer("zero", torch.arange(-5, 5, dtype=torch.int8)[:, None])

    def forward(self, rows: Tensor) -> Tensor:
        codes, scale, zero = (nn.functional.embedding(rows, each) for each in (self.codes, self.scale, self.zero))
        return dialect.dequantize(codes, scale, zero, None, -1, -1, "int8")


def test_rows_of_a_table_are_dequantized_where_they_are_read(tmp_path: Path) -> None:
    program = graphopt.capture(Table(), (torch.tensor([[1, 9], [3, 3]]),))
    path = tmp_path / "model.onnx"
    OnnxBackend().lower(program, path)
    written = next(iter(run_onnx(path, feeds_of(program)).values()))
    np.testing.assert_allclose(written, program.run(program.flat_example)[0], rtol=1e-6)
    assert {node.op_type for node in onnx.load(path).graph.node} == {"Gather", "Cast", "Sub", "Mul"}


@pytest.mark.slow  # a whole encoder and decoder
def test_reshapes_behind_a_decomposition_need_no_strides(tmp_path: Path) -> None:
    """The exporter decomposes some operators, and makes views of what is transposed, whose strides it does not know."""
    import zoo

    entry = zoo.MODELS["T5"]
    model, inputs = entry.build()
    result = graphopt.optimize(model, inputs, recipe="exact", dynamic_shapes=entry.dynamic_shapes)
    OnnxBackend().lower(result.program, tmp_path / "m.onnx")
    others = entry.second_inputs()
    made = OnnxBackend().run(tmp_path / "m.onnx", list(others.values()))
    exact = [value for value in torch.utils._pytree.tree_leaves(model(**others)) if isinstance(value, Tensor)]
    for value, wanted in zip(made, exact, strict=True):
        np.testing.assert_allclose(value, wanted.detach(), rtol=0, atol=1e-4 * float(wanted.detach().abs().max()))
