"""Retyping: every floating type becomes another, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt import capture
from graphopt.ir import Program, dialect, operator, retype
from graphopt.ir.precision import Retyped, retype_tree, retype_value, retyped_arguments

WIDE = torch.float64


def captured(module: nn.Module, *args: Tensor) -> Program:
    return capture(module.eval(), args)


def wide_outputs(program: Program) -> list[Any]:
    twin = retype(program, WIDE)
    with torch.no_grad():
        return twin.run(twin.flat_example)


def assert_wide(program: Program, *expected: Tensor) -> None:
    """The outputs are float64, and right to float64's precision, not float32's."""
    outputs = wide_outputs(program)
    assert len(outputs) == len(expected)
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)


class Casts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        low = x.to(torch.bfloat16) * 3
        return low.float(), x.half().double(), x.type(torch.float16), torch.softmax(x, -1, dtype=torch.float16)


def test_casts_and_dtype_arguments() -> None:
    x = torch.randn(3, 4)
    wide = x.double()
    assert_wide(captured(Casts(), x), wide * 3, wide, wide, torch.softmax(wide, -1))


class Factories(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        made = torch.full((n,), 0.1) + torch.linspace(0, 1, n) + torch.arange(0.0, n) + torch.eye(n)[0]
        made = made + torch.scalar_tensor(0.1) + torch.ones(n, dtype=torch.bfloat16) + torch.zeros(n)
        return (
            made + x,
            torch.full_like(x, 0.1),
            x.new_full((2,), 0.1),
            torch.arange(n),
            torch.zeros(n, dtype=torch.int32),
        )


def test_factories() -> None:
    x = torch.randn(4)
    wide = x.double()
    made = torch.full((4,), 0.1, dtype=WIDE) + torch.linspace(0, 1, 4, dtype=WIDE) + torch.arange(4) + torch.eye(4)[0]
    tenth = torch.tensor(0.1, dtype=WIDE)
    assert_wide(
        captured(Factories(), x),
        made + 0.1 + 1 + wide,
        tenth.expand(4),
        tenth.expand(2),
        torch.arange(4),
        torch.zeros(4, dtype=torch.int32),
    )


class Masked(nn.Module):
    """The two usual ways to write an attention mask with finfo.min."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        lowest = torch.finfo(x.dtype).min
        added = torch.softmax(x + (1.0 - mask.to(x.dtype)) * lowest, -1)
        return added, torch.softmax(x.masked_fill(mask == 0, lowest), -1)


def test_masks_of_the_smallest_number() -> None:
    x, mask = torch.randn(2, 4), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]])
    wide = torch.softmax(x.double().masked_fill(mask == 0, float("-inf")), -1)
    assert_wide(captured(Masked(), x, mask), wide, wide)
    half = captured(Masked().half(), x.half(), mask)
    wide = torch.softmax(x.half().double().masked_fill(mask == 0, float("-inf")), -1)
    assert_wide(half, wide, wide)


class FromIntegers(nn.Module):
    """Operators that turn integers into torch's default type, which no argument and no input names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, i: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(4)
        values = self.linear(positions / 3) + self.linear(i * 0.1) + self.linear(i.sqrt()) + self.linear(torch.sin(i))
        values = values + self.linear(torch.where(i > 1, 0.25, 0.0)) + (i > 2) / 3
        return values, i // 2, torch.div(i, 3, rounding_mode="floor"), i / positions.clamp(min=1)


def test_integers_that_become_floats() -> None:
    module, i = FromIntegers(), torch.arange(4)
    program = captured(module, i)
    wide = FromIntegers().double()
    wide.load_state_dict(module.state_dict())
    before = torch.get_default_dtype()
    torch.set_default_dtype(WIDE)
    try:
        expected = wide(i)
    finally:
        torch.set_default_dtype(before)
    assert_wide(program, *expected)


def test_integer_operators_are_left_alone() -> None:
    class Integers(nn.Module):
        def forward(self, i: Tensor) -> tuple[Tensor, ...]:
            picked = torch.arange(9)[i]
            return picked + i, i == picked, i.to(torch.int32), torch.nn.functional.one_hot(i, 9), i.cumsum(0)

    program = captured(Integers(), torch.tensor([1, 4, 2]))
    assert str(retype(program, WIDE)) == str(program)


class Rotation(nn.Module):
    """Rotary position embedding by complex multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(4, 2), torch.arange(8.0).reshape(4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(4, 2, 2))
        return torch.view_as_real(pairs * self.turn).flatten(1)


def test_complex_weights() -> None:
    x = torch.randn(4, 4)
    module = Rotation()
    expected = torch.view_as_real(torch.view_as_complex(x.double().reshape(4, 2, 2)) * module.turn.to(torch.complex128))
    assert_wide(captured(module, x), expected.flatten(1))


def test_quantized_programs_keep_their_codes() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-128, 128, (3, 4), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(3))
            self.register_buffer("zero", torch.tensor(4, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            codes = dialect.quantize(x, self.scale[0], self.zero, 0, 0, "int8")
            x = dialect.dequantize(codes, self.scale[0], self.zero, None, 0, 0, "int8")
            return x @ dialect.dequantize(self.codes, self.scale, None, None, 0, 0, "int8").t()

    module, x = Quantized(), torch.randn(2, 4)
    program = captured(module, x)
    twin = retype(program, WIDE)
    assert twin.weight("codes").dtype == torch.int8
    assert twin.weight("scale").dtype == WIDE
    with torch.no_grad():
        (output,) = twin.run(twin.flat_example)
    torch.testing.assert_close(output, module(x).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp_bf16", "tied_language_model", "spelled_out", "two_inputs_dict"])
def test_models(name: str) -> None:
    """In float64 a model gives what it gives in its own type, as closely as that type can say."""
    model = MODELS[name]()
    program = capture(model.module, model.example_inputs)
    text = str(program)
    outputs = wide_outputs(program)
    tolerance = 0.1 if name == "mlp_bf16" else 1e-4
    for got, expected in zip(outputs, pytree.tree_leaves(model.run()), strict=True):
        assert got.dtype == (WIDE if expected.is_floating_point() else expected.dtype)
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=tolerance, atol=tolerance)
    assert str(program) == text


def test_weights_may_be_overridden_and_the_program_stays() -> None:
    module, x = nn.Linear(4, 3), torch.randn(2, 4)
    program = captured(module, x)
    exact = torch.randn(3, 4, dtype=WIDE)
    twin = retype(program, WIDE, {"weight": exact})
    assert torch.equal(twin.weight("weight"), exact)
    assert not twin.weight("weight").requires_grad
    assert program.weight("weight") is module.weight
    torch.testing.assert_close(twin(x.double()), x.double() @ exact.t() + module.bias.double())
    narrow = retype(twin, torch.bfloat16)
    assert narrow(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [False, True])
def test_running_retyped_equals_retyping(keep: bool) -> None:
    module, i = FromIntegers(), torch.arange(4)
    program = captured(module, i)
    exact = {"linear.weight": torch.randn(4, 4, dtype=WIDE)}
    for weights in (None, exact):
        twin = retype(program, WIDE, weights)
        with torch.no_grad():
            expected = twin.run([i])
        runner = Retyped(program, WIDE, weights, keep)
        for _ in range(2):
            assert all(map(torch.equal, runner.outputs([i]), expected))
    assert program.weight("linear.weight").dtype == torch.float32


def test_values_and_trees() -> None:
    ints = torch.arange(3)
    assert retype_value(ints, WIDE) is ints
    assert retype_value("text", WIDE) == "text"
    assert retype_value(torch.ones(1, dtype=torch.complex64), WIDE).dtype == torch.complex128
    tree = retype_tree({"a": (torch.ones(1), 3)}, torch.float16)
    assert tree["a"][0].dtype == torch.float16
    assert tree["a"][1] == 3


def test_retyped_arguments_of_one_call() -> None:
    program = captured(Casts(), torch.randn(3, 4))
    for node in program.graph.nodes:
        if operator(node) == "softmax":
            args, kwargs = retyped_arguments(node, torch.bfloat16)
            assert torch.bfloat16 in (*args, *kwargs.values())
            assert node.meta["val"].dtype == torch.float16  # the node itself is as it was
        if node.op == "call_function" and node.target is not torch.ops.aten.softmax.int:
            assert retyped_arguments(node, node.meta["val"].dtype)[0] == node.args
