"""The `graphopt::` operators against a reference in numpy, against ONNX Runtime, and against torch's own rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from graphopt.errors import GraphoptError
from graphopt.ir import dialect
from graphopt.quantization.grids import IntegerGrid, grid, register_grid

GRIDS = [f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")]


# A second implementation, in numpy and without the first one's code -------------------------------------------


def bounds(format: str) -> tuple[int, int]:
    bits = int(format.rpartition("int")[2])
    return (0, 2**bits - 1) if format.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def wide(parameter: NDArray, shape: tuple[int, ...], axis: int, group_size: int) -> NDArray:
    """Give every element its own scale or zero point."""
    out = np.empty(shape, parameter.dtype)
    for place in np.ndindex(*shape):
        if group_size == 0:
            out[place] = parameter if parameter.ndim == 0 else parameter[place[axis]]
        else:
            index = list(place)
            index[axis] = 0 if group_size < 0 else place[axis] // group_size
            out[place] = parameter[tuple(i if size > 1 else 0 for i, size in zip(index, parameter.shape, strict=True))]
    return out


def reference_quantize(x, scale, zero, axis, group_size, format):
    low, high = bounds(format)
    compute = np.float64 if format == "int32" else np.float32
    steps = np.rint(x.astype(compute) / wide(scale, x.shape, axis, group_size).astype(compute))
    return np.clip(steps + wide(zero, x.shape, axis, group_size).astype(np.float64), low, high).astype(np.int64)


def reference_dequantize(codes, scale, zero, axis, group_size):
    steps = codes.astype(np.int64) - wide(zero, codes.shape, axis, group_size).astype(np.int64)
    return steps.astype(np.float32) * wide(scale, codes.shape, axis, group_size).astype(np.float32)


def reference_range(x, axis, group_size, format):
    """Scale and zero point of each block, one block after the other."""
    low, high = bounds(format)
    if group_size == 0:
        blocks, shape = {(): x}, ()
    else:
        size = x.shape[axis] if group_size < 0 else group_size
        shape = tuple(-(-n // size) if d == axis % x.ndim else n for d, n in enumerate(x.shape))
        blocks = {}
        for place in np.ndindex(*shape):
            index = list(place)
            index[axis] = slice(place[axis] * size, (place[axis] + 1) * size)
            blocks[place] = x[tuple(index)]
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.int64)
    for place, block in blocks.items():
        least, most = np.float32(min(block.min(), 0)), np.float32(max(block.max(), 0))
        step = np.float32(1) if least == most else np.float32(most - least) / np.float32(high - low)
        scale[place], zero[place] = step, np.clip(np.rint(np.float32(low) - least / step), low, high)
    return scale, zero


# Cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    format: str
    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    axis: int
    group_size: int

    @property
    def parameters(self) -> tuple[object, ...]:
        return self.scale, self.zero_point, self.axis, self.group_size, self.format

    @property
    def arrays(self) -> tuple[NDArray, NDArray]:
        zero = torch.zeros_like(self.scale, dtype=torch.int64) if self.zero_point is None else self.zero_point
        return self.scale.numpy(), zero.numpy()


@st.composite
def cases(draw, formats=(*GRIDS, "int32")) -> Case:
    format = draw(st.sampled_from(formats))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    group_size = draw(st.sampled_from([0, 0, -1, 1, 2, 3, 5]))
    parameter_shape: list[int] = []
    if group_size:
        parameter_shape = list(shape)
        parameter_shape[axis] = 1 if group_size < 0 else -(-shape[axis] // group_size)
    elif draw(st.booleans()):
        parameter_shape = [shape[axis]]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = bounds(format)
    # Powers of two make x / scale exact, so that the halves below are true ties.
    scale = (2.0 ** random.integers(-6, 3, parameter_shape)).astype(np.float32)
    if draw(st.booleans()):
        scale = (scale * random.uniform(0.5, 1.5, parameter_shape)).astype(np.float32)
    zero = None
    if draw(st.booleans()):
        zero = torch.tensor(random.integers(low, high + 1, parameter_shape), dtype=grid(format).storage)
    width = min(high - low, 600)
    steps = random.integers(-width, width + 1, shape) + random.choice([0.0, 0.5, 0.25], shape)
    x = steps.astype(np.float32) * wide(np.asarray(scale), shape, axis, group_size)
    return Case(format, torch.tensor(x), torch.tensor(scale), zero, axis, group_size)


# Values -------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(cases())
def test_quantize_and_dequantize_equal_the_reference(case: Case) -> None:
    codes = dialect.quantize(case.x, *case.parameters)
    assert codes.dtype == grid(case.format).storage
    expected = reference_quantize(case.x.numpy(), *case.arrays, case.axis, case.group_size, case.format)
    np.testing.assert_array_equal(codes.numpy(), expected)

    values = dialect.dequantize(codes, case.scale, case.zero_point, None, case.axis, case.group_size, case.format)
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(
        values.numpy(), reference_dequantize(expected, *case.arrays, case.axis, case.group_size)
    )
    torch.testing.assert_close(dialect.fake_quantize(case.x, *case.parameters), values, rtol=0, atol=0)


@settings(max_examples=150)
@given(cases(formats=GRIDS))
def test_dynamic_scale_equals_the_reference(case: Case) -> None:
    scale, zero = dialect.dynamic_scale(case.x, case.axis, case.group_size, case.format)
    expected_scale, expected_zero = reference_range(case.x.numpy(), case.axis, case.group_size, case.format)
    assert zero.dtype == grid(case.format).storage
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero.numpy(), expected_zero)
    # What it gives is what the other operators take, and zero is a code.
    zeros = torch.zeros_like(case.x)
    assert torch.equal(dialect.fake_quantize(zeros, scale, zero, case.axis, case.group_size, case.format), zeros)


@settings(max_examples=100)
@given(cases(formats=GRIDS))
def test_quantized_values_are_within_half_a_step_and_stay(case: Case) -> None:
    scale, zero = dialect.dynamic_scale(case.x, case.axis, case.group_size, case.format)
    parameters = (scale, zero, case.axis, case.group_size, case.format)
    values = dialect.fake_quantize(case.x, *parameters)
    step = torch.tensor(wide(scale.numpy(), tuple(case.x.shape), case.axis, case.group_size))
    # The zero point is rounded too, which can cost the ends of the range another half step.
    assert bool(((values - case.x).abs() <= step * 1.0001).all())
    assert torch.equal(dialect.fake_quantize(values, *parameters), values)


def test_halves_go_to_the_even_code_and_ends_saturate() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30, -1e30, float("inf"), float("-inf")])
    codes = dialect.quantize(x, torch.tensor(1.0), None, 0, 0, "int4")
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 7, -8, 7, -8]
    # The zero point is added after rounding: 0.5 goes to 0 and then to the odd code 3.
    shifted = dialect.quantize(x[:6], torch.tensor(1.0), torch.tensor(3, dtype=torch.uint8), 0, 0, "uint4")
    assert shifted.tolist() == [1, 1, 3, 3, 5, 5]


def test_int32_holds_both_ends_and_every_code() -> None:
    x = torch.tensor([2.0**31, -(2.0**31), 16777217.0, 1e20], dtype=torch.float64)
    codes = dialect.quantize(x, torch.tensor(1.0), None, 0, 0, "int32")
    assert codes.tolist() == [2**31 - 1, -(2**31), 16777217, 2**31 - 1]
    ends = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    zero = torch.tensor([-5, 5], dtype=torch.int32)
    values = dialect.dequantize(ends, torch.ones(2, dtype=torch.float64), zero, None, 0, 0, "int32")
    assert values.tolist() == [2**31 + 4, -(2**31) - 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types(dtype: torch.dtype) -> None:
    x = torch.randn(64, 8).to(dtype)
    scale = (x.abs().amax(0) / 127).to(dtype)
    zero = torch.randint(-20, 20, (8,), dtype=torch.int8)
    codes = dialect.quantize(x, scale, zero, 1, 0, "int8")
    # A half-precision input rounds as its exact value in float32 does.
    compute = torch.promote_types(dtype, torch.float32)
    expected = dialect.quantize(x.to(compute), scale.to(compute), zero, 1, 0, "int8")
    assert torch.equal(codes, expected)
    values = dialect.dequantize(codes, scale, zero, None, 1, 0, "int8")
    steps = codes.to(compute) - zero.to(compute)
    assert torch.equal(values, (steps * scale.to(compute)).to(dtype))
    assert dialect.fake_quantize(x, scale, zero, 1, 0, "int8").dtype == dtype
    assert dialect.fake_quantize(x, scale.to(torch.float32), zero, 1, 0, "int8").dtype == dtype


def test_codes_too_large_for_half_precision() -> None:
    codes, scale = torch.tensor([100_000], dtype=torch.int32), torch.tensor(0.001, dtype=torch.float16)
    assert dialect.dequantize(codes, scale, None, None, 0, 0, "int32").item() == pytest.approx(100, rel=1e-3)


def test_half_precision_range_does_not_overflow() -> None:
    """65504 - (-65504) is infinite in float16; the scale is not."""
    x = torch.tensor([-65504.0, 65504.0], dtype=torch.float16)
    scale, zero = dialect.dynamic_scale(x, 0, 0, "int8")
    assert scale.dtype == torch.float16
    assert scale.item() == torch.tensor(2 * 65504 / 255).to(torch.float16).item()
    assert dialect.fake_quantize(x.float(), scale.float(), zero, 0, 0, "int8").isfinite().all()


def test_nan_gets_the_code_of_zero() -> None:
    x = torch.tensor([float("nan"), 1.0])
    zero = torch.tensor(7, dtype=torch.uint8)
    assert dialect.quantize(x, torch.tensor(1.0), zero, 0, 0, "uint8").tolist() == [7, 8]
    assert dialect.quantize(x, torch.tensor(1.0), None, 0, 0, "int8").tolist() == [0, 1]


def test_dynamic_scale_of_nan_is_nan_and_its_zero_point_a_code() -> None:
    scale, zero = dialect.dynamic_scale(torch.tensor([float("nan"), 1.0]), 0, 0, "uint4")
    assert bool(scale.isnan())
    assert zero.item() == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    scale, zero = dialect.dynamic_scale(x, -1, 0, "int8")
    assert (scale.item(), zero.item()) == (1.0, -128)  # as for zeros
    codes = dialect.quantize(x, scale, zero, -1, 0, "int8")
    assert codes.shape == x.shape
    assert dialect.dequantize(codes, scale, zero, None, -1, 0, "int8").shape == x.shape
    token_scale, token_zero = dialect.dynamic_scale(x, -1, -1, "int8")
    assert token_scale.shape == token_zero.shape == (*shape[:-1], 1)


def test_zeros_get_scale_one() -> None:
    scale, zero = dialect.dynamic_scale(torch.zeros(3, 4), 1, -1, "uint8")
    assert scale.tolist() == [[1.0]] * 3
    assert zero.tolist() == [[0]] * 3


def test_zero_dimensional_and_non_contiguous_values() -> None:
    assert dialect.quantize(torch.tensor(3.4), torch.tensor(0.5), None, 0, 0, "int8").item() == 7
    x = torch.randn(6, 4).t()
    scale = torch.rand(4) + 0.1
    codes = dialect.quantize(x, scale, None, 0, 0, "int8")
    assert torch.equal(codes, dialect.quantize(x.contiguous(), scale, None, 0, 0, "int8"))


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "zero_point", "axis", "group_size"),
    [
        (torch.ones(3), None, 0, 0),  # the axis has 4
        (torch.ones(6), None, -2, 0),
        (torch.ones(4, 1), None, 0, 0),
        (torch.ones(4, 2), None, 1, 2),  # three groups
        (torch.ones(4, 4), None, 1, 2),
        (torch.ones(4, 6), None, 1, -1),
        (torch.ones(1), None, 1, -1),
        (torch.ones(4), torch.zeros(1, dtype=torch.int8), 0, 0),
        (torch.tensor(1.0), torch.zeros(4, dtype=torch.int8), 0, 0),
    ],
)
def test_parameters_of_the_wrong_shape_are_refused(
    scale: Tensor, zero_point: Tensor | None, axis: int, group_size: int
) -> None:
    """Each of these would broadcast to something, and to nothing that anybody meant."""
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="has shape"):
        dialect.quantize(x, scale, zero_point, axis, group_size, "int8")
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [None if each is None else mode.from_tensor(each) for each in (x, scale, zero_point)]
        with pytest.raises(ValueError, match="has shape"):
            dialect.quantize(*fake, axis, group_size, "int8")


def test_unknown_grid_and_table_are_refused() -> None:
    with pytest.raises(GraphoptError, match="no grid called 'int88', did you mean 'int8'"):
        dialect.quantize(torch.ones(2), torch.tensor(1.0), None, 0, 0, "int88")
    with pytest.raises(GraphoptError, match="takes no table"):
        dialect.dequantize(torch.ones(2, dtype=torch.int8), torch.tensor(1.0), None, torch.ones(4), 0, 0, "int8")


def test_grids_have_the_bounds_and_storage_of_their_names() -> None:
    for name in (*GRIDS, "int32"):
        assert (grid(name).code_min, grid(name).code_max) == bounds(name)
        info = torch.iinfo(grid(name).storage)
        assert info.min <= grid(name).code_min
        assert info.max >= grid(name).code_max
    assert grid("int8").storage == torch.int8
    assert grid("uint3").storage == torch.uint8
    assert grid("int32").storage == torch.int32


def test_a_new_grid_needs_no_new_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.quantization.grids.base._GRIDS", {})
    register_grid(IntegerGrid(12, signed=False))
    codes = dialect.quantize(torch.tensor([5000.0, -1.0, 100.5]), torch.tensor(1.0), None, 0, 0, "uint12")
    assert codes.dtype == torch.uint16
    assert codes.to(torch.int64).tolist() == [4095, 0, 100]


# ONNX Runtime -------------------------------------------------------------------------------------------------

_ONNX = {
    np.float32: TensorProto.FLOAT,
    np.uint8: TensorProto.UINT8,
    np.int8: TensorProto.INT8,
    np.int32: TensorProto.INT32,
}


def run_onnx(operator: str, inputs: list[NDArray], outputs: list[type], **attributes: int) -> list[NDArray]:
    """Run one operator in ONNX Runtime; its inputs are graph inputs, so that nothing is folded."""
    names = [f"i{index}" for index in range(len(inputs))]
    results = [f"o{index}" for index in range(len(outputs))]
    graph = helper.make_graph(
        [helper.make_node(operator, names, results, **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, _ONNX[value.dtype.type], value.shape)
            for name, value in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info(name, _ONNX[kind], None) for name, kind in zip(results, outputs, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("format", ["uint8", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_quantize_and_dequantize_equal_onnx_runtime(format: str, granularity: str) -> None:
    storage = np.dtype(format).type
    low, high = bounds(format)
    x = torch.randn(5, 6, 8) * 3
    x[0, 0, :4] = torch.tensor([1e9, -1e9, 0.375, 0.125])
    shapes = {"tensor": [], "channel": [6], "group": [5, 6, 2]}
    axis, group_size = (2, 4) if granularity == "group" else (1, 0)
    attributes = {"axis": axis} | ({"block_size": 4} if group_size else {})
    scale = torch.rand(shapes[granularity]) * 0.05 + 0.001
    scale = torch.where(torch.rand(shapes[granularity]) < 0.3, torch.tensor(0.25), scale)
    zero = torch.randint(low, high + 1, shapes[granularity]).to(grid(format).storage)
    codes = dialect.quantize(x, scale, zero, axis, group_size, format)
    (expected,) = run_onnx("QuantizeLinear", [x.numpy(), scale.numpy(), zero.numpy()], [storage], **attributes)
    np.testing.assert_array_equal(codes.numpy(), expected)
    values = dialect.dequantize(codes, scale, zero, None, axis, group_size, format)
    (expected,) = run_onnx("DequantizeLinear", [codes.numpy(), scale.numpy(), zero.numpy()], [np.float32], **attributes)
    np.testing.assert_array_equal(values.numpy(), expected)


def test_int32_dequantize_equals_onnx_runtime() -> None:
    codes = torch.randint(-(2**31), 2**31, (6,)).to(torch.int32)
    scale = torch.rand(6) * 1e-4
    values = dialect.dequantize(codes, scale, None, None, 0, 0, "int32")
    (expected,) = run_onnx("DequantizeLinear", [codes.numpy(), scale.numpy()], [np.float32], axis=0)
    np.testing.assert_array_equal(values.numpy(), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(40, 9),
        lambda: torch.rand(7) + 3,
        lambda: -torch.rand(7) - 3,
        lambda: torch.zeros(4),
        lambda: torch.randn(33) * 1e-20,
        lambda: torch.ones(1),
    ],
    ids=["mixed", "positive", "negative", "zeros", "tiny", "one"],
)
def test_dynamic_quantization_equals_onnx_runtime(make: Callable[[], Tensor]) -> None:
    x = make()
    scale, zero = dialect.dynamic_scale(x, 0, 0, "uint8")
    codes = dialect.quantize(x, scale, zero, 0, 0, "uint8")
    expected = run_onnx("DynamicQuantizeLinear", [x.numpy()], [np.uint8, np.float32, np.uint8])
    np.testing.assert_array_equal(scale.numpy(), expected[1])
    np.testing.assert_array_equal(zero.numpy(), expected[2])
    np.testing.assert_array_equal(codes.numpy(), expected[0])


# torch's rules ------------------------------------------------------------------------------------------------


_RANDOM = torch.Generator().manual_seed(0)


def _zero(*shape: int) -> Tensor:
    return torch.randint(-9, 9, shape, dtype=torch.int8, generator=_RANDOM)


def _scale(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_RANDOM) + 0.1


_GRANULARITIES = {
    "tensor": (torch.tensor(0.1), _zero(), 0, 0),
    "channel": (_scale(6), _zero(6), 1, 0),
    "negative_axis": (_scale(6), _zero(6), -2, 0),
    "group": (_scale(4, 6, 3), _zero(4, 6, 3), -1, 2),
    "short_group": (_scale(4, 2, 5), _zero(4, 2, 5), 1, 4),
    "one_group": (_scale(4, 6, 1), _zero(4, 6, 1), 2, 32),
    "token": (_scale(4, 6, 1), _zero(4, 6, 1), -1, -1),
    "shared_token": (_scale(1, 6, 1), _zero(1, 6, 1), -1, -1),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("granularity", _GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_operators_obey_torch(granularity: str, symmetric: bool) -> None:
    """Schema, fake rule (shape, dtype, strides), autograd registration and tracing with dynamic shapes."""
    scale, zero, axis, group_size = _GRANULARITIES[granularity]
    zero = None if symmetric else zero
    x = torch.randn(4, 6, 5)
    where = (axis, group_size, "int8")
    learned = scale.clone().requires_grad_()
    codes = dialect.quantize(x, scale, zero, *where)
    torch.library.opcheck(dialect.quantize, (x, scale, zero, *where))
    torch.library.opcheck(dialect.dequantize, (codes, learned, zero, None, *where))
    torch.library.opcheck(dialect.fake_quantize, (x.clone().requires_grad_(), learned, zero, *where))
    if symmetric:
        torch.library.opcheck(dialect.dynamic_scale, (x, *where))


class Dialect(nn.Module):
    """Each operator once: a static pair, a dynamic pair by token, a weight in groups, a fake pair."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero", torch.tensor(3, dtype=torch.int8))
        self.register_buffer("codes", torch.randint(-8, 8, (4, 6), dtype=torch.int8))
        self.register_buffer("group_scale", torch.rand(4, 2) + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = dialect.dequantize(
            dialect.quantize(x, self.scale, self.zero, 0, 0, "int8"), self.scale, self.zero, None, 0, 0, "int8"
        )
        scale, zero = dialect.dynamic_scale(x, -1, -1, "uint8")
        x = dialect.dequantize(dialect.quantize(x, scale, zero, -1, -1, "uint8"), scale, zero, None, -1, -1, "uint8")
        x = x @ dialect.dequantize(self.codes, self.group_scale, None, None, 1, 4, "int4").t()
        return dialect.fake_quantize(x, self.scale, None, 0, 0, "int8")


def test_export_with_symbolic_shapes_and_decomposition() -> None:
    module, x = Dialect(), torch.randn(2, 3, 6)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    exported = torch.export.export(module, (x,), dynamic_shapes=shapes)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {
        f"graphopt.{name}.default" for name in ("quantize", "dequantize", "dynamic_scale", "fake_quantize")
    } <= targets
    plain = exported.run_decompositions(dialect.decomposition_table())
    assert not [node for node in plain.graph.nodes if "graphopt" in str(node.target)]
    for shape in ((2, 3, 6), (5, 7, 6)):
        other = torch.randn(shape)
        assert torch.equal(exported.module()(other), module(other))
        assert torch.equal(plain.module()(other), module(other))


@settings(max_examples=40)
@given(cases())
def test_decompositions_equal_the_operators(case: Case) -> None:
    table = dialect.decomposition_table()
    codes = dialect.quantize(case.x, *case.parameters)
    assert torch.equal(table[dialect.quantize](case.x, *case.parameters), codes)
    where = (case.axis, case.group_size, case.format)
    assert torch.equal(
        table[dialect.dequantize](codes, case.scale, case.zero_point, None, *where),
        dialect.dequantize(codes, case.scale, case.zero_point, None, *where),
    )
    assert torch.equal(
        table[dialect.fake_quantize](case.x, *case.parameters), dialect.fake_quantize(case.x, *case.parameters)
    )
    for ours, theirs in zip(
        table[dialect.dynamic_scale](case.x, *where), dialect.dynamic_scale(case.x, *where), strict=True
    ):
        assert torch.equal(ours, theirs)


# Gradients ----------------------------------------------------------------------------------------------------


def test_gradient_passes_inside_the_range_only() -> None:
    x = torch.tensor([-200.0, -128.0, -127.6, 0.3, 126.6, 127.0, 200.0, float("nan")], requires_grad=True)
    dialect.fake_quantize(x, torch.tensor(1.0), None, 0, 0, "int8").backward(torch.full((8,), 3.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 3, 3, 3, 3, 3, 0, 0]


def test_zero_point_moves_the_range() -> None:
    x = torch.tensor([-4.0, -3.0, 12.0, 13.0], requires_grad=True)
    dialect.fake_quantize(x, torch.tensor(1.0), torch.tensor(3, dtype=torch.uint8), 0, 0, "uint4").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("granularity", _GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_scale_gradient_of_dequantize_equals_finite_differences(granularity: str, symmetric: bool) -> None:
    scale, zero, axis, group_size = _GRANULARITIES[granularity]
    codes = torch.randint(-128, 128, (4, 6, 5), dtype=torch.int8)
    scale = scale.to(torch.float64).requires_grad_()
    zero = None if symmetric else zero

    def values(scale: Tensor) -> Tensor:
        return dialect.dequantize(codes, scale, zero, None, axis, group_size, "int8")

    assert torch.autograd.gradcheck(values, (scale,))


@pytest.mark.parametrize("granularity", _GRANULARITIES)
def test_scale_gradient_of_fake_quantize(granularity: str) -> None:
    """Where x is clipped it is the exact derivative of the output; inside, that plus the straight-through of x."""
    scale, zero, axis, group_size = _GRANULARITIES[granularity]
    scale = scale.to(torch.float64).requires_grad_()
    wide_scale = torch.tensor(wide(scale.detach().numpy(), (4, 6, 5), axis, group_size))
    x = torch.randn(4, 6, 5, dtype=torch.float64) * 100 * wide_scale
    weight = torch.randn_like(x)
    (dialect.fake_quantize(x, scale, zero, axis, group_size, "int8") * weight).sum().backward()
    codes = dialect.quantize(x, scale.detach(), zero, axis, group_size, "int8")
    exact = scale.detach().clone().requires_grad_()
    wide_zero = torch.tensor(wide(zero.numpy(), tuple(x.shape), axis, group_size)).to(torch.float64)
    clipped = (x / wide_scale + wide_zero < -128) | (x / wide_scale + wide_zero > 127)
    assert bool(clipped.any())
    assert not bool(clipped.all())
    (dialect.dequantize(codes, exact, zero, None, axis, group_size, "int8") * weight).sum().backward()
    straight = torch.where(clipped, torch.zeros_like(x), -weight * x / wide_scale)
    total = {True: straight.sum()}.get(scale.dim() == 0)
    if total is None:
        probe = scale.detach().clone().requires_grad_()
        (dialect.spread(probe, x, axis, group_size).expand_as(x) * straight).sum().backward()
        total = probe.grad
    torch.testing.assert_close(scale.grad, exact.grad + total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(256) * 3).to(dtype)
    half = torch.tensor(0.05, dtype=dtype, requires_grad=True)
    single = half.detach().float().requires_grad_()
    dialect.fake_quantize(x, half, None, 0, 0, "int8").sum().backward()
    dialect.fake_quantize(x.float(), single, None, 0, 0, "int8").sum().backward()
    assert half.grad is not None
    assert single.grad is not None
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, single.grad.to(dtype))


def test_codes_and_dynamic_ranges_are_constants_to_the_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    scale, zero = dialect.dynamic_scale(x, -1, -1, "int8")
    codes = dialect.quantize(x, scale, zero, -1, -1, "int8")
    assert not scale.requires_grad
    assert not zero.requires_grad
    assert not codes.requires_grad
