"""Spelled-out GELUs, and what only looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import Example, Function, four_tests
from torch import Tensor, erf, nn, sigmoid, tanh

from graphopt.passes import Canonicalize
from graphopt.passes.canonicalize.gelu import deviation

SHAPE = (2, 5, 16)
ROOT = math.sqrt(2 / math.pi)


def _spelling(name: str, function: Callable[[Tensor], Tensor], approximate: str = "") -> Example:
    extra = f", approximate='{approximate}'" if approximate else ""
    return Example(
        name,
        lambda: Function(lambda x: function(torch.sin(x) * 3)),
        SHAPE,
        fires=1,
        rule="recognise_gelu",
        golden=f"""
        sin = sin(x)
        mul = mul(sin, 3)
        gelu = gelu(mul{extra})
        return gelu
        """,
    )


def _other(name: str, function: Callable[[Tensor], Tensor], declines: str = "") -> Example:
    return Example(name, lambda: Function(function), SHAPE, fires=0, rule="recognise_gelu", declines=declines)


def _in_float32(x: Tensor) -> Tensor:
    wide = x.float()
    return (0.5 * wide * (1 + erf(wide / math.sqrt(2)))).to(x.dtype)


def _cubed(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + tanh(ROOT * (x + 0.044715 * x * x * x)))


EXAMPLES = [
    _spelling("erf", lambda x: x * 0.5 * (1.0 + erf(x / math.sqrt(2.0)))),
    _spelling("erf_times_a_root", lambda x: 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))),
    _spelling("erf_nine_digits", lambda x: 0.5 * x * (1.0 + erf(x * 0.707106781))),
    _spelling("erf_halved_inside", lambda x: x * ((erf(x / math.sqrt(2.0)) + 1) / 2)),
    _spelling("erf_multiplied_out", lambda x: 0.5 * x + erf(x / math.sqrt(2.0)) * x * 0.5),
    _spelling("erf_root_of_a_tensor", lambda x: x * 0.5 * (1.0 + erf(x / torch.sqrt(torch.tensor(2.0))))),
    _spelling("tanh", lambda x: 0.5 * x * (1 + tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))), "tanh"),
    _spelling("tanh_cubed_by_hand", _cubed, "tanh"),
    _spelling("tanh_factored", lambda x: 0.5 * x * (1 + tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))), "tanh"),
    _spelling("sigmoid_of_twice", lambda x: x * sigmoid(2 * ROOT * (x + 0.044715 * x**3)), "tanh"),
    Example(
        "of_a_sum",
        lambda: Function(lambda x, b: (lambda y: 0.5 * y * (1 + erf(y / math.sqrt(2))))(x * 3 + b), b=torch.rand(16)),
        SHAPE,
        golden="""
        mul = mul(x, 3)
        add = add(mul, @b)
        gelu = gelu(add)
        return gelu
        """,
    ),
    Example(
        "in_float32",
        lambda: Function(_in_float32),
        lambda: (torch.randn(2, 5).to(torch.bfloat16),),
        golden="""
        _to_copy_2 = _to_copy(x, dtype=float32)
        gelu = gelu(_to_copy_2)
        _to_copy_1 = _to_copy(gelu, dtype=bfloat16)
        return _to_copy_1
        """,
    ),
    _other("sigmoid_gelu", lambda x: x * sigmoid(1.702 * x)),
    _other("silu", lambda x: x * sigmoid(x)),
    _other(
        "four_digits", lambda x: 0.5 * x * (1 + erf(x * 0.7071)), "its constants differ from those of GELU by 1e-05"
    ),
    _other(
        "float32_digits",
        lambda x: 0.5 * x * (1 + erf(x * float(torch.tensor(0.5).sqrt()))),
        "its constants differ from those of GELU by 2e-08",
    ),
    _other(
        "another_cubic",
        lambda x: 0.5 * x * (1 + tanh(ROOT * (x + 0.0447 * x**3))),
        "differ from those of GELU by 3e-04",
    ),
    _other("whole", lambda x: x * (1 + erf(x / math.sqrt(2)))),
    _other("another_factor", lambda x: 0.5 * torch.sin(x) * (1 + erf(x / math.sqrt(2)))),
    _other("minus", lambda x: 0.5 * x * (1 - erf(x / math.sqrt(2)))),
    _other("erf_alone", lambda x: erf(x / math.sqrt(2)) + x),
    _other("squared", lambda x: 0.5 * x * (1 + tanh(ROOT * (x + 0.044715 * x**2)))),
    _other("broadcast", lambda x: 0.5 * x[:, :1] * (1 + erf(x / math.sqrt(2)))),
]

test_fires, test_declines, test_means_the_same, test_is_idempotent = four_tests(Canonicalize(), EXAMPLES)


def test_intermediate_values_may_be_read_elsewhere() -> None:
    """The erf stays for its other reader, GELU is recognised all the same."""
    example = Example(
        "read",
        lambda: Function(lambda x: ((e := erf(x / math.sqrt(2))), 0.5 * x * (1 + e))),
        SHAPE,
        fires=1,
        golden="""
        div = div(x, 1.4142135623730951)
        erf = erf(div)
        gelu = gelu(x)
        return erf, gelu
        """,
    )
    fires, _, same, idempotent = four_tests(Canonicalize(), [example])
    for test in (fires, same, idempotent):
        test(example)


def test_torch_agrees_with_the_constants() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert torch.allclose(_cubed(x), nn.functional.gelu(x, approximate="tanh"), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ({(1, 0): 0.5}, {(1, 0): 0.5}, 0.0),
        ({(1, 0): 0.5, (2, 0): 0.0}, {(1, 0): 0.5}, 0.0),
        ({(1, 0): 0.5, (2, 0): 1.0}, {(1, 0): 0.5}, math.inf),
        ({(1, 0): 0.75}, {(1, 0): 0.5}, 0.5),
        (None, {(1, 0): 0.5}, math.inf),
    ],
)
def test_deviation(
    found: dict[tuple[int, int], float] | None, wanted: dict[tuple[int, int], float], expected: float
) -> None:
    assert deviation(found, wanted) == expected
