"""Hadamard matrices, random rotations made of them, and multiplying by one without ever holding it.

    Q = diag(signs) · (H_m/√m ⊗ small)        block = m·k, small: [k, k] orthogonal, in blocks along the axis if shorter

H_m is a Kronecker product of kernels: 2 x 2, and of higher order where none is known that is smaller: Paley's from the
squares of GF(q), q = p^e (R. E. A. C. Paley, "On orthogonal matrices", 1933), orders q + 1 for q = 3 mod 4 and
2(q + 1) for q = 1 mod 4. That leaves out 92, 116, 156, 172, 184 and 188 up to 200, which take searches or tables.

Multiplying by a Kronecker product factor by factor costs the sum of the orders, not their product: n·log2 n with
2 x 2 factors. Processors are quicker with fewer and larger ones, so `stages` joins them into matrices of order ~√n:
128 rows of 4096 take 1.3 ms on one core, by 2 x 2 butterflies 9.5 ms, by the whole matrix 53 ms.

Which matrix stands for which order is part of the operator's meaning: weights were multiplied by it. Never change it.
Construction is in numpy, which no tracing mode of torch intercepts.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Kernels = tuple[int, ...]
# What it costs to read and write an element once more, in multiply-accumulates: with less, 128 would be split, which
# is slower than one product; with more, 256 would not, which is faster split.
_STAGE_MACS = 128


def hadamard(order: int) -> Tensor | None:
    """Return a Hadamard matrix [order, order] of ±1 with H Hᵀ = order·I in float64; None where none is known here."""
    found = kernels(order)
    return None if found is None else torch.tensor(_product(found), dtype=torch.float64)


def factors(size: int) -> tuple[int, int]:
    """Return (m, k) with m·k = size and m the largest order that `hadamard` knows; k is odd.

    ValueError where size is not positive.
    """
    if size < 1:
        raise ValueError(f"a rotation needs a positive size, not {size}")
    # Twice a known order is a known order, so what remains cannot be even.
    return next((m, size // m) for m in reversed(_divisors(size)) if kernels(m) is not None)


@functools.cache
def kernels(order: int) -> Kernels | None:
    """Return the orders, ascending, whose kernels have H_order as Kronecker product, with the least sum; or None."""
    if order == 1:
        return ()
    if order < 1 or (order > 2 and order % 4):
        return None
    found = []
    for first in _divisors(order):
        rest = kernels(order // first) if first > 1 and (first == 2 or _paley(first)) else None
        if rest is not None:
            found.append(tuple(sorted((first, *rest))))
    return min(found, key=lambda each: (sum(each), each), default=None)


def stages(order: int, k: int = 1) -> tuple[Kernels, ...]:
    """Return the kernels of H_order in consecutive groups, each of which multiplies as one dense matrix.

    The last group takes the factor [k, k] along. The groups are those with the least multiply-accumulates, passes over
    the data included. ValueError where no such Hadamard matrix is known.
    """
    found = kernels(order)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    # best[i]: the cheapest way to group all but the first i kernels.
    best: dict[int, tuple[int, tuple[Kernels, ...]]] = {len(found): (k + _STAGE_MACS, ((),))}
    for start in reversed(range(len(found))):
        options: list[tuple[int, tuple[Kernels, ...]]] = [
            (math.prod(found[start:]) * k + _STAGE_MACS, (found[start:],))
        ]
        for end in range(start + 1, len(found) + (k > 1)):
            cost, groups = best[end]
            options.append((math.prod(found[start:end]) + _STAGE_MACS + cost, (found[start:end], *groups)))
        best[start] = min(options)
    return best[0][1]


@functools.lru_cache(maxsize=64)
def stage_matrix(group: Kernels) -> NDArray[np.float64]:
    """Return the orthogonal matrix [n, n] of one stage: its kernels' Kronecker product over √n, read-only."""
    matrix = _product(group) / math.sqrt(math.prod(group))
    matrix.setflags(write=False)
    return matrix


# Multiplying ----------------------------------------------------------------------------------------------------------


def split(x: Tensor, small: Tensor | None, signs: Tensor | None, block: int) -> tuple[int, int, int]:
    """Return (block, m, k) for the operator's arguments; ValueError where they do not fit one another.

    A symbolic size of the last axis is taken at its word, but must not be what says the block.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"hadamard takes a floating-point tensor with an axis, not {x.dtype} of shape {list(x.shape)}")
    size: Any = x.shape[-1]
    block = block or size
    if not isinstance(block, int):
        raise ValueError(f"the last axis of x has the symbolic size {block}; say in which blocks it is transformed")
    if block < 1 or (isinstance(size, int) and size % block):
        raise ValueError(f"blocks of {block} do not divide the last axis of x, of size {size}")
    shape: list[Any] = [1, 1] if small is None else list(small.shape)
    k = shape[0] if shape else 0
    if not isinstance(k, int) or shape != [k, k] or k == 0 or block % k:
        raise ValueError(
            f"small has shape {shape}; it must be square, of a constant size that divides the block, {block}"
        )
    if kernels(block // k) is None:
        m, fits = factors(block)
        raise ValueError(
            f"no Hadamard matrix of order {block // k} is known here; a block of {block} takes a small matrix "
            f"[{fits}, {fits}] beside the Hadamard matrix of order {m}"
        )
    if signs is not None and (signs.dim() != 1 or all(_differ(signs.shape[0], length) for length in (block, size))):
        raise ValueError(
            f"signs has shape {list(signs.shape)}; give one a coordinate, [{size}], or of a block, [{block}]"
        )
    return block, block // k, k


def _differ(a: Any, b: Any) -> bool:
    """Compare no symbolic size: that would make it a constant."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def transform(
    x: Tensor, small: Tensor | None = None, signs: Tensor | None = None, block: int = 0, transpose: bool = False
) -> Tensor:
    """Return x [..., n] times Q, or Qᵀ, in blocks along the last axis: what `graphopt::hadamard` computes, in ATen.

    Computed in float32 at least, given in the dtype of x.
    """
    block, order, k = split(x, small, signs, block)
    compute = torch.promote_types(x.dtype, torch.float32)
    made = x.to(compute)
    if signs is not None and not transpose:
        made = _flip(made, signs)
    groups, rest = stages(order, k), block
    for group in groups:
        matrix = _as_tensor(group, compute).to(x.device)
        if group is groups[-1]:
            matrix = matrix if small is None else torch.kron(matrix, small.to(compute).contiguous())
            made = made.reshape(-1, rest) @ (matrix.t() if transpose else matrix)
        else:
            rest //= matrix.shape[0]
            made = (matrix if transpose else matrix.t()) @ made.reshape(-1, matrix.shape[0], rest)
    made = made.reshape(x.shape)
    if signs is not None and transpose:
        made = _flip(made, signs)
    return made.to(x.dtype)


@functools.lru_cache(maxsize=64)
def _as_tensor(group: Kernels, dtype: torch.dtype) -> Tensor:
    """Return the matrix of a stage in float32 or float64, not to be written."""
    kind = np.float64 if dtype is torch.float64 else np.float32
    return torch.from_numpy(stage_matrix(group).astype(kind))


def _flip(x: Tensor, signs: Tensor) -> Tensor:
    return (x.reshape(-1, signs.shape[0]) * signs.to(x.dtype)).reshape(x.shape)


def matrix_of(
    size: int, small: Tensor | None = None, signs: Tensor | None = None, block: int = 0, transpose: bool = False
) -> Tensor:
    """Return the matrix Q [size, size] in float64 (or Qᵀ) with `hadamard(x, small, signs, block) = x @ Q`.

    ValueError where the arguments do not fit one another.
    """
    block, order, _k = split(torch.empty(size), small, signs, block)
    one = torch.tensor(_product(cast(Kernels, kernels(order))) / math.sqrt(order))
    if small is not None:
        one = torch.kron(one, small.detach().to(torch.float64).contiguous())
    matrix = _block_diagonal([one] * (size // block))
    if signs is not None:
        matrix = signs.detach().to(torch.float64).repeat(size // signs.shape[0])[:, None] * matrix
    return matrix.t().contiguous() if transpose else matrix


# Drawing at random ----------------------------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """The arguments `small`, `signs` and `block` of one rotation, as `transform` and `matrix_of` take them."""

    small: Tensor | None
    signs: Tensor
    block: int


def randomized(size: int, seed: int, block_size: int = 0) -> Rotation:
    """Draw a randomized Hadamard rotation of an axis of any size; the same for the same seed.

    Every coordinate has its sign, [size]; all blocks share one small matrix, [k, k] where k is left of a block when the
    largest known Hadamard order is taken out, and None where nothing is. float64. ValueError where `block_size` (0: the
    size) does not divide the size.
    """
    block = _block(size, block_size)
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=random).to(torch.float64) * 2 - 1
    _order, k = factors(block)
    return Rotation(_haar(k, random) if k > 1 else None, signs, block)


def orthogonal(size: int, seed: int, kind: str = "hadamard", block_size: int = 0) -> Tensor:
    """Return a random orthogonal matrix [size, size] in float64, block-diagonal where `block_size` is not 0.

    Args:
        size: any positive number.
        seed: draws independently of torch's global state.
        kind: "hadamard": the matrix of `randomized`, which spreads every coordinate evenly over its block;
            "orthogonal": uniform over all orthogonal matrices, each block drawn by itself.
        block_size: divides the size, else ValueError.
    """
    if kind == "hadamard":
        return matrix_of(size, *randomized(size, seed, block_size))
    if kind != "orthogonal":
        raise ValueError(f"no kind of rotation is called {kind!r}; there are 'hadamard' and 'orthogonal'")
    block = _block(size, block_size)
    random = torch.Generator().manual_seed(seed)
    return _block_diagonal([_haar(block, random) for _ in range(size // block)])


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    return cast(Tensor, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]


def _block(size: int, block_size: int) -> int:
    if size < 1:
        raise ValueError(f"a rotation needs a positive size, not {size}")
    if block_size < 0 or (block_size and size % block_size):
        raise ValueError(f"blocks of {block_size} do not divide the size {size}")
    return block_size or size


def _haar(size: int, random: torch.Generator) -> Tensor:
    """Draw uniformly. Source: F. Mezzadri, "How to generate random matrices from the classical compact groups"."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
    # QR is unique up to signs; left as the algorithm chose them, they would favour some matrices.
    return cast(Tensor, q * torch.where(r.diagonal() < 0, -1.0, 1.0))


# Constructions --------------------------------------------------------------------------------------------------------


def _product(group: Kernels) -> NDArray[np.float64]:
    made: NDArray[np.float64] = np.ones((1, 1))
    for order in group:
        made = np.kron(made, _kernel(order)).astype(np.float64, copy=False)
    return made


def _paley(order: int) -> tuple[int, int] | None:
    """Return (p, e) of the field that gives a kernel of this order, or None."""
    if order % 4 == 0 and (field := _prime_power(order - 1)):
        return field
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and (field := _prime_power(order // 2 - 1)):
        return field
    return None


@functools.lru_cache(maxsize=64)
def _kernel(order: int) -> NDArray[np.float64]:
    """Return the ±1 matrix of order 2 or of Paley's."""
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    if order == 2:
        return two
    p, e = cast(tuple[int, int], _paley(order))
    residues = _jacobsthal(p, e)
    q = len(residues)
    border = np.ones((q + 1, q + 1))
    border[0, 0] = 0
    border[1:, 1:] = residues
    if order == q + 1:
        border[1:, 0] = -1  # with Q skew, S is too: (I + S)(I + S)ᵀ = I + S Sᵀ
        return np.eye(order) + border
    return np.kron(border, two) + np.kron(np.eye(q + 1), np.array([[1.0, -1.0], [-1.0, -1.0]]))


def _jacobsthal(p: int, e: int) -> NDArray[np.float64]:
    """Return Q [q, q] of GF(p^e): 1 where the difference of two elements is a square, -1 where not, 0 for none."""
    q = p**e
    weights = p ** np.arange(e)
    digits = np.arange(q)[:, None] // weights % p  # element -> coefficients of its polynomial, [q, e]
    # The field is the polynomials modulo an irreducible one, x^e = tail: the first one for which Q is as it must be.
    for tail in itertools.product(range(p), repeat=e):
        squares = _squares(digits, np.array(tail), p) @ weights
        if len(np.unique(squares[1:])) != q // 2 or not squares[1:].all():
            continue
        character = np.full(q, -1.0)
        character[squares] = 1
        character[0] = 0
        difference = sum(((digits[:, None, i] - digits[None, :, i]) % p) * weights[i] for i in range(e))
        residues: NDArray[np.float64] = character[difference]
        if np.array_equal(residues @ residues.T, q * np.eye(q) - 1):
            return residues
    raise AssertionError(f"GF({q}) exists, but no polynomial of degree {e} over GF({p}) gave it")


def _squares(digits: NDArray[Any], tail: NDArray[Any], p: int) -> NDArray[Any]:
    """Return the coefficients [q, e] of every element's square."""
    q, e = digits.shape
    square = np.zeros((q, 2 * e - 1), dtype=np.int64)
    for i in range(e):
        square[:, i : i + e] += digits[:, i : i + 1] * digits
    for high in reversed(range(e, 2 * e - 1)):
        square[:, high - e : high] += square[:, high : high + 1] * tail
        square %= p
    return square[:, :e] % p


def _prime_power(number: int) -> tuple[int, int] | None:
    """Return (p, e) with p^e = number and p prime, or None."""
    if number < 2:
        return None
    p = next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), number)
    e = 0
    while number % p == 0:
        number, e = number // p, e + 1
    return (p, e) if number == 1 else None


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})
