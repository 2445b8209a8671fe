"""What each PTX instruction computes on arrays, one element a thread; registers hold bits as unsigned integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.cuda import arithmetic
from graphopt.backends.cuda.arithmetic import Float16

Bits = NDArray[Any]
Function = Callable[..., Bits]

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def size_of(kind: str) -> int:
    """Return the bytes of a type: `b32`, `f16x2`."""
    return int(kind.lstrip("bufs").removeprefix("bf").split("x")[0]) // 8 * (2 if kind.endswith("x2") else 1)


def unsigned(kind: str) -> Any:
    return np.bool_ if kind == "pred" else _UNSIGNED[size_of(kind)]


def as_typed(bits: Bits, kind: str) -> Bits:
    """Return bits as the values of a type, reading no more of them than it has."""
    raw = np.asarray(bits)
    if kind == "pred":
        return raw
    if raw.dtype != unsigned(kind):
        raw = raw.astype(unsigned(kind))
    if kind[0] == "s":
        return raw.view(_SIGNED[size_of(kind)])
    if kind == "f32":
        return raw.view(np.float32)
    if kind == "f64":
        return raw.view(np.float64)
    return raw


def as_bits(values: Any) -> Bits:
    """Return values as the bits of their type."""
    array = np.asarray(values)
    return array if array.dtype == np.bool_ else array.view(_UNSIGNED[array.dtype.itemsize])


def function(op: tuple[str, ...]) -> Function:
    """Return what `op` computes from the bits of its sources; KeyError for what is not known."""
    name, kind = op[0], op[-1]
    if name in _WIDE and "wide" in op:
        return _widening(name, kind)
    if name == "mul" and "hi" in op:
        wide, shift = _widening(name, kind), 8 * size_of(kind)
        return lambda a, b: np.asarray((wide(a, b) >> shift).astype(unsigned(kind)))
    if name == "cvt":
        return _conversion(op)
    if name == "setp":
        return _comparison(op[1], kind)
    if name in ("shl", "shr"):
        return _shift(name, kind)
    if name == "selp":
        return lambda a, b, p: np.asarray(np.where(p, a, b))
    if kind in ("f16x2", "bf16x2"):
        return _pairs(name, "float16" if kind == "f16x2" else "bfloat16")
    if kind == "f32":
        return _checked_float(name, op)
    if name == "lop3":
        return lambda a, b, c, table: _lop3(a, b, c, int(np.ravel(table)[0]))
    if name == "prmt":
        return _prmt
    if name in ("bfe", "bfi"):
        return _BIT_FIELDS[name, kind[0]]
    if name == "shf":
        return _FUNNELS[op[1], op[2]]
    integer = _INTEGERS[name]

    def compute(*sources: Bits) -> Bits:
        with np.errstate(all="ignore"):
            return as_bits(integer(*(as_typed(each, kind) for each in sources)))

    return compute


_WIDE = ("mul", "mad")


def _widening(name: str, kind: str) -> Function:
    wide: Any = (
        (np.int64 if size_of(kind) == 4 else np.int32)
        if kind[0] == "s"
        else (np.uint64 if size_of(kind) == 4 else np.uint32)
    )

    def compute(a: Bits, b: Bits, c: Bits | None = None) -> Bits:
        product: Bits = as_typed(a, kind).astype(wide) * as_typed(b, kind).astype(wide)
        return as_bits(product if c is None else as_bits(product) + c.astype(_UNSIGNED[np.dtype(wide).itemsize]))

    return compute


def _truncated_division(a: Bits, b: Bits) -> Bits:
    if not np.issubdtype(a.dtype, np.signedinteger):
        return np.asarray(a // b)
    wide = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.asarray((wide * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype))


_INTEGERS: dict[str, Function] = {
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,  # lo
    "mad": lambda a, b, c: a * b + c,  # lo
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": lambda a: np.abs(a),
    "min": lambda a, b: np.minimum(a, b),
    "max": lambda a, b: np.maximum(a, b),
    "div": _truncated_division,
    "rem": lambda a, b: a - _truncated_division(a, b) * b,
}


def _checked_float(name: str, op: tuple[str, ...]) -> Function:
    if set(op[1:-1]) - {"rn"}:
        raise KeyError(op)  # approximations, flushed denormals and other roundings have no meaning here
    compute = _FLOATS[name]
    return lambda *sources: as_bits(compute(*(as_typed(each, "f32") for each in sources)))


def _least(a: Bits, b: Bits) -> Bits:
    return np.fmin(a, b)


_FLOATS: dict[str, Function] = {
    "mov": lambda a: a,
    "add": arithmetic.add,
    "sub": arithmetic.sub,
    "mul": arithmetic.mul,
    "fma": arithmetic.fma,
    "div": arithmetic.div,
    "rcp": lambda a: arithmetic.div(np.float32(1), a),
    "sqrt": arithmetic.sqrt,
    "neg": arithmetic.neg,
    "abs": arithmetic.absolute,
    "min": lambda a, b: np.fmin(a, b),
    "max": lambda a, b: np.fmax(a, b),
}


def _half(words: Bits, shift: int) -> NDArray[np.uint16]:
    return (words >> np.uint32(shift)).astype(np.uint16)


def _pairs(name: str, dtype: Float16) -> Function:
    def fma(a: Bits, b: Bits, c: Bits) -> Bits:
        low, high = (
            arithmetic.fma16(_half(a, shift), _half(b, shift), _half(c, shift), dtype).astype(np.uint32)
            for shift in (0, 16)
        )
        return np.asarray(low | high << np.uint32(16))

    return {"fma": fma}[name]


_COMPARISONS: dict[str, Function] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
    "neu": lambda a, b: a != b,
    "equ": lambda a, b: (a == b) | (a != a) | (b != b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: (a != a) | (b != b),
    "num": lambda a, b: (a == a) & (b == b),
}


def _comparison(how: str, kind: str) -> Function:
    compute = _COMPARISONS[how]

    def compared(a: Bits, b: Bits) -> Bits:
        with np.errstate(all="ignore"):
            return np.asarray(compute(as_typed(a, kind), as_typed(b, kind)))

    return compared


def _shift(name: str, kind: str) -> Function:
    """Amounts beyond the width count as the width."""
    width = 8 * size_of(kind)

    def shifted(a: Bits, amount: Bits) -> Bits:
        by = np.minimum(np.asarray(amount).astype(np.uint64), width)
        inside = np.minimum(by, width - 1).astype(unsigned(kind))
        value = as_typed(a, kind)
        if name == "shr" and kind[0] == "s":
            return as_bits(value >> inside.view(value.dtype))
        moved = value << inside if name == "shl" else value >> inside
        return np.asarray(np.where(by >= width, 0, moved).astype(unsigned(kind)))

    return shifted


def _conversion(op: tuple[str, ...]) -> Function:
    target, source = op[-2], op[-1]
    narrows = target in ("f16", "bf16", "f16x2", "bf16x2") or (target == "f32" and source[0] in "su")
    if set(op[1:-2]) - ({"rn"} if narrows else {"rni"} if source == "f32" else set()):
        raise KeyError(op)  # another rounding, saturation, …
    if target in ("f16x2", "bf16x2"):
        dtype: Float16 = "float16" if target == "f16x2" else "bfloat16"

        def both(high: Bits, low: Bits) -> Bits:
            parts = [arithmetic.narrowed(as_typed(each, "f32"), dtype).astype(np.uint32) for each in (low, high)]
            return np.asarray(parts[0] | parts[1] << np.uint32(16))

        return both
    if (target, source) in (("f16", "f32"), ("bf16", "f32")):
        return lambda a: arithmetic.narrowed(as_typed(a, "f32"), "float16" if target == "f16" else "bfloat16")
    if (target, source) in (("f32", "f16"), ("f32", "bf16")):
        return lambda a: as_bits(arithmetic.widened(a, "float16" if source == "f16" else "bfloat16"))
    if target in ("s32", "s8") and source == "f32" and "rni" in op:
        low, high = (-128, 127) if target == "s8" else (-(2**31), 2**31 - 1)
        return lambda a: as_bits(arithmetic.to_int(as_typed(a, "f32")).clip(low, high))
    if target == "f32":
        return lambda a: as_bits(as_typed(a, source).astype(np.float32))
    whole = {"u": _UNSIGNED, "s": _SIGNED, "b": _UNSIGNED}[target[0]][size_of(target)]
    if source[0] == "f":
        raise KeyError(op)
    return lambda a: as_bits(as_typed(a, source).astype(whole))


def _lop3(a: Bits, b: Bits, c: Bits, table: int) -> Bits:
    result = np.zeros_like(np.asarray(a) | np.asarray(b) | np.asarray(c))
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return np.asarray(result)


def _prmt(low: Bits, high: Bits, selector: Bits) -> Bits:
    both = np.asarray(low).astype(np.uint64) | np.asarray(high).astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(np.shape(low), np.shape(high), np.shape(selector)), np.uint64)
    for i in range(4):
        digit = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(digit & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _extract(a: Bits, start: Bits, count: Bits) -> Bits:
    mask = (np.uint64(1) << np.asarray(count).astype(np.uint64)) - np.uint64(1)
    return np.asarray((np.asarray(a).astype(np.uint64) >> np.asarray(start).astype(np.uint64) & mask).astype(np.uint32))


def _extract_signed(a: Bits, start: Bits, count: Bits) -> Bits:
    wide = _extract(a, start, count).astype(np.int64)
    top = np.int64(1) << (np.asarray(count).astype(np.int64) - 1)
    return as_bits(((wide ^ top) - top).astype(np.int32))


def _insert(a: Bits, b: Bits, start: Bits, count: Bits) -> Bits:
    mask = (
        ((np.uint64(1) << np.asarray(count).astype(np.uint64)) - np.uint64(1)) << np.asarray(start).astype(np.uint64)
    ).astype(np.uint32)
    moved = (np.asarray(a).astype(np.uint64) << np.asarray(start).astype(np.uint64)).astype(np.uint32)
    return np.asarray((moved & mask) | (b & ~mask))


_BIT_FIELDS: dict[tuple[str, str], Function] = {
    ("bfe", "u"): _extract,
    ("bfe", "s"): _extract_signed,
    ("bfi", "b"): _insert,
}


def _funnel(left: bool) -> Function:
    def shifted(low: Bits, high: Bits, amount: Bits) -> Bits:
        both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
        by = np.asarray(amount).astype(np.uint64) & np.uint64(31)
        moved = (both << by) >> np.uint64(32) if left else both >> by
        return np.asarray(moved.astype(np.uint32))

    return shifted


_FUNNELS: dict[tuple[str, str], Function] = {("l", "wrap"): _funnel(True), ("r", "wrap"): _funnel(False)}
