"""Spelled-out RMS norms, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Example, Function, apply, captured, four_tests, operators
from models import SpelledRMSNorm
from torch import Tensor

from graphopt.passes import Canonicalize

SHAPE = (2, 5, 16)
W = torch.rand(16) + 0.5
ONE_OPERATOR = """
rms_norm_1 = rms_norm(x, [16], @w, eps=1e-06)
return rms_norm_1
"""


def _norm(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: function(x) * w


def _spelling(name: str, function: Callable[..., Tensor]) -> Example:
    return Example(name, lambda: Function(function, w=W), SHAPE, golden=ONE_OPERATOR)


def _half_precision(x: Tensor, w: Tensor) -> Tensor:
    """As language models write it: the norm in float32, its result and the weight in the model's type."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * wide.to(x.dtype)


def _narrow_factor(x: Tensor, w: Tensor) -> Tensor:
    """Only the mean in float32."""
    return w * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _offset_weight(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


def _bf16_inputs() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),)


def _plain(function: Callable[[Tensor], Tensor], name: str, **options: object) -> Example:
    return Example(name, lambda: Function(function), SHAPE, fires=0, rule="recognise_rms_norm", **options)  # type: ignore[arg-type]


EXAMPLES = [
    _spelling("rsqrt", _norm(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))),
    _spelling("factors_swapped", _norm(lambda x: torch.rsqrt(1e-6 + (x * x).mean(2, keepdim=True)) * x)),
    _spelling("divided", _norm(lambda x: x / torch.sqrt(torch.square(x).mean(-1, keepdim=True) + 1e-6))),
    _spelling("reciprocal", _norm(lambda x: x * torch.reciprocal(torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)))),
    _spelling("powers", _norm(lambda x: x * ((x**2).mean(-1, keepdim=True) + 1e-6) ** -0.5)),
    _spelling("divided_by_a_power", _norm(lambda x: x / ((x**2).mean(-1, keepdim=True) + 1e-6) ** 0.5)),
    Example(
        "eps_in_a_buffer",
        lambda: Function(
            lambda x, w, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * w,
            w=W,
            buffer_e=torch.tensor(1e-6, dtype=torch.float64),
        ),
        SHAPE,
        golden=ONE_OPERATOR,
    ),
    Example("without_weight", lambda: SpelledRMSNorm(16), SHAPE, fires=1, rule="recognise_rms_norm"),
    Example(
        "half_precision",
        lambda: Function(_half_precision, w=W.to(torch.bfloat16)),
        _bf16_inputs,
        golden="""
        rms_norm_2 = rms_norm(x, [16], @w, eps=1e-06)
        return rms_norm_2
        """,
    ),
    Example(
        "narrow_factor",
        lambda: Function(_narrow_factor, w=W.to(torch.bfloat16)),
        _bf16_inputs,
        golden="""
        rms_norm_2 = rms_norm(x, [16], @w, eps=1e-06)
        return rms_norm_2
        """,
    ),
    Example(
        "offset_weight",
        lambda: Function(_offset_weight, w=W),
        SHAPE,
        golden=ONE_OPERATOR,
    ),
    Example(
        "weight_of_another_type",
        lambda: Function(
            lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w, w=W.to(torch.bfloat16)
        ),
        SHAPE,
        fires=0,
        rule="take_weight",
        declines="are of different types",
    ),
    Example(
        "read_before_the_weight",
        lambda: Function(lambda x, w: ((y := x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)) * w, y), w=W),
        SHAPE,
        fires=0,
        rule="take_weight",
        declines="rms_norm is read by 2 nodes (mul_2, output)",
    ),
    Example(
        "weight_for_each_row",
        lambda: Function(lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w, w=torch.rand(5, 16)),
        SHAPE,
        fires=0,
        rule="take_weight",
    ),
    _plain(lambda x: x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-6), "another_axis"),
    _plain(lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6), "a_sum"),
    _plain(lambda x: x * torch.rsqrt((x * torch.sin(x)).mean(-1, keepdim=True) + 1e-6), "no_square"),
    _plain(lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6), "fourth_power"),
    _plain(lambda x: torch.sin(x) * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6), "another_factor"),
    _plain(lambda x: x * torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6), "root_in_the_numerator"),
    _plain(lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6), "centred"),
    Example(
        "no_fixed_width",
        lambda: Function(
            lambda x: x.transpose(0, 2) * torch.rsqrt((x * x).transpose(0, 2).mean(-1, keepdim=True) + 1e-6)
        ),
        SHAPE,
        fires=0,
        rule="recognise_rms_norm",
    ),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)


def test_declines_a_width_that_may_change() -> None:
    def norm(x: Tensor) -> Tensor:
        y = x.transpose(0, 2)
        return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)

    example = Example("symbolic", lambda: Function(norm), SHAPE)
    after, changes = apply(Canonicalize(), captured(example, symbolic=True))
    assert "rms_norm" not in operators(after)
    assert [site.reason for site in changes.skipped] == ["the last axis of transpose has no fixed size"]


def test_half_precision_is_as_good() -> None:
    """In the model's own types, not only over the reals: rms_norm rounds once less than the spelling."""
    example = next(example for example in EXAMPLES if example.name == "half_precision")
    program = captured(example)
    after, _ = apply(Canonicalize(), program)
    (new,), (old,) = after.run(program.flat_example), program.run(program.flat_example)
    assert new.dtype == old.dtype == torch.bfloat16
    # 8 bits of mantissa: a step is at most 2**-7 of the value.
    assert torch.allclose(new.double(), old.double(), rtol=2**-7, atol=0)
