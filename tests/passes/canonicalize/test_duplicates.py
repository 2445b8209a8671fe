"""Each thing is computed once."""

from __future__ import annotations

import torch
from harness import Example, Function, apply, captured, four_tests, operators
from torch import Tensor

from graphopt.passes import Canonicalize

SHAPE = (2, 4, 6)


def _chains(x: Tensor) -> Tensor:
    return torch.sin(x * 2).cos() + torch.sin(x * 2).cos() * torch.sin(x * 2)


def _numbers(x: Tensor) -> Tensor:
    """Equal in Python, not in their effect: an integer stays one, a float promotes."""
    count = (x > 0).to(torch.int64)
    return (count * 2).float() + (count * 2.0) + (count * 3)  # type: ignore[no-any-return]


EXAMPLES = [
    Example(
        "chains",
        lambda: Function(_chains),
        SHAPE,
        fires=5,
        rule="share_duplicates",
        golden="""
        mul = mul(x, 2)
        sin = sin(mul)
        cos = cos(sin)
        mul_3 = mul(cos, sin)
        add = add(cos, mul_3)
        return add
        """,
    ),
    Example("numbers_of_other_types", lambda: Function(_numbers), SHAPE, fires=0, rule="share_duplicates"),
    Example(
        "other_sign_of_zero",
        lambda: Function(lambda x: torch.atan2(x, torch.full((6,), 0.0)) + torch.atan2(x, torch.full((6,), -0.0))),
        SHAPE,
        fires=0,
        rule="share_duplicates",
    ),
    Example(
        "parts_of_a_split",
        lambda: Function(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1]),
        SHAPE,
        golden="""
        split = split(x, 2, dim=1)
        getitem = getitem(split, 0)
        getitem_3 = getitem(split, 1)
        mul = mul(getitem, getitem_3)
        return mul
        """,
    ),
]

test_fires, _, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)


def test_random_numbers_are_not_shared() -> None:
    example = Example(
        "bernoulli", lambda: Function(lambda x: torch.bernoulli(x) + torch.bernoulli(x)), lambda: (torch.rand(2, 3),)
    )
    after, _ = apply(Canonicalize(), captured(example))
    assert operators(after).count("bernoulli") == 2
