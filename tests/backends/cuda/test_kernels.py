"""Every executor gives the specification's bits, over a grid of plans.

The interpreter of PTX runs plans as NVRTC compiled them; the host executor, which takes a compiler a second each, a
part of them in five orders of threads and blocks. The slow suite runs every plan by both.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_kernels import ORDERS, Case, agree

from graphopt.backends.cuda import arithmetic, host, nvrtc, specification
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, Plan, RowPlan
from graphopt.ir.hadamard import transform

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
needs_compiler = pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler")

_BITS, _DTYPES = (2, 3, 4, 8), ("float16", "bfloat16")
_EPILOGUES = ("acc", "add(acc, v0)", "add(silu(add(acc, v0)), in0)", "round(gelu(acc))", "mul(in0, relu(acc))")
# (n, k, group), tokens: odd outputs, inputs that divide no load, short last groups, the edges of buckets of tokens
_SIZES = [(37, 300, 64), (50, 515, 0), (16, 128, 32), (65, 257, 128), (33, 192, 48), (48, 1024, 256), (17, 96, 96)]
_TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 33, 64)


def _linears(count: int) -> Iterator[tuple[LinearPlan, int]]:
    """Yield plans, each value of everything often enough; the same ones always."""
    draw = random.Random(1)
    cells = itertools.cycle(itertools.product(_BITS, _DTYPES, (False, True)))
    made = 0
    while made < count:
        bits, dtype, zero_points = next(cells)
        (n, k, group), tokens = draw.choice(_SIZES), draw.choice(_TOKENS)
        paired = draw.random() < 0.2
        columns = draw.choice([each for each in (1, 2, 4, 8) if 8 * each >= min(tokens, 16)])
        scales = draw.choice(("float16", "float32"))
        try:
            plan = LinearPlan(
                -(-n // 16) * 16 if paired else n, k, bits, group, zero_points, dtype, scales,
                columns, draw.choice((1, 2, 4)) if columns < 4 else 1, draw.choice((1, 2)), draw.choice((1, 2, 4)),
                draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 4)), 8 * columns < tokens,
                "mul(silu(acc), add(acc2, v0))" if paired else draw.choice(_EPILOGUES), paired=paired,
            )  # fmt: skip
        except ValueError:
            continue  # a group that this many bits have no layout for
        made += 1
        yield plan, tokens


def _rows() -> list[tuple[RowPlan, int]]:
    found: list[tuple[RowPlan, int]] = []
    for dtype, (n, per_thread), norm, (output, zeros) in itertools.product(
        _DTYPES, [(96, 8), (100, 4), (513, 1), (1026, 4), (2048, 16)], ("none", "rms", "layer"),
        [("half", False), ("int8", False), ("int8", True), ("uint8", True)],
    ):  # fmt: skip
        plan = RowPlan(n, dtype, norm=norm, output=output, zero_points=zeros, per_thread=per_thread)  # type: ignore[arg-type]
        found.append((plan, 5))
    affine = {"prologue": "round(add(in0, mul(in1, v0)))", "keep": True, "affine": "fma(x, v1, v2)"}
    found.append((RowPlan(640, norm="layer", output="int8", **affine), 2))  # type: ignore[arg-type]
    found.append((RowPlan(640, "bfloat16", norm="rms", **affine), 2))  # type: ignore[arg-type]
    for bits, per_thread, count in (
        (3, 8, 5),
        (4, 8, 3),
        (5, 32, 1),
        (7, 16, 3),
        (10, 16, 1),
        (11, 32, 2),
        (12, 32, 1),
        (13, 64, 1),
    ):
        transpose = bits % 2 == 0
        plan = RowPlan(
            count << bits,
            block=1 << bits,
            signs=True,
            transpose=transpose,
            output="int8",
            norm="rms",
            per_thread=per_thread,
        )
        found.append((plan, 2))
    found.append((RowPlan(1024, "bfloat16", block=256, per_thread=16), 3))
    found.append((RowPlan(512, block=128, output="uint8", zero_points=True, per_thread=16), 3))
    return found


_INT8 = [
    (Int8Plan(37, 300), 3),
    (Int8Plan(37, 301, "bfloat16", zero_points=True, k_blocks=2), 9),
    (Int8Plan(37, 302, signed=False, zero_points=True, k_blocks=3, k_warps=2), 1),
    (Int8Plan(70, 256, zero_points=True, by_token=False, columns=2, rows=2, row_warps=2, column_warps=2, k_warps=1,
              epilogue="add(relu(add(acc, v0)), in0)"), 45),
    (Int8Plan(130, 128, "bfloat16", columns=4, rows=4, row_warps=2, column_warps=2, k_warps=1,
              epilogue="silu(acc)"), 100),
    (Int8Plan(16, 64, columns=8, k_warps=1, depth=4, epilogue="add(acc, v0)"), 64),
]  # fmt: skip
_DEQUANTIZE = [
    (DequantizePlan(n, k, bits, group, zeros, dtype, scales, paired=paired), 1)
    for bits, (n, k, group, zeros, dtype, scales, paired) in itertools.product(_BITS, [
        (37, 300, 64, True, "float16", "float16", False),
        (48, 256, 0, False, "bfloat16", "float32", True),
        (33, 131, 32, True, "bfloat16", "float16", False),
    ])
]  # fmt: skip

_LINEARS = list(_linears(96))
_ALL: list[tuple[Plan, int]] = [*_LINEARS, *_rows(), *_INT8, *_DEQUANTIZE]
# By every executor in the default suite; the others in the slow one.
_FIRST: list[tuple[Plan, int]] = [*_LINEARS[:40], *_rows(), *_INT8, *_DEQUANTIZE]
_ON_HOST: list[tuple[Plan, int]] = [*_LINEARS[:64:8], *_rows()[4::11], *_INT8[1:4:2], _DEQUANTIZE[0]]
_DIGITS = _rows()[-2]  # a rotation


def _name(case: Any) -> str:
    plan, tokens = case
    return f"{plan.kind}-{_ALL.index(case)}-{tokens}"


@needs_nvrtc
@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=() if each in _FIRST else pytest.mark.slow) for each in _ALL], ids=_name
)
def test_ptx_gives_the_specifications_bits(case: tuple[Plan, int]) -> None:
    agree(*case, architectures=("80", "90") if _ALL.index(case) % 8 == 0 else ("90",))


@needs_compiler
@pytest.mark.parametrize("case", _ON_HOST, ids=_name)
def test_the_host_gives_the_specifications_bits_in_every_order(case: tuple[Plan, int]) -> None:
    agree(*case, orders=ORDERS, architectures=())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", _ALL, ids=_name)
def test_the_host_gives_the_specifications_bits_for_every_plan(case: tuple[Plan, int]) -> None:
    agree(*case, orders=ORDERS, architectures=())


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["80", "89", "90", "90a", "100", "120"])
def test_every_architecture(architecture: str) -> None:
    for case in (_LINEARS[1], _INT8[1], _DIGITS, _DEQUANTIZE[4]):
        agree(*case, architectures=(architecture,))


# The specification itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "tokens"), list(_linears(32)), ids=str)
def test_products_are_products(plan: LinearPlan, tokens: int) -> None:
    """The specification lies within its bound of the exact product, for a bare one."""
    bare = LinearPlan(
        plan.n, plan.k, plan.bits, plan.group, plan.zero_points, plan.dtype, plan.scale_dtype, k_warps=plan.k_warps,
        k_blocks=plan.k_blocks, token_blocks=True,
    )  # fmt: skip
    case = Case(bare, tokens)
    width = plan.group or plan.k
    scale = np.repeat(case.scale, width, axis=1)[:, : plan.k].astype(np.float64)
    zero: Any = 1 << (plan.bits - 1) if case.zero is None else np.repeat(case.zero, width, axis=1)[:, : plan.k]
    weight = (case.codes - zero) * scale
    x = arithmetic.widened(case.x, plan.dtype).astype(np.float64)
    got = arithmetic.widened(case.wanted["y"], plan.dtype).astype(np.float64)
    exact = x @ weight.T
    bound = specification.linear_bound(bare, case.x, weight.astype(np.float32))
    rounding = np.abs(exact) * (2.0**-11 if plan.dtype == "float16" else 2.0**-8)
    assert (np.abs(got - exact) <= bound + rounding + 1e-7).all()


@pytest.mark.parametrize("block", [8, 64, 1024, 8192])
@pytest.mark.parametrize("transpose", [False, True])
def test_rotations_are_the_operators(block: int, transpose: bool) -> None:
    per_thread = min(64, block)
    plan = RowPlan(block, block=block, signs=True, transpose=transpose, per_thread=per_thread)
    x, signs = np.random.default_rng(0).normal(size=(3, block)), np.random.default_rng(1).integers(0, 2, block) == 1
    bits = arithmetic.narrowed(x.astype(np.float32), "float16")
    got = arithmetic.widened(specification.row(plan, {"in0": bits}, signs)["y"], "float16")
    exact = torch.from_numpy(arithmetic.widened(bits, "float16")).double()
    wanted = transform(exact, None, torch.from_numpy(1.0 - 2.0 * signs), 0, transpose)
    assert np.abs(got - wanted.numpy()).max() < 2e-3


def test_codes_are_the_operators() -> None:
    """For a row as it stands, codes, scales and zero points are those of `dynamic_scale` and `quantize`, to the bit."""
    from graphopt.ir.dialect import dynamic_scale, quantize

    x = torch.randn(64, 96, dtype=torch.float16) * torch.logspace(-4, 3, 64)[:, None].half()
    x[0] = 0
    x[1, 3] = torch.nan
    for output in ("int8", "uint8"):
        scale, zero = dynamic_scale(x, -1, -1, output)
        codes = quantize(x, scale, zero, -1, -1, output)
        plan = RowPlan(96, output=output, zero_points=True)  # type: ignore[arg-type]
        got = specification.row(plan, {"in0": x.view(torch.int16).numpy().view(np.uint16)})
        known = ~scale.isnan().flatten().numpy()
        assert np.array_equal(got["scale"][known], scale.view(torch.int16).numpy().view(np.uint16).reshape(-1)[known])
        assert np.array_equal(got["codes"], codes.view(torch.uint8).numpy())
        assert np.array_equal(got["zero_point"], zero.view(torch.uint8).numpy().reshape(-1))
        assert (
            not known[1]
            and arithmetic.widened(got["scale"], "float16")[1] != arithmetic.widened(got["scale"], "float16")[1]
        )
