"""The torch operators: schemas, shapes and values, as torch checks them, and beside the specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cuda_kernels import Case

from graphopt.backends.cuda import arithmetic, operators
from graphopt.backends.cuda.operators import INT8_LINEAR, LINEAR, ROWS
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, RowPlan, plan_text
from graphopt.errors import GraphoptError

_PLANS = [
    (LinearPlan(48, 200, 3, 64, True, paired=True, epilogue="mul(silu(add(acc, v0)), acc2)"), 3),
    (LinearPlan(37, 300, 4, 0, dtype="bfloat16", columns=2, epilogue="add(acc, in0)"), 9),
    (Int8Plan(37, 300, zero_points=True, epilogue="add(acc, v0)"), 5),
    (Int8Plan(37, 300, "bfloat16", signed=False, zero_points=True, by_token=False), 1),
    (RowPlan(256, prologue="round(add(in0, in1))", keep=True, norm="rms", affine="mul(x, v0)", output="int8",
             zero_points=True), 4),
    (RowPlan(256, "bfloat16", norm="layer", block=64, signs=True, per_thread=16), 2),
]  # fmt: skip


def _tensor(array: Any, plan: Any) -> torch.Tensor:
    if array.dtype == np.uint16:
        kind = torch.float16 if plan.dtype == "float16" else torch.bfloat16
        return torch.from_numpy(array.view(np.int16)).view(kind)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)


def _call(plan: Any, tokens: int) -> tuple[Any, tuple[Any, ...], Case]:
    """Return an operator and its arguments for a case's operands."""
    case = Case(plan, tokens)
    given, text = case.given, plan_text(plan)
    inputs = [_tensor(given[name], plan) for name in plan.inputs]
    if isinstance(plan, LinearPlan):
        zeros = torch.from_numpy(given["zeros"].view(np.int16)) if "zeros" in given else None
        weights = [torch.from_numpy(given[name].view(np.int32)) for name in ("weights", "scales")]
        return LINEAR, (_tensor(given["x"], plan), *weights, zeros, inputs, text), case
    if isinstance(plan, Int8Plan):
        kind = torch.int8 if plan.signed else torch.uint8
        count = (tokens, 1) if plan.by_token else ()
        zero = torch.from_numpy(given["x_zero_point"]).view(kind).reshape(count) if plan.zero_points else None
        sums = torch.from_numpy(given["row_sums"].view(np.int32)) if plan.zero_points else None
        weights = [torch.from_numpy(given[name].view(np.int32)) for name in ("weights", "scales")]
        x, scale = torch.from_numpy(given["x"]).view(kind), _tensor(given["x_scale"], plan).reshape(count)
        return INT8_LINEAR, (x, scale, zero, *weights, sums, inputs, text), case
    signs = torch.from_numpy(given["signs"]) if plan.signs else None
    return ROWS, (inputs, signs, text), case


@pytest.mark.parametrize(("plan", "tokens"), _PLANS, ids=str)
def test_torch_finds_nothing_wrong(plan: Any, tokens: int) -> None:
    operator, arguments, _ = _call(plan, tokens)
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


@pytest.mark.parametrize(("plan", "tokens"), _PLANS, ids=str)
def test_the_reference_is_close_to_the_specification(plan: Any, tokens: int) -> None:
    operator, arguments, case = _call(plan, tokens)
    results = operator(*arguments)
    named = dict(zip(case.wanted, results if isinstance(results, list) else [results], strict=False))
    if isinstance(plan, RowPlan):
        order = ["kept", "y", "codes", "scale", "zero_point"]
        named = dict(zip((name for name in order if name in case.wanted), results, strict=True))
    for name, got in named.items():
        wanted = case.wanted[name]
        if wanted.dtype == np.uint8:
            kind = np.int8 if got.dtype is torch.int8 else np.uint8
            apart = np.abs(got.numpy().astype(int).reshape(-1) - wanted.view(kind).astype(int).reshape(-1))
            assert apart.max() <= 1 and (apart > 0).mean() < 0.02
            continue
        values = arithmetic.widened(wanted, plan.dtype).reshape(-1)
        step = 2.0**-10 if plan.dtype == "float16" else 2.0**-7
        assert np.abs(got.float().numpy().reshape(-1) - values).max() <= 2 * step * np.abs(values).max()


def test_shapes_are_kept() -> None:
    operator, (x, *rest), _ = _call(LinearPlan(37, 300), 6)
    assert operator(x.reshape(2, 3, 300), *rest).shape == (2, 3, 37)
    assert operator(x[0], *rest).shape == (37,)
    rows, (inputs, signs, text), _ = _call(RowPlan(64, output="int8"), 6)
    codes, scale = rows([inputs[0].reshape(3, 2, 64)], signs, text)
    assert codes.shape == (3, 2, 64) and scale.shape == (3, 2, 1) and codes.dtype is torch.int8


@pytest.mark.parametrize("operator_of", [0, 2, 4])
def test_rows_of_another_size_are_one_sentence(operator_of: int) -> None:
    operator, arguments, _ = _call(*_PLANS[operator_of])
    first = [each[..., :-1] for each in arguments[0]] if isinstance(arguments[0], list) else arguments[0][..., :-1]
    with pytest.raises(GraphoptError, match="the kernel reads rows of"):
        operator(first, *arguments[1:])


def test_a_plan_of_another_kind_is_one_sentence() -> None:
    operator, arguments, _ = _call(*_PLANS[0])
    with pytest.raises(GraphoptError, match="a plan of kind row is none of a linear"):
        operator(*arguments[:-1], plan_text(RowPlan(64)))
    with pytest.raises(GraphoptError, match="this is no plan of a kernel"):
        operator(*arguments[:-1], "{}")


def _changed(arguments: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:at], value, *arguments[at + 1 :])


@pytest.mark.parametrize(
    ("of", "at", "value", "said"),
    [
        (0, 1, torch.zeros(7, dtype=torch.int32), "weights has 7 elements; the kernel reads"),
        (0, 2, torch.zeros(0, dtype=torch.int32), "scales has 0 elements"),
        (0, 3, None, "zeros has 0 elements"),
        (0, 4, [], "reads 1 operands, not 0"),
        (0, 4, [torch.zeros(3, dtype=torch.float16)], r"v0 has the shape \[3\]; the kernel reads 24 elements"),
        (2, 0, torch.zeros(5, 300), "reads torch.int8 with zero points like it, not torch.float32"),
        (2, 1, torch.zeros(4, 1), r"x_scale has the shape \[4, 1\]; the kernel reads 5 elements"),
        (2, 2, None, "with zero points"),
        (2, 5, torch.zeros(3, dtype=torch.int32), "row_sums has 3 elements; the kernel reads 37"),
        (4, 0, [torch.zeros(4, 256), torch.zeros(3, 256), torch.zeros(256)], r"in1 has the shape \[3, 256\]"),
        (5, 1, torch.zeros(31, dtype=torch.uint8), "reads 32 bytes of signs"),
        (5, 1, torch.zeros(32, dtype=torch.int32), "signs are torch.int32"),
        (2, 2, torch.zeros(5, 1, dtype=torch.int32), "with zero points like it"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_the_plan_are_refused(of: int, at: int, value: Any, said: str) -> None:
    """An archive from elsewhere may hold any tensors beside a plan: nothing is read beyond their ends."""
    operator, arguments, _ = _call(*_PLANS[of])
    with pytest.raises(GraphoptError, match=said):
        operator(*_changed(arguments, at, value))


def test_operands_on_another_device_are_refused() -> None:
    with pytest.raises(GraphoptError, match="x is on cpu and an operand on meta; move them to one device"):
        operators._check_rest(torch.zeros(2, 8), (), (), 8, [torch.zeros(3, device="meta")])


@pytest.mark.parametrize(("of", "at"), [(0, 1), (0, 2), (0, 3), (2, 3), (2, 4), (2, 5)])
def test_packed_operands_of_another_type_or_in_pieces_are_refused(of: int, at: int) -> None:
    """As many elements of fewer bytes would be read beyond their end."""
    operator, arguments, _ = _call(*_PLANS[of])
    packed = arguments[at]
    for other in (packed.to(torch.int8), packed.repeat_interleave(2)[::2]):
        assert other.numel() == packed.numel()
        with pytest.raises(GraphoptError, match="maybe in pieces; the kernel reads torch"):
            operator(*_changed(arguments, at, other))
