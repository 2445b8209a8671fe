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

import torch
from torch import Tensor

from graphopt.backends.cuda import reference
from graphopt.backends.cuda.plan import Int8Plan, LinearPlan, Plan, RowPlan, read_plan
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


# Values ----------------------------------------------------------------------------------------------------------


def _linear_on_cpu(
    x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor | None, inputs: Sequence[Tensor], plan: str
) -> Tensor:
    found = _as_linear(plan)
    _check_inner(x, found.k)
    return reference.linear(found, x, weights, scales, zeros, inputs).contiguous()


def _int8_on_cpu(
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
    return reference.int8(found, x, x_scale, x_zero_point, weights, scales, inputs).contiguous()


def _rows_on_cpu(inputs: Sequence[Tensor], signs: Tensor | None, plan: str) -> list[Tensor]:
    found = _as_rows(plan)
    _check_inner(inputs[0], found.n)
    return [each.contiguous() for each in reference.rows(found, inputs, signs)]


def _linear_on_gpu(
    x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor | None, inputs: Sequence[Tensor], plan: str
) -> Tensor:
    from graphopt.backends.cuda.launch import linear

    return linear(_as_linear(plan), x, weights, scales, zeros, inputs)


def _int8_on_gpu(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weights: Tensor,
    scales: Tensor,
    row_sums: Tensor | None,
    inputs: Sequence[Tensor],
    plan: str,
) -> Tensor:
    from graphopt.backends.cuda.launch import int8

    return int8(_as_int8(plan), x, x_scale, x_zero_point, weights, scales, row_sums, inputs)


def _rows_on_gpu(inputs: Sequence[Tensor], signs: Tensor | None, plan: str) -> list[Tensor]:
    from graphopt.backends.cuda.launch import rows

    return rows(_as_rows(plan), inputs, signs)


for _name, _cpu, _gpu in (
    ("cuda_linear", _linear_on_cpu, _linear_on_gpu),
    ("cuda_int8_linear", _int8_on_cpu, _int8_on_gpu),
    ("cuda_rows", _rows_on_cpu, _rows_on_gpu),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _gpu, "CUDA")

LINEAR = torch.ops.graphopt.cuda_linear.default
INT8_LINEAR = torch.ops.graphopt.cuda_int8_linear.default
ROWS = torch.ops.graphopt.cuda_rows.default
