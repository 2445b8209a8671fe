"""One rounding an operation: held against exact fractions and against torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.backends.cuda import arithmetic

_SINGLES = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


def _nearest(exact: Fraction) -> np.float32:
    """Return the float32 nearest to a fraction, of two the even one."""
    guess = np.float32(float(exact))  # at most one step off
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda each: (abs(Fraction(float(each)) - exact), int(each.view(np.uint32)) & 1))


@given(_SINGLES, _SINGLES, _SINGLES)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = arithmetic.fma(np.float32(a), np.float32(b), np.float32(c))
    assert abs(exact) < Fraction(2) ** -120 or got == _nearest(exact)


def test_fma_where_two_roundings_would_be_wrong() -> None:
    # 1 + 2^-24 lies half way between two numbers; 2^-60 more decides, which float64 does not hold.
    a, c = np.float32(2.0**-12), np.float32(1)
    tie = arithmetic.fma(a, np.float32(2.0**-12), c)
    above = arithmetic.fma(np.float32(2.0**-12 * (1 + 2.0**-23)), np.float32(2.0**-12 * (1 + 2.0**-23)), c)
    assert tie == 1 and above > 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_torchs(dtype: Any) -> None:
    kind = getattr(torch, dtype)
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(kind).float().numpy()
    finite = np.isfinite(values)
    assert np.array_equal(arithmetic.widened(bits, dtype)[finite], values[finite])
    random = np.random.default_rng(0)
    x = (random.normal(size=100_000) * 10.0 ** random.integers(-9, 6, 100_000)).astype(np.float32)
    between = (values[finite][:-1].astype(np.float64) + values[finite][1:]) / 2  # ties
    x = np.concatenate([x, between[np.abs(between) < 1e30].astype(np.float32)])
    wanted = torch.from_numpy(x).to(kind).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(arithmetic.narrowed(x, dtype), wanted)
    assert arithmetic.narrowed(np.float32([np.nan]), dtype)[0] == 0x7FFF


def test_bfloat16_of_a_double_rounds_once() -> None:
    # A little above the middle of 1 and 1 + 2^-7: by way of float32 it would be the middle, and go down.
    assert (
        arithmetic.widened(arithmetic.narrowed(np.array([1 + 2.0**-8 + 2.0**-40]), "bfloat16"), "bfloat16")
        == 1 + 2.0**-7
    )


_X = np.linspace(-12, 12, 48_001).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "wanted", "bound"),
    [
        ("exp", torch.exp, 2e-7),
        ("sigmoid", torch.sigmoid, 3e-7),
        ("silu", torch.nn.functional.silu, 3e-7),
        ("tanh", torch.tanh, 2e-6),
        ("erf", torch.erf, 4e-4),  # near zero; 2e-7 of 1
        ("relu", torch.relu, 0.0),
    ],
)
def test_functions_are_close_relatively(name: str, wanted: Any, bound: float) -> None:
    got = arithmetic.FUNCTIONS[name](_X).astype(np.float64)
    exact = wanted(torch.from_numpy(_X).double()).numpy()
    assert (np.abs(got - exact) <= bound * np.abs(exact) + 1e-37).all()


@pytest.mark.parametrize(("name", "how"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_is_close(name: str, how: str) -> None:
    got = arithmetic.FUNCTIONS[name](_X).astype(np.float64)
    exact = torch.nn.functional.gelu(torch.from_numpy(_X).double(), approximate=how).numpy()
    assert np.abs(got - exact).max() < 1e-6


def test_functions_pass_nan_on_and_have_ends() -> None:
    odd = np.float32([np.nan, np.inf, -np.inf, 1e30, -1e30])
    for name in ("exp", "sigmoid", "silu", "tanh", "relu", "erf", "gelu", "gelu_tanh"):
        got = arithmetic.FUNCTIONS[name](odd)
        assert np.isnan(got[0]), name
    assert np.isnan(arithmetic.maximum(1.0, np.nan)) and np.isnan(arithmetic.minimum(np.nan, 1.0))
    assert np.array_equal(arithmetic.sigmoid(odd[1:]) > 0.5, [True, False, True, False])


@given(st.floats(2.0**-10, 2.0**10, width=32), st.floats(-(2.0**16), 2.0**16, width=32))
def test_division_by_an_inverse_is_division(b: float, a: float) -> None:
    inverse = arithmetic.div(np.float32(1), np.float32(b))
    got, wanted = arithmetic.div_by(np.float32(a), np.float32(b), inverse), np.float32(a) / np.float32(b)
    assert got == wanted or abs(wanted) < 1e-30


def test_the_ideal_product_rounds_once() -> None:
    a = np.zeros((1, 16), np.float32)
    a[0, :3] = 2048, 1, -2048
    # In float32, one after the other: 2^24 + 1 is 2^24.
    got = arithmetic.mma16(np.float32([2.0**24]), a, np.ones((1, 16), np.float32))
    assert got[0] == 2.0**24 and arithmetic.mma16(np.float32([0]), a, np.ones((1, 16), np.float32))[0] == 1
