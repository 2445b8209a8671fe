"""Float arithmetic with one rounding an operation, in numpy, for the specification and the PTX interpreter.

Halves and bfloat16s are kept as their bits, uint16; float32 as float32. The functions of `dialect/functions.h` stand
here a second time, operation by operation, so that their bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float16 = Literal["float16", "bfloat16"]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U16 = NDArray[np.uint16]
_ONE = np.float32(1)


def widened(bits: NDArray[Any], dtype: Float16) -> F32:
    """Return the values of halves or bfloat16s given as bits."""
    whole = np.asarray(bits).astype(np.uint16)
    if dtype == "float16":
        return whole.view(np.float16).astype(np.float32)
    return (whole.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x: NDArray[Any], dtype: Float16) -> U16:
    """Return float32 or float64 values rounded to halves or bfloat16s, as bits; NaN is 0x7fff."""
    wide = np.asarray(x)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "float16":
            bits = wide.astype(np.float16).view(np.uint16)
        else:
            bits = _bfloat16(wide)
    return np.where(np.isnan(wide), np.uint16(0x7FFF), bits)


def _bfloat16(x: NDArray[Any]) -> U16:
    single = x.astype(np.float32) if x.dtype == np.float32 else odd_float32(x.astype(np.float64), np.zeros(x.shape))
    bits = single.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def odd_float32(value: F64, rest: F64) -> F32:
    """Return value + rest, which float64 does not hold, cut to float32 so that a later rounding cannot go wrong.

    What is lost sets the last bit ("When double rounding is odd", S. Boldo and G. Melquiond).
    """
    cut = value.astype(np.float32)
    lost = np.sign(value - cut.astype(np.float64) + rest)
    # Towards zero first, then the last bit up where anything was lost.
    away = (lost * np.sign(cut) < 0) & np.isfinite(cut) & (cut != 0)
    bits = cut.view(np.uint32) - away.astype(np.uint32)
    inexact = (lost != 0) & np.isfinite(value)
    return np.where(inexact, bits | np.uint32(1), cut.view(np.uint32)).astype(np.uint32).view(np.float32)


def fma(a: Any, b: Any, c: Any) -> F32:
    """Return a·b + c of float32 with one rounding."""
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # exact: 48 bits
        c = np.asarray(c, np.float64)
        total = product + c
        rest = _lost(product, c, total)
        # Rounded to odd in float64, the second rounding cannot tell that there was a first.
        bits = total.view(np.int64)
        towards = np.where((rest > 0) == (total > 0), 1, -1)
        nudge = (rest != 0) & (bits & 1 == 0) & np.isfinite(total)
        return np.asarray((bits + np.where(nudge, towards, 0)).view(np.float64).astype(np.float32))


def _lost(a: F64, b: F64, total: F64) -> F64:
    """Return a + b - total exactly (D. Knuth's two-sum); 0 where it is no number."""
    part = total - a
    rest = (a - (total - part)) + (b - part)
    return np.where(np.isfinite(rest), rest, 0.0)


def fma16(a: U16, b: U16, c: U16, dtype: Float16) -> U16:
    """Return a·b + c of halves or bfloat16s with one rounding."""
    with np.errstate(all="ignore"):
        wide = [widened(each, dtype).astype(np.float64) for each in (a, b, c)]
        return narrowed(wide[0] * wide[1] + wide[2], dtype)


def add(a: Any, b: Any) -> F32:
    with np.errstate(all="ignore"):
        return np.asarray(np.float32(a) + np.float32(b))


def sub(a: Any, b: Any) -> F32:
    with np.errstate(all="ignore"):
        return np.asarray(np.float32(a) - np.float32(b))


def mul(a: Any, b: Any) -> F32:
    with np.errstate(all="ignore"):
        return np.asarray(np.float32(a) * np.float32(b))


def div(a: Any, b: Any) -> F32:
    with np.errstate(all="ignore"):
        return np.asarray(np.float32(a) / np.float32(b))


def sqrt(a: Any) -> F32:
    with np.errstate(all="ignore"):
        return np.asarray(np.sqrt(np.float32(a)))


def to_int(a: Any) -> NDArray[np.int32]:
    """Return the nearest whole numbers, of two the even one; NaN gives 0 and what is too large an end."""
    with np.errstate(all="ignore"):
        wide = np.rint(np.asarray(a, np.float32).astype(np.float64))
        return np.asarray(np.where(np.isnan(wide), 0, np.clip(wide, -(2.0**31), 2.0**31 - 1)).astype(np.int32))


# The functions of functions.h -----------------------------------------------------------------------------------------


def neg(a: Any) -> F32:
    return -np.asarray(a, np.float32)


def absolute(a: Any) -> F32:
    return np.abs(np.asarray(a, np.float32))


def maximum(a: Any, b: Any) -> F32:
    a, b = np.float32(a), np.float32(b)
    return np.asarray(np.where((a > b) | np.isnan(a), a, b))


def minimum(a: Any, b: Any) -> F32:
    a, b = np.float32(a), np.float32(b)
    return np.asarray(np.where((a < b) | np.isnan(a), a, b))


def div_by(a: Any, b: Any, inverse: Any) -> F32:
    q = mul(a, inverse)
    return fma(fma(neg(q), b, a), inverse, q)


def _chain(first: Any, x: Any, *rest: float) -> F32:
    """Return a polynomial by Horner's rule, one fused operation a coefficient."""
    value = np.asarray(first, np.float32)
    for each in rest:
        value = fma(value, x, np.float32(each))
    return value


def exp(x: Any) -> F32:
    x = np.float32(x)
    x = np.where(x < np.float32(-87.3), np.float32(-87.3), np.where(x > np.float32(88.0), np.float32(88.0), x))
    shifted = fma(x, np.float32(1.44269502), np.float32(12582912.0))
    n = sub(shifted, np.float32(12582912.0))
    r = fma(n, np.float32(2.12194440e-4), fma(n, np.float32(-0.693359375), x))
    coefficients = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    p = _chain(np.float32(1.9875691500e-4), r, *coefficients)
    p = add(fma(p, mul(r, r), r), _ONE)
    power = (shifted.view(np.uint32) - np.uint32(0x4B400000) + np.uint32(127)) << np.uint32(23)
    return mul(p, power.view(np.float32))


def sigmoid(x: Any) -> F32:
    return div(_ONE, add(_ONE, exp(neg(x))))


def silu(x: Any) -> F32:
    return div(x, add(_ONE, exp(neg(x))))


def tanh(x: Any) -> F32:
    x = np.asarray(x, np.float32)
    s = mul(x, x)
    p = _chain(np.float32(2.1869489e-2), s, -5.3968254e-2, 1.3333333e-1, -3.3333333e-1, 1.0)
    far = fma(np.float32(2), sigmoid(mul(np.float32(2), x)), np.float32(-1))
    return np.asarray(np.where(s < np.float32(0.09), mul(x, p), far))


def relu(x: Any) -> F32:
    x = np.asarray(x, np.float32)
    return np.asarray(np.where(x < 0, np.float32(0), x))


def erf(x: Any) -> F32:
    x = np.asarray(x, np.float32)
    z = absolute(x)
    t = div(_ONE, fma(np.float32(0.5), z, _ONE))
    coefficients = (-0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368)
    p = _chain(np.float32(0.17087277), t, *coefficients, -1.26551223)
    tail = mul(t, exp(fma(neg(z), z, p)))
    return np.asarray(np.where(x < 0, sub(tail, _ONE), sub(_ONE, tail)))


def gelu(x: Any) -> F32:
    return mul(mul(np.float32(0.5), x), add(_ONE, erf(mul(x, np.float32(0.707106769)))))


def gelu_tanh(x: Any) -> F32:
    cube = mul(mul(x, x), x)
    inner = mul(np.float32(0.797884583), fma(np.float32(0.044715), cube, x))
    return mul(mul(np.float32(0.5), x), add(_ONE, tanh(inner)))


FUNCTIONS: dict[str, Callable[..., F32]] = {
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": div,
    "fma": fma,
    "sqrt": sqrt,
    "neg": neg,
    "abs": absolute,
    "max": maximum,
    "min": minimum,
    "exp": exp,
    "sigmoid": sigmoid,
    "silu": silu,
    "tanh": tanh,
    "relu": relu,
    "erf": erf,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
"""What the dialect computes on floats, by the name without `go_`."""


# Matrix products ------------------------------------------------------------------------------------------------------


def mma16(acc: F32, a: F32, b: F32) -> F32:
    """Return acc + the sum over the last axis, of 16, of a·b, as the ideal tensor core: in float64, rounded once.

    a and b are the values of halves or bfloat16s; the products are added one after the other.
    """
    with np.errstate(all="ignore"):
        total = acc.astype(np.float64)
        for i in range(16):
            total = total + a[..., i].astype(np.float64) * b[..., i].astype(np.float64)
        return np.asarray(total.astype(np.float32))
