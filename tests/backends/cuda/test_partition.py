"""Which regions a program falls into, why others are left, and that the program still means the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.backends.cuda.partition import partition
from graphopt.backends.cuda.plan import read_plan
from graphopt.ir import Changes, Program, operator, verify
from graphopt.passes import QuantizeActivations, QuantizeWeights, Rotate

_W4 = QuantizeWeights(grid="int4", group_size=32, objective="plain", rounding="nearest")
_W8 = QuantizeWeights(grid="int8", group_size=0, symmetric=True, objective="plain", rounding="nearest")


def _quantized(model: nn.Module, inputs: tuple[Any, ...], *passes: Any) -> Program:
    batches = [inputs]
    return graphopt.optimize(model, inputs, list(passes), calibration=batches).program


def _parted(program: Program, tolerance: float = 2e-5) -> tuple[Program, Changes]:
    """Return the program in regions, and what was done; it gives what it gave before, in float32."""
    twin = program.clone()
    changes = partition(twin, "float16")
    verify(twin)
    for new, old in zip(twin.run(twin.flat_example), program.run(program.flat_example), strict=True):
        scale = old.detach().abs().max().clamp(min=1e-3)
        assert ((new - old).detach().abs().max() / scale) < tolerance
    return twin, changes


def _plans(program: Program) -> list[Any]:
    return [
        read_plan(node.args[-1])
        for node in program.graph.nodes
        if "cuda_" in str(node.target) and node.op == "call_function"
    ]


def _reasons(changes: Changes) -> str:
    return "\n".join(site.reason for site in changes.skipped)


class _Mlp(nn.Module):
    def __init__(self, second: Any = functional.silu, width: int = 64) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, width), nn.Linear(64, width), nn.Linear(width, 64)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.second(self.gate(x)) * self.up(x))


def test_gate_and_up_are_one_product_with_its_activation_and_down_takes_the_residual() -> None:
    program, _ = _parted(_quantized(_Mlp(), (torch.randn(3, 64),), _W4))
    pair, down = _plans(program)
    assert pair.paired and pair.n == 128 and pair.epilogue == "mul(silu(add(acc, v0)), add(acc2, v1))"
    assert down.epilogue == "add(in0, add(acc, v0))" and (down.bits, down.group) == (4, 32)


def test_up_before_gate_is_the_same_pair() -> None:
    class Other(_Mlp):
        def forward(self, x: Tensor) -> Tensor:
            up = self.up(x)
            return self.down(up * functional.gelu(self.gate(x)))

    program, _ = _parted(_quantized(Other(), (torch.randn(3, 64),), _W4))
    pair = next(plan for plan in _plans(program) if plan.kind == "linear" and plan.paired)
    assert "gelu" in pair.epilogue and {"acc", "acc2"} <= set(
        pair.epilogue.replace("(", " ").replace(",", " ").replace(")", " ").split()
    )


def test_a_width_that_is_no_multiple_of_eight_is_not_paired() -> None:
    program, _ = _parted(_quantized(_Mlp(width=36), (torch.randn(3, 64),), _W4))
    assert not any(plan.paired for plan in _plans(program) if plan.kind == "linear")


class _Three(nn.Module):
    def __init__(self, biases: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, n, bias=bias) for n, bias in zip((48, 16, 10), biases, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


def test_readers_of_one_value_are_merged() -> None:
    program, changes = _parted(_quantized(_Three(), (torch.randn(2, 5, 64),), _W4))
    (plan,) = _plans(program)
    assert plan.n == 74 and plan.epilogue == "add(acc, v0)"
    assert len([site for site in changes.touched if "one product with" in site.reason]) == 3


def test_what_ends_otherwise_is_not_merged() -> None:
    program, _ = _parted(_quantized(_Three((True, False, True)), (torch.randn(2, 64),), _W4))
    assert sorted(plan.n for plan in _plans(program)) == [16, 58]


def test_a_shared_linear_reads_one_copy() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.linear(x)))

    program, _ = _parted(_quantized(Shared(), (torch.randn(2, 64),), _W4))
    assert len(_plans(program)) == 2
    assert len([name for name in program.weights if name.endswith("_weights")]) == 1


def test_results_that_are_read_twice_stay_results() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y, functional.relu(y)

    program, _ = _parted(_quantized(Twice(), (torch.randn(2, 64),), _W4))
    assert [plan.epilogue for plan in _plans(program)] == ["add(acc, v0)"]


class _Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.one, self.two = norm, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = x + y
        return h, self.two(self.norm(h)) + self.one(self.norm(h))


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(64), nn.LayerNorm(64), nn.LayerNorm(64, bias=False), nn.LayerNorm(64, elementwise_affine=False)]
)
def test_a_norm_takes_the_sum_before_it_which_is_kept(norm: nn.Module) -> None:
    inputs = (torch.randn(3, 64), torch.randn(3, 64))
    program, _ = _parted(_quantized(_Normed(norm), inputs, QuantizeActivations(grid="int8"), _W8), tolerance=2e-2)
    rows = [plan for plan in _plans(program) if plan.kind == "row"]
    assert [plan.keep for plan in rows] == [True]
    assert rows[0].prologue == "round(add(in0, in1))" and rows[0].output == "int8" and rows[0].zero_points


@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_by_token(symmetric: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    program, _ = _parted(
        _quantized(model, (torch.randn(5, 64),), QuantizeActivations(grid="int8", symmetric=symmetric), _W8), 2e-2
    )
    kinds = [plan.kind for plan in _plans(program)]
    assert kinds == ["row", "int8", "row", "int8"]
    assert all(plan.zero_points is not symmetric for plan in _plans(program))


@pytest.mark.parametrize(("width", "rotated"), [(64, True), (48, False)])
def test_a_rotation_is_part_of_the_row_where_its_order_is_a_power_of_two(width: int, rotated: bool) -> None:
    inputs = (torch.randn(3, 64),)
    program = _quantized(_Mlp(width=width), inputs, Rotate(hidden=True), QuantizeActivations(grid="int8"), _W8)
    assert any(operator(node) == "graphopt.hadamard" for node in program.graph.nodes)
    parted, changes = _parted(program, 2e-2)
    assert any(plan.kind == "row" and plan.block == width for plan in _plans(parted)) is rotated
    assert ("the order of its rotation is no power of two" in _reasons(changes)) is not rotated


@pytest.mark.parametrize("recipe", ["int8_static", "int8_dynamic"])
def test_scales_of_whole_tensors(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    batches = [(torch.randn(5, 64),) for _ in range(4)]
    program = graphopt.optimize(model, batches[0], recipe, calibration=batches).program
    parted, _ = _parted(program, 2e-2)
    plans = [plan for plan in _plans(parted) if plan.kind == "int8"]
    assert len(plans) == 2 and not any(plan.by_token for plan in plans)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([], "its weight is not quantized"),
        ([QuantizeWeights(grid="nf4", objective="plain", rounding="nearest")], "no kernel for weights in nf4 yet"),
        (
            [QuantizeWeights(grid="int4", group_size=24, objective="plain", rounding="nearest")],
            "groups of 24 inputs fit no fragment",
        ),
        ([QuantizeWeights(grid="e4m3", objective="plain", rounding="nearest")], "no kernel for weights in e4m3 yet"),
    ],
)
def test_what_is_left_says_why(passes: list[Any], said: str) -> None:
    program, changes = _parted(_quantized(nn.Linear(72, 32), (torch.randn(2, 72),), *passes))
    assert said in _reasons(changes) and not _plans(program)


def test_convolutions_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    program, changes = _parted(_quantized(model, (torch.randn(1, 3, 8, 8),), _W4))
    assert "no kernel for convolutions yet" in _reasons(changes) and not _plans(program)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_of_integers_has_a_kernel(bits: int) -> None:
    model = nn.Linear(100, 24)
    for symmetric in (False, True):
        weights = QuantizeWeights(
            grid=f"int{bits}", group_size=64, symmetric=symmetric, objective="plain", rounding="nearest"
        )
        program, _ = _parted(_quantized(model, (torch.randn(2, 100),), weights))
        (plan,) = _plans(program)
        assert plan.bits == min(width for width in (2, 3, 4, 8) if width >= bits)


def test_weights_that_are_no_numbers_give_none() -> None:
    program = _quantized(nn.Linear(64, 32), (torch.randn(2, 64),), _W4)
    name = next(name for name in program.weights if name.endswith("scale"))
    broken = program.map_weights(lambda each, weight: weight * torch.nan if each == name else weight)
    twin = broken.clone()
    partition(twin, "float16")
    assert twin.run(twin.flat_example)[0].isnan().all()
