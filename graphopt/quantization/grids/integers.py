"""Integer grids.

    code = clamp(round_half_even(x / scale) + zero_point, code_min, code_max)        x ~ (code - zero_point) * scale

with the rounding of ONNX QuantizeLinear. `ternary` has the codes -1, 0 and 1; five of them are packed in a byte.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphopt.quantization.grids.base import Grid, refuse_table, register_grid


class IntegerGrid(Grid):
    """Signed or unsigned integers of `bits` bits."""

    affine: ClassVar[bool] = True

    def __init__(self, bits: int, signed: bool) -> None:
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        super().__init__(f"{'' if signed else 'u'}int{bits}", bits, _storage(bits, signed), low, high)
        self.signed = signed

    @property
    def ends(self) -> tuple[float, float]:
        return float(self.code_min), float(self.code_max)

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        refuse_table(self, table)
        # float32 holds neither 2**31 - 1 nor every code of a 32-bit grid.
        compute = torch.float64 if self.bits > 24 else torch.promote_types(x.dtype, torch.float32)
        codes = x.to(compute) / scale.to(compute)
        codes = torch.round(codes)  # one name, so that each step's value is freed by the next
        codes = torch.where(torch.isnan(codes), 0.0, codes)
        if zero_point is not None:
            codes = codes + zero_point.to(compute)
        return codes.clamp(self.code_min, self.code_max).to(self.storage)

    def decode(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        refuse_table(self, table)
        # The difference of two codes is exact in the wider integer type; in half precision it would not be.
        whole = torch.int32 if self.bits <= 16 else torch.int64
        steps = codes if zero_point is None else codes.to(whole) - zero_point.to(whole)
        compute = torch.promote_types(scale.dtype, torch.float32)
        return (steps.to(compute) * scale.to(compute)).to(scale.dtype)

    def nearest(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        # Without a detour over integers: rounding to weights does little else.
        refuse_table(self, table)
        if zero_point is None:
            return (x / scale).round_().clamp_(self.code_min, self.code_max).mul_(scale)
        zero = zero_point.to(x.dtype)
        return (x / scale).round_().add_(zero).clamp_(self.code_min, self.code_max).sub_(zero).mul_(scale)

    def ladder(self, table: Tensor | None = None) -> Tensor:
        return torch.arange(self.code_min, self.code_max + 1, dtype=torch.float64)


class TernaryGrid(IntegerGrid):
    """-1, 0 and 1."""

    def __init__(self) -> None:
        super().__init__(2, signed=True)
        self.name, self.bits, self.code_min = "ternary", 1.6, -1

    def pack(self, codes: Tensor) -> Tensor:
        digits = codes.reshape(-1).to(torch.int64).numpy(force=True) + 1
        filled = np.pad(digits, (0, -len(digits) % 5)).reshape(-1, 5)
        return torch.from_numpy((filled @ 3 ** np.arange(5)).astype(np.uint8))

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        digits = packed.numpy(force=True).astype(np.int64)[:, None] // 3 ** np.arange(5) % 3
        return torch.from_numpy(digits.reshape(-1)[:count] - 1).to(self.storage)


def _storage(bits: int, signed: bool) -> torch.dtype:
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    if bits <= 16:
        return torch.int16 if signed else torch.uint16
    return torch.int32


for _bits in range(2, 9):
    register_grid(IntegerGrid(_bits, signed=True))
    register_grid(IntegerGrid(_bits, signed=False))
register_grid(IntegerGrid(16, signed=True))
register_grid(IntegerGrid(16, signed=False))
INT32 = IntegerGrid(32, signed=True)  # biases: scale = scale of x * scale of w
register_grid(INT32)
register_grid(TernaryGrid())
