# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""Kernels as torch operators: what torch.compile and torch.export see of a region.

    y      = graphopt::cuda_linear(x, weights, scales, zeros?, inputs, plan)
    y      = graphopt::cuda_int8_linear(x, x_scale, x_zero_point?, weights, scales, row_sums?, inputs, plan)
    found… = graphopt::cuda_rows(inputs, signs?, plan)

`plan` is a plan's text (`plan.py`): what is computed, and the tiles to start from; for how many tokens it runs with
which tiles is decided at the call. `inputs` are what its expressions read, in the order of `plan.inputs`: vectors, and
tensors of the shape of y. Any leading axes of x count as tokens. On a GPU the kernel runs, elsewhere `reference.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.cuda import launch, reference
from graphopt.backends.cuda.operands import Bytes, sizes
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, Plan, RowPlan, is_vector, read_plan
from graphopt.errors import GraphoptError

LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
LIBRARY.define(
    "cuda_linear(Tensor x, Tensor weights, Tensor scales, Tensor? zeros, Tensor[] inputs, str plan) -> Tensor"
)
LIBRARY.define(
    "cuda_int8_linear(Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor weights, Tensor scales, "
    "Tensor? row_sums, Tensor[] inputs, str plan) -> Tensor"
)
LIBRARY.define("cuda_rows(Tensor[] inputs, Tensor? signs, str plan) -> Tensor[]")


@functools.lru_cache(maxsize=4096)
def _plan(text: str) -> Plan:
    return read_plan(text)


def _as_linear(text: str) -> LinearPlan:
    plan = _plan(text)
    if not isinstance(plan, LinearPlan):
        raise GraphoptError(f"a plan of kind {plan.kind} is none of a linear")
    return plan


def _as_int8(text: str) -> Int8Plan:
    plan = _plan(text)
    if not isinstance(plan, Int8Plan):
        raise GraphoptError(f"a plan of kind {plan.kind} is none of an int8 linear")
    return plan


def _as_rows(text: str) -> RowPlan:
    plan = _plan(text)
    if not isinstance(plan, RowPlan):
        raise GraphoptError(f"a plan of kind {plan.kind} is none of rows")
    return plan


# Shapes and dtypes -----------------------------------------------------------------------------------------------


@torch.library.register_fake("graphopt::cuda_linear", lib=LIBRARY)
def _(x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor | None, inputs: Sequence[Tensor], plan: str) -> Tensor:
    found = _as_linear(plan)
    _check_inner(x, found.k)
    return x.new_empty([*x.shape[:-1], found.outputs])


@torch.library.register_fake("graphopt::cuda_int8_linear", lib=LIBRARY)
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weights: Tensor,
    scales: Tensor,
    row_sums: Tensor | None,
    inputs: Sequence[Tensor],
    plan: str,
) -> Tensor:
    found = _as_int8(plan)
    _check_inner(x, found.k)
    return x_scale.new_empty([*x.shape[:-1], found.n])


@torch.library.register_fake("graphopt::cuda_rows", lib=LIBRARY)
def _(inputs: Sequence[Tensor], signs: Tensor | None, plan: str) -> list[Tensor]:
    found = _as_rows(plan)
    x = inputs[0]
    _check_inner(x, found.n)
    whole, one = list(x.shape), [*x.shape[:-1], 1]
    kept = [x.new_empty(whole)] if found.keep else []
    if found.output == "half":
        return [*kept, x.new_empty(whole)]
    storage = torch.int8 if found.output == "int8" else torch.uint8
    zeros = [x.new_empty(one, dtype=storage)] if found.zero_points else []
    return [*kept, x.new_empty(whole, dtype=storage), x.new_empty(one), *zeros]


def _check_inner(x: Tensor, size: int) -> None:
    if x.dim() == 0 or x.shape[-1] != size:
        raise GraphoptError(f"the kernel reads rows of {size}, not a tensor of shape {list(x.shape)}")


def _check(x: Tensor, plan: LinearPlan | Int8Plan, inputs: Sequence[Tensor], **packed: Tensor | None) -> None:
    """Refuse what a kernel would read beyond, or on another device: an archive may hold anything."""
    _check_inner(x, plan.k)
    wanted = sizes(plan)
    for name, tensor in packed.items():
        count, elements = wanted.get(name, 0), 0 if tensor is None else tensor.numel()
        if count != elements:
            raise GraphoptError(f"{name} has {elements} elements; the kernel reads {count}")
        kind = torch.int16 if name == "zeros" else torch.int32
        if tensor is not None and (tensor.dtype != kind or not tensor.is_contiguous()):
            raise GraphoptError(f"{name} is {tensor.dtype}, maybe in pieces; the kernel reads {kind} in one")
    _check_rest(x, plan.inputs, inputs, plan.outputs, [each for each in packed.values() if each is not None])


def _check_rest(
    x: Tensor, names: Sequence[str], inputs: Sequence[Tensor], width: int, others: Sequence[Tensor]
) -> None:
    if len(names) != len(inputs):
        raise GraphoptError(f"the kernel reads {len(names)} operands, not {len(inputs)}")
    tokens = x.numel() // max(x.shape[-1], 1)
    for name, value in zip(names, inputs, strict=True):
        wanted = width if is_vector(name) else tokens * width
        if value.numel() != wanted:
            raise GraphoptError(f"{name} has the shape {list(value.shape)}; the kernel reads {wanted} elements")
    if elsewhere := [each.device for each in (*inputs, *others) if each.device != x.device]:
        raise GraphoptError(f"x is on {x.device} and an operand on {elsewhere[0]}; move them to one device")


def _check_int8(plan: Int8Plan, given: Bytes, inputs: Sequence[Tensor]) -> None:
    x, zero = given.x, given.x_zero_point
    _check(x, plan, inputs, weights=given.weights, scales=given.scales, row_sums=given.row_sums)
    count = x.numel() // plan.k if plan.by_token else 1
    kind = torch.int8 if plan.signed else torch.uint8
    if x.dtype != kind or (zero is None) is plan.zero_points or (zero is not None and zero.dtype != kind):
        zeros = "with zero points like it" if plan.zero_points else "without zero points"
        raise GraphoptError(f"the kernel reads {kind} {zeros}, not {x.dtype}")
    for name, value in (("x_scale", given.x_scale), ("x_zero_point", zero)):
        if value is not None and value.numel() != count:
            raise GraphoptError(f"{name} has the shape {list(value.shape)}; the kernel reads {count} elements")
    _check_rest(x, (), (), plan.n, [each for each in (given.x_scale, zero) if each is not None])


def _check_rows(plan: RowPlan, inputs: Sequence[Tensor], signs: Tensor | None) -> None:
    _check_inner(inputs[0], plan.n)
    _check_rest(inputs[0], plan.inputs, inputs, plan.n, [] if signs is None else [signs])
    if signs is not None and (signs.dtype != torch.uint8 or not signs.is_contiguous()):
        raise GraphoptError(f"signs are {signs.dtype}, maybe in pieces; the kernel reads bytes in one")
    if (0 if signs is None else signs.numel()) != (plan.n // 8 if plan.signs else 0):
        raise GraphoptError(f"the kernel reads {plan.n // 8 if plan.signs else 'no'} bytes of signs")


# Values ----------------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor | None, inputs: Sequence[Tensor], plan: str
) -> Tensor:
    found = _as_linear(plan)
    _check(x, found, inputs, weights=weights, scales=scales, zeros=zeros)
    y: Tensor = _home(x).linear(found, x, weights, scales, zeros, inputs)
    return y


def _int8(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weights: Tensor,
    scales: Tensor,
    row_sums: Tensor | None,
    inputs: Sequence[Tensor],
    plan: str,
) -> Tensor:
    found = _as_int8(plan)
    given = Bytes(x, x_scale, x_zero_point, weights, scales, row_sums)
    _check_int8(found, given, inputs)
    y: Tensor = _home(x).int8(found, given, inputs)
    return y


def _rows(inputs: Sequence[Tensor], signs: Tensor | None, plan: str) -> list[Tensor]:
    found = _as_rows(plan)
    _check_rows(found, inputs, signs)
    made: list[Tensor] = _home(inputs[0]).rows(found, inputs, signs)
    return made


def _home(x: Tensor) -> Any:
    """Return who computes: the kernels, or torch in their place."""
    return launch if x.is_cuda else reference


for _name, _function in {"cuda_linear": _linear, "cuda_int8_linear": _int8, "cuda_rows": _rows}.items():
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _function, _key)

LINEAR = torch.ops.graphopt.cuda_linear.default
INT8_LINEAR = torch.ops.graphopt.cuda_int8_linear.default
ROWS = torch.ops.graphopt.cuda_rows.default
