"""Weight layouts: where each bit of each code of a matrix [n, k] lies, as functions that packer and emitter both read.

A lane reads its weights as whole words that turn into fragments of the tensor cores' operand A without moving between
lanes. From slow to fast:

    tile      16 rows
    chunk     `chunk` inputs: what a lane reads together
    vector    up to four words, so that a warp reads 32 neighbouring vectors
    lane      4·(row mod 8) + t
    pair      two weights, in the lower and the upper half of a word

Inputs are dealt to the four lanes t of a row in runs of `span`/4 neighbours, so that each lane reads its part of x by
one vector load too. A product over k does not care in which order k comes, as long as both operands agree:

    k = span·i + (span/4)·t + 4·s + 2·h + e       step s of 16 inputs, register half h, element e of the pair

As m16n8k16 has it, register h·2 + (row div 8) of step s holds the pair. Pairs are numbered 4·step + register, and
`fields` says which bits of which words of the lane hold pair p.

Inputs that fill up a unit hold the code that stands for zero; rows that fill up a tile hold code 0 and have no reader.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Words = NDArray[np.uint32]

TILE = 16
LANES = 32
# How many neighbouring inputs make whole words of one lane; 3-bit codes share three words among 32 weights.
_SMALLEST_CHUNK = {2: 32, 3: 64, 4: 16, 8: 16}
_LARGEST_CHUNK = {2: 128, 3: 256, 4: 64, 8: 32}  # fills loads of four words
BITS = tuple(_SMALLEST_CHUNK)


@dataclass(frozen=True)
class Field:
    """Where bits of pair p lie: bits [low, low + width) of its codes at bit `at` of the lower half of a lane's word.

    The second code of the pair lies 16 bits above the first.
    """

    pair: int
    word: int
    at: int
    low: int
    width: int


class _Tiled:
    """Sizes that layouts have in common, made of their fields."""

    n: int
    k: int
    chunk: int
    unit: int

    @property
    def tiles(self) -> int:
        return -(-self.n // TILE)

    @property
    def padded_k(self) -> int:
        return -(-self.k // self.unit) * self.unit

    @property
    def chunks(self) -> int:
        return self.padded_k // self.chunk


@dataclass(frozen=True)
class WeightLayout(_Tiled):
    """A matrix [n, k] of `bits`-bit codes.

    Attributes:
        n, k: rows and inputs. bits: 2, 3, 4 or 8.
        chunk: inputs that a lane reads together; see `chunk_for`.
        span: inputs dealt to four lanes at a time, 16 or 32.
        unit: inputs that k is filled up to a multiple of; a multiple of chunk.
    """

    n: int
    k: int
    bits: int
    chunk: int
    span: int
    unit: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.chunk % _SMALLEST_CHUNK[self.bits] or self.chunk % self.span:
            raise ValueError(f"no layout of {self.bits} bits in chunks of {self.chunk} and spans of {self.span}")
        if self.span not in (16, 32) or self.unit % self.chunk or min(self.n, self.k) < 1:
            raise ValueError(f"no layout for [{self.n}, {self.k}] in units of {self.unit} and spans of {self.span}")

    @property
    def steps(self) -> int:
        """Products of 16 inputs in a chunk."""
        return self.chunk // 16

    @property
    def words(self) -> int:
        """Words that a lane reads of a chunk."""
        return self.bits * self.chunk // 64

    @property
    def vector(self) -> int:
        """Words of one load."""
        return math.gcd(self.words, 4)

    @property
    def total_words(self) -> int:
        return self.tiles * self.chunks * self.words * LANES

    def address(self, tile: Indices, chunk: Indices, lane: Indices, word: int) -> Indices:
        """Return the index of a lane's word."""
        vectors = self.words // self.vector
        load = (tile * self.chunks + chunk) * vectors + word // self.vector
        return (load * LANES + lane) * self.vector + word % self.vector

    def seat(self, row: Indices, inside: Indices) -> tuple[Indices, Indices, Indices]:
        """Return (lane, pair, upper) of the weights at rows of a tile and inputs of a chunk; upper: 1, the second."""
        quarter = self.span // 4
        t, j = inside % self.span // quarter, inside % quarter
        step = inside // self.span * (self.span // 16) + j // 4
        return 4 * (row % 8) + t, 4 * step + 2 * (j % 4 // 2) + row // 8, j % 2

    def place(self, n: Indices, k: Indices) -> tuple[Indices, Indices]:
        """Return (word, bit), each [bits, ...], of every bit of the codes at (n, k); n and k have one shape."""
        lane, pair, upper = self.seat(n % TILE, k % self.chunk)
        word, bit = np.empty((self.bits, *n.shape), np.int64), np.empty((self.bits, *n.shape), np.int64)
        for field in fields(self.bits, self.chunk):
            here = pair == field.pair
            found = self.address(n[here] // TILE, k[here] // self.chunk, lane[here], field.word)
            for i in range(field.width):
                word[field.low + i][here] = found
                bit[field.low + i][here] = field.at + i + 16 * upper[here]
        return word, bit

    def _moves(self) -> Iterator[tuple[Field, int, Indices, Indices]]:
        """Yield (field, shift, sources [32], words [32]) of a chunk: which weights of [16, chunk] each field holds."""
        row, inside = np.divmod(np.arange(TILE * self.chunk), self.chunk)
        lane, pair, upper = self.seat(row, inside)
        by_seat = np.empty((LANES, self.chunk // 4, 2), np.int64)
        by_seat[lane, pair, upper] = np.arange(TILE * self.chunk)
        zero, lanes = np.zeros(LANES, np.int64), np.arange(LANES)
        for field in fields(self.bits, self.chunk):
            for half in (0, 1):
                yield (
                    field,
                    field.at + 16 * half,
                    by_seat[:, field.pair, half],
                    self.address(zero, zero, lanes, field.word),
                )

    def _parts(self) -> Iterator[slice]:
        """Yield runs of tiles that are moved at once, about a million weights."""
        each = max((1 << 20) // (TILE * self.padded_k), 1)
        for first in range(0, self.tiles, each):
            yield slice(first, min(first + each, self.tiles))

    def pack(self, codes: NDArray[Any], fill: NDArray[Any] | int) -> Words:
        """Return the words of codes [n, k], each from 0 to 2**bits - 1.

        `fill` is the code that stands for zero: one for all, or [n, 1], or [n, padded_k].
        """
        words = np.zeros((self.tiles, self.chunks, self.words * LANES), np.uint32)
        moves = list(self._moves())
        for part in self._parts():
            blocks = self._blocks(codes, fill, part)
            for field, shift, sources, targets in moves:
                value = blocks[:, :, sources] >> np.uint32(field.low) & np.uint32((1 << field.width) - 1)
                words[part][:, :, targets] |= value << np.uint32(shift)
        return words.reshape(-1)

    def _blocks(self, codes: NDArray[Any], fill: NDArray[Any] | int, part: slice) -> Words:
        """Return the codes of some tiles, filled up, as [tiles, chunks, 16·chunk]."""
        first, last = part.start * TILE, min(part.stop * TILE, self.n)
        full = np.zeros(((part.stop - part.start) * TILE, self.padded_k), np.uint32)
        full[: last - first] = fill if isinstance(fill, int) else fill[first:last]
        full[: last - first, : self.k] = codes[first:last]
        return (
            full.reshape(-1, TILE, self.chunks, self.chunk).swapaxes(1, 2).reshape(-1, self.chunks, TILE * self.chunk)
        )

    def unpack(self, words: Words) -> NDArray[np.uint8]:
        """Return the codes [n, padded_k] of `pack`, with what fills up k."""
        codes = np.zeros((self.tiles * TILE, self.padded_k), np.uint8)
        shaped = words.reshape(self.tiles, self.chunks, self.words * LANES)
        for part in self._parts():
            blocks = np.zeros((part.stop - part.start, self.chunks, TILE * self.chunk), np.uint8)
            for field, shift, sources, targets in self._moves():
                value = shaped[part][:, :, targets] >> np.uint32(shift) & np.uint32((1 << field.width) - 1)
                blocks[:, :, sources] |= (value << np.uint32(field.low)).astype(np.uint8)
            rows = blocks.reshape(-1, self.chunks, TILE, self.chunk).swapaxes(1, 2).reshape(-1, self.padded_k)
            codes[part.start * TILE : part.stop * TILE] = rows
        return codes[: self.n]


@functools.cache
def fields(bits: int, chunk: int) -> tuple[Field, ...]:
    """Return the fields of all chunk/4 pairs of a lane.

    2, 4 and 8 bits fill the halves of a word from below. Of 16 pairs of 3 bits, five lie in each of three words, and
    the last has one bit at the top of each.
    """
    found = []
    for pair in range(chunk // 4):
        if bits != 3:
            each = 16 // bits
            found.append(Field(pair, pair // each, bits * (pair % each), 0, bits))
            continue
        block, inside = divmod(pair, 16)
        if inside < 15:
            found.append(Field(pair, 3 * block + inside // 5, 3 * (inside % 5), 0, 3))
        else:
            found += [Field(pair, 3 * block + i, 15, i, 1) for i in range(3)]
    return tuple(found)


def chunk_for(bits: int, group: int) -> int:
    """Return the largest chunk that goes evenly into groups of `group` inputs, or they into it; 0 where there is none.

    `group` 0 is a scale for each row.
    """
    chunk = _LARGEST_CHUNK[bits]
    while chunk >= _SMALLEST_CHUNK[bits]:
        if group == 0 or group % chunk == 0 or (group % 16 == 0 and chunk % group == 0):
            return chunk
        chunk //= 2
    return 0


def span_for(group: int) -> int:
    """Return how many inputs are dealt out together: no more than share a scale."""
    return 32 if group % 32 == 0 else 16


@dataclass(frozen=True)
class ByteLayout(_Tiled):
    """A matrix [n, k] of signed bytes, multiplied as they are: registers of operand A of m16n8k32, in the lanes' order.

    A lane reads four words for each of the two steps of a chunk of 64 inputs, and 16 neighbouring bytes of x:

        k = 64·chunk + 16·t + 8·step + 4·h + e          register h·2 + (row div 8), byte e
    """

    n: int
    k: int

    chunk = unit = 64
    words = 8

    def place(self, n: Indices, k: Indices) -> tuple[Indices, Indices]:
        """Return (word, byte) of the codes at (n, k); n and k have one shape."""
        row, inside = n % TILE, k % self.chunk
        t, step, h, e = inside // 16, inside % 16 // 8, inside % 8 // 4, inside % 4
        load = (n // TILE * self.chunks + k // self.chunk) * 2 + step
        return (load * LANES + 4 * (row % 8) + t) * 4 + 2 * h + row // 8, e

    def pack(self, codes: NDArray[np.int8]) -> Words:
        """Return the words of codes [n, k]; what fills up is 0."""
        full = np.zeros((self.tiles * TILE, self.padded_k), np.int8)
        full[: self.n, : self.k] = codes
        parts = full.reshape(self.tiles, 2, 8, self.chunks, 4, 2, 2, 4)  # tile, half, g, chunk, t, step, h, e
        return np.ascontiguousarray(parts.transpose(0, 3, 5, 2, 4, 6, 1, 7)).reshape(-1).view(np.uint32)

    def unpack(self, words: Words) -> NDArray[np.int8]:
        """Return the codes [n, k] of `pack`."""
        parts = words.view(np.int8).reshape(self.tiles, self.chunks, 2, 8, 4, 2, 2, 4)
        return parts.transpose(0, 6, 3, 1, 4, 2, 5, 7).reshape(-1, self.padded_k)[: self.n, : self.k]
