"""Grids: which values a quantized tensor may take.

An integer grid of b bits holds the codes `code_min .. code_max`; a real value x is encoded as

    code = clamp(round_half_even(x / scale) + zero_point, code_min, code_max)        x ~ (code - zero_point) * scale

with the rounding of ONNX QuantizeLinear. Codes are stored one element each in the smallest of int8, uint8, int16,
uint16 and int32 that holds them; packing is a matter of the backend. Grids are found by name: a new grid adds no
operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import GraphoptError, nearest


@dataclass(frozen=True)
class IntegerGrid:
    """Signed or unsigned integers of `bits` bits."""

    bits: int
    signed: bool

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def code_min(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def storage(self) -> torch.dtype:
        """The smallest torch dtype that holds every code."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        if self.bits <= 16:
            return torch.int16 if self.signed else torch.uint16
        return torch.int32

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the codes of `x`; `scale` and `zero_point` broadcast against it.

        Computed in the wider of x's dtype and float32, so that half-precision inputs round as the runtime rounds them.
        A value without a place on the grid (NaN) gets the code of zero.
        """
        # float32 holds neither 2**31 - 1 nor every code of a 32-bit grid.
        compute = torch.float64 if self.bits > 24 else torch.promote_types(x.dtype, torch.float32)
        codes = x.to(compute) / scale.to(compute)
        codes = torch.round(codes)  # one name, so that each step's value is freed by the next
        codes = torch.where(torch.isnan(codes), 0.0, codes)
        if zero_point is not None:
            codes = codes + zero_point.to(compute)
        return codes.clamp(self.code_min, self.code_max).to(self.storage)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return `(codes - zero_point) * scale` in the dtype of `scale`, rounded to it once."""
        # The difference of two codes is exact in the wider integer type; in half precision it would not be.
        whole = torch.int32 if self.bits <= 16 else torch.int64
        steps = codes if zero_point is None else codes.to(whole) - zero_point.to(whole)
        compute = torch.promote_types(scale.dtype, torch.float32)
        return (steps.to(compute) * scale.to(compute)).to(scale.dtype)


_GRIDS: dict[str, IntegerGrid] = {}


def register_grid(grid: IntegerGrid) -> IntegerGrid:
    """Make `grid` known under its name."""
    _GRIDS[grid.name] = grid
    return grid


def grid(name: str) -> IntegerGrid:
    """Return the grid called `name`; an unknown name raises GraphoptError with the nearest known one."""
    if name not in _GRIDS:
        raise GraphoptError(
            f"there is no grid called {name!r}{nearest(name, _GRIDS)}; known grids: {', '.join(_GRIDS)}"
        )
    return _GRIDS[name]


for _bits in range(2, 9):
    register_grid(IntegerGrid(_bits, signed=True))
    register_grid(IntegerGrid(_bits, signed=False))
INT32 = register_grid(IntegerGrid(32, signed=True))  # biases: scale = scale of x * scale of w
