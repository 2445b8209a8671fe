"""Kernels on the GPU against their specifications, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from graphopt.backends.cuda import arithmetic, launch
from graphopt.backends.cuda.cases import Arrays, Case
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, Plan, RowPlan

_PLANS: list[tuple[Plan, int]] = [
    *(
        (LinearPlan(300, 1034, bits, 64, bits == 3, dtype, k_blocks=2), 5)
        for bits in (2, 3, 4, 8)
        for dtype in ("float16", "bfloat16")
    ),
    (LinearPlan(512, 2048, 4, 128, columns=8, k_warps=2, epilogue="add(silu(add(acc, v0)), in0)"), 60),
    (LinearPlan(512, 2048, 4, 128, paired=True, columns=2, rows=2, epilogue="mul(silu(acc), acc2)"), 16),
    (Int8Plan(300, 1034, zero_points=True, k_blocks=2), 9),
    (
        Int8Plan(
            512, 2048, signed=False, zero_points=True, columns=4, rows=2, row_warps=2, column_warps=2, k_warps=1
        ),
        200,
    ),
    (
        RowPlan(
            4096, norm="rms", prologue="round(add(in0, in1))", keep=True, affine="mul(x, v0)", output="int8",
            per_thread=16,
        ),
        64,
    ),
    (RowPlan(4096, "bfloat16", norm="layer", output="uint8", zero_points=True, per_thread=16), 64),
    (RowPlan(8192, block=8192, signs=True, output="int8", per_thread=64), 64),
    (RowPlan(2048, block=512, output="half", per_thread=16), 64),
    *((DequantizePlan(300, 1034, bits, 64, True), 1) for bits in (2, 3, 4, 8)),
]  # fmt: skip


def checked() -> Iterator[tuple[Plan, str, bool]]:
    """Yield (plan, what was found, whether it is as it must be)."""
    for plan, tokens in _PLANS:
        case = Case(plan, tokens)
        got = _launched(case)
        wrong, bound = case.differences(got), case.bound()
        if not wrong:
            yield plan, "the specification's bits", True
        elif bound is None:
            yield plan, f"other bits: {wrong}", False
        else:
            values, exact = (arithmetic.widened(each["y"], plan.dtype) for each in (got, case.wanted))
            step = np.abs(exact) * (2.0**-10 if plan.dtype == "float16" else 2.0**-7) + 1e-6
            inside = bool((np.abs(values - exact) <= bound + step).all()) and bool(np.isfinite(values).all())
            share = wrong["y"] / exact.size
            yield plan, f"{share:.1%} of bits differ, {'within' if inside else 'BEYOND'} the bound", inside


def _launched(case: Case) -> Arrays:
    """Launch a case with poisoned outputs and return what it wrote."""
    device = torch.device("cuda", torch.cuda.current_device())
    arguments, outputs = case.arguments()
    given: dict[str, Any] = {
        name: _tensor(each).to(device) if isinstance(each, np.ndarray) else each for name, each in arguments.items()
    }
    launch.launch(case.plan, case.grid, given, device)
    torch.cuda.synchronize()
    return {name: given[name].cpu().numpy().view(each.dtype) for name, each in outputs.items()}


def _tensor(array: Any) -> torch.Tensor:
    signed = {1: np.int8, 2: np.int16, 4: np.int32}[array.dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(array).view(signed))
