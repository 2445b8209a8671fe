"""Kernels on the GPU against their specifications, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from graphopt.backends.cuda import arithmetic, launch, specification
from graphopt.backends.cuda.operands import pack_int8, pack_linear, pack_signs
from graphopt.backends.cuda.plan import DequantizePlan, Int8Plan, LinearPlan, Plan, RowPlan, is_vector

_POISON = 0x7FFD
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
        wanted, bound, got = _run(plan, tokens)
        wrong = {name: int((got[name] != each).sum()) for name, each in wanted.items()}
        if not any(wrong.values()):
            yield plan, "the specification's bits", True
            continue
        if bound is None:
            yield plan, f"other bits: {wrong}", False
            continue
        values, exact = arithmetic.widened(got["y"], plan.dtype), arithmetic.widened(wanted["y"], plan.dtype)
        step = np.abs(exact) * (2.0**-10 if plan.dtype == "float16" else 2.0**-7) + 1e-6
        inside = bool((np.abs(values - exact) <= bound + step).all()) and bool(np.isfinite(values).all())
        yield (
            plan,
            f"{wrong['y'] / exact.size:.1%} of bits differ, {'within' if inside else 'BEYOND'} the bound",
            inside,
        )


def _run(plan: Plan, tokens: int) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Return what the specification gives, how far off tensor cores may be (None: not at all), what the GPU gives."""
    random = np.random.default_rng(0)

    def halves(*shape: int) -> Any:
        return arithmetic.narrowed(random.normal(size=shape), plan.dtype)

    given: dict[str, Any] = {}
    bound = None
    if isinstance(plan, LinearPlan | DequantizePlan):
        groups = -(-plan.k // plan.group) if plan.group else 1
        codes = random.integers(0, 1 << plan.bits, (plan.n, plan.k))
        scale = random.uniform(0.01, 0.1, (plan.n, groups)).astype(np.float16).astype(np.float32)
        zero = random.integers(0, 1 << plan.bits, (plan.n, groups)) if plan.zero_points else None
        given = dict(pack_linear(plan, codes, scale, zero))
        if isinstance(plan, DequantizePlan):
            return (
                {"y": specification.dequantize(plan, codes, scale, zero)},
                None,
                _launched(plan, given, (plan.n, plan.k), 1),
            )
        x = halves(tokens, plan.k)
        operands = {
            name: halves(plan.outputs) if is_vector(name) else halves(tokens, plan.outputs) for name in plan.inputs
        }
        wanted = {"y": specification.linear(plan, x, codes, scale, zero, operands)}
        width = plan.group or plan.k
        shift = np.repeat(zero, width, axis=1)[:, : plan.k] if zero is not None else 1 << (plan.bits - 1)
        weight = ((codes - shift) * np.repeat(scale, width, axis=1)[:, : plan.k]).astype(np.float32)
        bound = specification.linear_bound(plan, x, weight)
        if plan.paired or plan.epilogue != "acc":
            bound = np.full(wanted["y"].shape, 4 * float(bound.max()) + 1e-2)
        return wanted, bound, _launched(plan, {**given, "x": x, **operands}, (tokens, plan.outputs), tokens)
    if isinstance(plan, Int8Plan):
        bytes_of = random.integers(-128, 128, (plan.n, plan.k)).astype(np.int8)
        scales = random.uniform(0.001, 0.01, plan.n).astype(np.float32)
        codes8 = random.integers(0, 256, (tokens, plan.k)).astype(np.uint8)
        x_scale = arithmetic.narrowed(random.uniform(0.001, 0.01, tokens), plan.dtype)
        zero8 = random.integers(0, 256, tokens).astype(np.uint8) if plan.zero_points else None
        given = {**pack_int8(plan, bytes_of, scales), "x": codes8, "x_scale": x_scale, "x_zero_point": zero8}
        wanted = {"y": specification.int8(plan, codes8, x_scale, zero8, bytes_of, scales)}
        return wanted, None, _launched(plan, given, (tokens, plan.n), tokens)
    operands = {name: halves(plan.n) if is_vector(name) else halves(tokens, plan.n) for name in plan.inputs}
    signs = random.integers(0, 2, plan.n).astype(bool) if plan.signs else None
    wanted = specification.row(plan, operands, signs)
    given = {**operands, **({"signs": pack_signs(signs)} if signs is not None else {})}
    return wanted, None, _launched(plan, given, wanted, tokens)


def _launched(plan: Plan, given: dict[str, Any], written: Any, tokens: int) -> dict[str, Any]:
    """Launch a plan with poisoned outputs and return what it wrote."""
    device = torch.device("cuda", torch.cuda.current_device())
    arguments: dict[str, Any] = {name: _tensor(each).to(device) for name, each in given.items() if each is not None}
    shapes = written if isinstance(written, dict) else {"y": np.empty(written, np.uint16)}
    outputs = {
        name: _tensor(np.full(each.shape, _POISON, np.int64).astype(each.dtype)).to(device)
        for name, each in shapes.items()
    }
    grid = (tokens, 1)
    if isinstance(plan, LinearPlan | Int8Plan):
        arguments |= {"tokens": tokens, **launch._with_workspace(plan, tokens, device)}
        grid = plan.grid(tokens)
    elif isinstance(plan, DequantizePlan):
        grid = plan.grid()
    launch.launch(plan, grid, {**arguments, **outputs}, device)
    torch.cuda.synchronize()
    return {name: each.cpu().numpy().view(shapes[name].dtype) for name, each in outputs.items()}


def _tensor(array: Any) -> torch.Tensor:
    signed = {1: np.int8, 2: np.int16, 4: np.int32}[array.dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(array).view(signed))
