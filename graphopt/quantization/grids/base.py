"""What a grid is, and how it is found by name.

A grid holds the values `unit(code)`; with a scale and a zero point a code stands for

    x ~ scale * unit(code)                       every grid
    x ~ scale * (code - zero_point)              the affine ones, integers

Codes are stored one element each in the smallest torch type that holds them; `pack` shows what they take in a file.
A new grid is one small file: a subclass with `encode`, `decode` and `ladder`, and a call of `register_grid`. No
operator, pass or backend has to know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphoptError, nearest

if TYPE_CHECKING:
    from graphopt.quantization.grids.integers import IntegerGrid

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


class Grid(ABC):
    """A finite set of values, each with a code.

    Attributes:
        name: what `format` says in the dialect.
        bits: what a code takes once packed; ternary codes take 1.6.
        storage: the torch dtype of codes here.
        code_min, code_max: codes are whole numbers in this range, all of them.
        affine: whether a zero point may shift the grid.
        tabled: whether the values come with the tensor, as a table.
        block: the number of elements that share a scale; 0 where any granularity will do.
        scale_bits: what a scale takes in this format; 0 where that is up to the scale's own dtype.
        scales_alone: whether each scale can be rounded by itself; else all scales of a tensor go through `storable`
            together.
    """

    affine: ClassVar[bool] = False
    tabled: ClassVar[bool] = False
    block: int = 0
    scale_bits: int = 0
    scales_alone: bool = True

    def __init__(self, name: str, bits: float, storage: torch.dtype, code_min: int, code_max: int) -> None:
        self.name, self.bits, self.storage = name, bits, storage
        self.code_min, self.code_max = code_min, code_max

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    @abstractmethod
    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Return the code of the value nearest to each of `x`; of two equally near ones the even code's.

        `scale` and `zero_point` broadcast against x; a table is [n], or [*x.shape[:1], n] with one for each entry of
        the first axis. Computed in the wider of x's dtype and float32, so that half-precision inputs round as the
        runtime rounds them. NaN, which has no place on any grid, gets the code of zero (of the value nearest to it).
        """

    @abstractmethod
    def decode(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        """Return the values of codes in the dtype of `scale`, rounded to it once."""

    def nearest(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        """Return the value on the grid nearest to each x: `decode(encode(x))` in x's dtype."""
        return self.decode(self.encode(x, scale, zero_point, table), scale.to(x.dtype), zero_point, table)

    @abstractmethod
    def ladder(self, table: Tensor | None = None) -> Tensor:
        """Return every value at scale 1 and zero point 0, float64, ascending; a table's rows each by itself."""

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value at scale 1 and zero point 0; a table fills -1 to 1."""
        if self.tabled:
            return -1.0, 1.0
        ladder = self.ladder()
        return float(ladder[0]), float(ladder[-1])

    def scale_for(self, largest: Tensor) -> Tensor:
        """Return the scale for values up to the magnitude `largest`, a storable one; 1 where there are only zeros."""
        return self.storable(largest / self.ends[1])

    def storable(self, scale: Tensor) -> Tensor:
        """Return the scales next to `scale` that the format can store, all positive; 1 for what is no scale."""
        return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)

    def pack(self, codes: Tensor) -> Tensor:
        """Return the codes one after the other, `bits` each, as uint8 [bytes]; the last byte is filled with zeros."""
        whole = int(self.bits)
        plain = codes.reshape(-1).to(torch.int64).numpy(force=True) - self.code_min
        each = (plain[:, None] >> np.arange(whole)) & 1
        return torch.from_numpy(np.packbits(each.astype(np.uint8).reshape(-1), bitorder="little"))

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """Return the first `count` codes [count] of what `pack` gave."""
        whole = int(self.bits)
        each = np.unpackbits(packed.numpy(force=True), bitorder="little")[: count * whole].reshape(count, whole)
        plain = (each.astype(np.int64) << np.arange(whole)).sum(axis=1) + self.code_min
        return torch.from_numpy(plain).to(self.storage)

    def packed_bits(self, count: int) -> float:
        """Return the bits that `count` codes take, without what fills up the last byte."""
        return count * self.bits


_GRIDS: dict[str, Grid] = {}


def register_grid(grid: Grid) -> Grid:
    """Make `grid` known under its name, and return it."""
    _GRIDS[grid.name] = grid
    return grid


def grid(name: str) -> Grid:
    """Return the grid called `name`; an unknown name raises GraphoptError with the nearest known one."""
    if name not in _GRIDS:
        raise GraphoptError(
            f"there is no grid called {name!r}{nearest(name, _GRIDS)}; known grids: {', '.join(_GRIDS)}"
        )
    return _GRIDS[name]


def known_grids() -> dict[str, Grid]:
    """Return every known grid by name."""
    return dict(_GRIDS)


def integer_grid(name: str) -> IntegerGrid:
    """Return the integer grid called `name`; GraphoptError where it is none."""
    from graphopt.quantization.grids.integers import IntegerGrid

    found = grid(name)
    if not isinstance(found, IntegerGrid):
        raise GraphoptError(f"{name} is no integer grid, as integer kernels need; take int8 or uint8")
    return found


def nearest_index(x: Tensor, ladder: Tensor) -> Tensor:
    """Return the index of the entry of the ascending `ladder` nearest to each x; of two equally near ones the even one.

    `ladder`: [n], or [K, n] for x [K, ...].
    """
    middles = (ladder[..., 1:] + ladder[..., :-1]) / 2
    if ladder.dim() == 1:
        index = torch.bucketize(x.contiguous(), middles)
        at = middles[index.clamp(max=len(middles) - 1)]
    else:
        flat = x.reshape(len(x), -1).contiguous()
        index = torch.searchsorted(middles.contiguous(), flat)
        at = middles.gather(1, index.clamp(max=middles.shape[1] - 1)).reshape(x.shape)
        index = index.reshape(x.shape)
    return index + ((at == x) & (index % 2 == 1)).to(index.dtype)


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Return `table[index]`; with a table [K, n] the entries of the first axis of `index` [K, ...] read a row each."""
    if table.dim() == 1:
        return table[index]
    return table.gather(1, index.reshape(len(table), -1)).reshape(index.shape)


def refuse_table(form: Grid, table: Tensor | None) -> None:
    if table is not None:
        raise GraphoptError(f"the grid {form.name!r} takes no table; pass table=None")
