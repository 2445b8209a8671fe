"""Floating-point grids eXmY: a sign, X bits of exponent, Y of mantissa; a code is the bit pattern.

    e > 0:  (-1)^s * 2^(e - bias) * (1 + m / 2^Y)          e = 0:  (-1)^s * 2^(1 - bias) * m / 2^Y

with bias = 2^(X-1) - 1, and 1 where that would be 0 (e1mY is an integer grid of its own). As the standards have it,
the largest exponent of e5m2 means infinity and NaN, of e4m3 only the last pattern (e4m3fn), and smaller formats hold
numbers only ("OCP Microscaling Formats"). Values beyond the ends saturate. The scale takes the place of a searched
exponent bias: a bias b is the scale 2^-b ("LLM-FP4: 4-Bit Floating-Point Quantized Transformers").
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.quantization.grids.base import Grid, looked_up, nearest_index, refuse_table, register_grid

_NOT_NUMBERS = {(5, 2): 4, (4, 3): 1}  # positive patterns that stand for infinity or NaN


class FloatGrid(Grid):
    """Floats of `exponent` and `mantissa` bits, and a sign.

    Attributes:
        magnitudes: the numbers with a plus sign, float64, ascending: the pattern is the index.
        values: the value of every pattern, float64; a pattern that is no number counts as the largest one.
    """

    def __init__(self, exponent: int, mantissa: int, name: str = "") -> None:
        bits = 1 + exponent + mantissa
        super().__init__(name or f"e{exponent}m{mantissa}", bits, torch.uint8, 0, (1 << bits) - 1)
        self.exponent, self.mantissa = exponent, mantissa
        # Made at once: a property that is kept would keep whatever a tracer makes of the tensors.
        self.magnitudes = _numbers(exponent, mantissa)
        half = self.magnitudes[torch.arange(_sign(self)).clamp(max=len(self.magnitudes) - 1)]
        self.values = torch.cat([half, -half])

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        refuse_table(self, table)
        compute = torch.promote_types(x.dtype, torch.float32)
        steps = x.to(compute) / scale.to(compute)
        steps = torch.where(torch.isnan(steps), 0.0, steps)
        pattern = nearest_index(steps.abs(), self.magnitudes.to(steps))
        negative = (steps < 0) & (pattern > 0)  # zero has one code
        return (pattern + negative * _sign(self)).to(self.storage)

    def decode(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        refuse_table(self, table)
        compute = torch.promote_types(scale.dtype, torch.float32)
        return (looked_up(self.values.to(codes.device, compute), codes.to(torch.int64)) * scale.to(compute)).to(
            scale.dtype
        )

    def ladder(self, table: Tensor | None = None) -> Tensor:
        return torch.cat([-self.magnitudes.flip(0)[:-1], self.magnitudes])


def _numbers(exponent: int, mantissa: int) -> Tensor:
    bias = max(2 ** (exponent - 1) - 1, 1)
    patterns = torch.arange(2 ** (exponent + mantissa))
    fields, fraction = patterns >> mantissa, (patterns & (2**mantissa - 1)) / 2.0**mantissa
    normal = torch.exp2((fields - bias).double()) * (1 + fraction)
    numbers = torch.where(fields > 0, normal, 2.0 ** (1 - bias) * fraction.double())
    return numbers[: len(numbers) - _NOT_NUMBERS.get((exponent, mantissa), 0)]


def _sign(form: FloatGrid) -> int:
    """Return the bit that stands for minus."""
    return 1 << (form.exponent + form.mantissa)


for _exponent, _mantissa in [(2, 1), (3, 0), (1, 2), (2, 3), (3, 2), (4, 3), (5, 2), (3, 4), (2, 5), (2, 2), (3, 1)]:
    register_grid(FloatGrid(_exponent, _mantissa))
