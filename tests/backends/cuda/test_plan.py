"""Plans can be written down and read back; what no kernel can do is refused."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, RowPlan, plan_text, read_plan
from graphopt.errors import GraphoptError


@pytest.mark.parametrize(
    "plan",
    [
        LinearPlan(
            4096, 11008, 3, 64, True, "bfloat16", "float32", 2, 2, 2, 4, 3, 4, paired=True, epilogue="mul(acc, acc2)"
        ),
        Int8Plan(100, 300, by_token=False, zero_points=True, signed=False, columns=4, column_warps=2),
        RowPlan(1024, norm="layer", affine="fma(x, v0, v1)", block=256, signs=True, output="int8", per_thread=16),
        DequantizePlan(64, 64, 2, 32),
    ],
)  # fmt: skip
def test_round_trip(plan: Any) -> None:
    text = plan_text(plan)
    assert read_plan(text) == plan and plan_text(read_plan(text)) == text and "\n" not in text


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"kind": "linear"}', '{"kind": "wgmma", "n": 1}', '{"kind": "linear", "n": 0, "k": 4}',
     '{"kind": "linear", "n": 16, "k": 64, "bits": 5}', '{"kind": "linear", "n": 16, "k": 64, "surprise": 1}',
     '{"kind": "linear", "n": 16, "k": 64, "epilogue": "system(acc)"}'],
)  # fmt: skip
def test_what_is_no_plan_is_one_sentence(text: str) -> None:
    with pytest.raises(GraphoptError, match="this is no plan of a kernel"):
        read_plan(text)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LinearPlan(64, 64, group=24), "groups of 24 inputs"),
        (lambda: LinearPlan(64, 64, row_warps=8, k_warps=8), "2048 threads"),
        (lambda: LinearPlan(64, 4096, columns=8, rows=4, k_warps=8), "bytes of shared memory"),
        (lambda: LinearPlan(24, 64, paired=True), "cannot be paired"),
        (lambda: LinearPlan(64, 64, epilogue="add(acc, acc2)"), "reads acc2"),
        (lambda: LinearPlan(64, 64, epilogue="add(acc, x)"), "reads x"),
        (lambda: Int8Plan(64, 1 << 16), "more than 32 bits"),
        (lambda: Int8Plan(64, 64, signed=False), "need zero points"),
        (lambda: RowPlan(96, block=64), "no rotation of 96"),
        (lambda: RowPlan(96, block=24), "in blocks of 24"),
        (lambda: RowPlan(1 << 15, block=1 << 15, per_thread=64), "bytes of shared memory to rotate"),
        (lambda: RowPlan(1 << 16), "threads"),
        (lambda: RowPlan(64, output="half", zero_points=True), "have no zero points"),
        (lambda: RowPlan(64, output="uint8"), "need zero points"),
        (lambda: RowPlan(64, eps=float("nan")), "eps is nan"),
        (lambda: RowPlan(64, prologue="add(in0, acc)"), "reads acc"),
    ],
)
def test_what_no_kernel_can_do(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_more_tokens_than_a_block_takes() -> None:
    assert LinearPlan(64, 64, columns=2).grid(16) == (4, 1)
    with pytest.raises(ValueError, match="up to 16 tokens, not 17"):
        LinearPlan(64, 64, columns=2).grid(17)
    assert LinearPlan(64, 64, columns=2, token_blocks=True).grid(17) == (8, 1)


@pytest.mark.parametrize("bits", range(3, 14))
@pytest.mark.parametrize("per_thread", [8, 16, 32, 64])
def test_stages_hold_every_digit_once_before_it_is_needed(bits: int, per_thread: int) -> None:
    if per_thread > 1 << bits or (1 << bits) // per_thread > 1024:
        pytest.skip("no such plan")
    plan = RowPlan(1 << bits, block=1 << bits, per_thread=per_thread)
    stages = plan.stages
    assert {digit for held in stages for digit in held} == set(range(bits))
    assert all(len(held) == plan.held and held == tuple(sorted(set(held))) for held in stages)
    assert stages[0][:3] == stages[-1][:3] == (0, 1, 2)
