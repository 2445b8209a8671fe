"""Every plan that a schedule may choose passes the gates; a kernel that should not, does not."""

from __future__ import annotations

import dataclasses

import pytest

from graphopt.backends.cuda import gates, nvrtc
from graphopt.backends.cuda.gates import check, instructions, table
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, Plan, RowPlan
from graphopt.backends.cuda.schedule import fitting, ranked

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")

_PRODUCTS: list[tuple[LinearPlan | Int8Plan, int]] = [
    *((LinearPlan(8192, 8192, bits), 1) for bits in (2, 3, 4, 8)),
    (LinearPlan(8192, 8192, 4), 16),
    (LinearPlan(8192, 8192, 2, 64, zero_points=True, dtype="bfloat16"), 1),
    (Int8Plan(4096, 4096), 1),
    (Int8Plan(4096, 4096, zero_points=True), 512),
]
_OTHERS: list[Plan] = [
    RowPlan(
        8192, norm="rms", affine="mul(x, v0)", prologue="round(add(in0, in1))", keep=True, output="int8", per_thread=32
    ),
    RowPlan(4096, "bfloat16", norm="layer", output="uint8", zero_points=True, per_thread=16),
    RowPlan(8192, block=8192, signs=True, output="int8", per_thread=64),
    RowPlan(4096, block=4096, output="int8", per_thread=32),
    DequantizePlan(8192, 8192),
]


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_what_is_chosen_passes(architecture: str) -> None:
    chosen = [next(fitting(ranked(plan, tokens), architecture)) for plan, tokens in _PRODUCTS]
    found = [check(plan, architecture) for plan in [*chosen, *_OTHERS]]
    text = table(found)
    print(f"\n{text}")
    assert len(text.splitlines()) == 2 + len(found)
    assert not [(gates.title(gate.plan), gate.failures) for gate in found if gate.failures]


def test_a_plan_that_does_not_fit_its_registers_is_found_and_not_chosen() -> None:
    greedy = LinearPlan(8192, 8192, 2, columns=8, rows=2, k_warps=2, depth=1)
    assert any("bytes spilled" in failure for failure in check(greedy, "90").failures)
    assert list(fitting([greedy], "90")) == []


def test_instructions_over_the_budget_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LinearPlan(8192, 8192, 2)
    assert not check(plan, "90").failures
    monkeypatch.setattr(gates, "ALLOWANCE", 0.5)
    assert any("over the budget" in failure for failure in check(plan, "90").failures)


def test_instructions_are_those_of_the_inner_loop() -> None:
    """They do not depend on the matrix, and more tokens cost what their products cost."""
    plan = LinearPlan(4096, 4096)
    assert instructions(plan) == instructions(dataclasses.replace(plan, n=64, k=8192))
    more = instructions(dataclasses.replace(plan, columns=2))
    assert more is not None and more - instructions(plan) > 0.125  # one mma for eight weights of a lane


def test_what_is_inexact_or_lies_in_local_memory_is_found() -> None:
    kernel = gates.emit(LinearPlan(64, 64))
    assert gates._linted(kernel, "ex2.approx.f32 %f1, %f2; no_allocate.v4") == ["an instruction is approx"]
    assert gates._linted(kernel, "ld.local.u32 no_allocate.v4") == ["something lies in local memory"]
    assert gates._linted(kernel, "") == ["weights are not loaded by 16 bytes"]
