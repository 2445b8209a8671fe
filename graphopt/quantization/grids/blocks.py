"""Grids whose scales are small numbers too: blocks of neighbours share one.

    mx...    32 elements, the scale a power of two in 8 bits (e8m0); "OCP Microscaling Formats (MX)"
    nvfp4    16 elements of e2m1, the scale an e4m3 times one float32 for the tensor
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from graphopt.quantization.grids.base import SMALLEST_SCALE, Grid, nearest_index, register_grid
from graphopt.quantization.grids.floats import FloatGrid
from graphopt.quantization.grids.integers import IntegerGrid

_SCALES = FloatGrid(4, 3)


def _power_of_two(scale: Tensor) -> Tensor:
    """Return the power of two nearest to each scale on a logarithmic axis, of those that e8m0 and float32 hold."""
    exponent = torch.log2(scale.clamp(min=SMALLEST_SCALE)).round().clamp(-126, 127)
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), torch.exp2(exponent))


def _shared_exponent(largest: Tensor, end: float) -> Tensor:
    """Return the scale that the MX standard gives a block: it brings the largest element to the topmost exponent."""
    top = torch.floor(torch.log2(torch.tensor(end)))
    _, exponent = torch.frexp(largest)
    scale = torch.exp2((exponent - 1 - top).to(largest.dtype).clamp(-126, 127))
    return torch.where(largest < SMALLEST_SCALE, torch.ones_like(scale), scale)


class BlockFloatGrid(FloatGrid):
    """Floats in blocks, with power-of-two scales or, for nvfp4, e4m3 ones."""

    scale_bits = 8

    def __init__(self, exponent: int, mantissa: int, name: str, block: int, powers: bool = True) -> None:
        super().__init__(exponent, mantissa, name)
        self.block, self.powers, self.scales_alone = block, powers, powers

    def scale_for(self, largest: Tensor) -> Tensor:
        return _shared_exponent(largest, self.ends[1]) if self.powers else super().scale_for(largest)

    def storable(self, scale: Tensor) -> Tensor:
        if self.powers:
            return _power_of_two(scale)
        if scale.numel() == 0:
            return scale
        # One number for the tensor brings the largest scale to the end of e4m3, as NVIDIA's recipe does.
        whole = (scale.amax() / _SCALES.magnitudes[-1]).to(torch.float32).to(scale.dtype).clamp(min=SMALLEST_SCALE)
        rounded = _SCALES.magnitudes.to(scale.dtype)[nearest_index(scale / whole, _SCALES.magnitudes.to(scale.dtype))]
        # A block of tiny values beside large ones: the smallest scale there is, rather than none.
        rounded = rounded.clamp(min=float(_SCALES.magnitudes[1]))
        return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), rounded * whole)


class BlockIntegerGrid(IntegerGrid):
    """Integers in blocks with power-of-two scales; no zero point."""

    affine: ClassVar[bool] = False
    scale_bits = 8
    block = 32

    def __init__(self, bits: int) -> None:
        super().__init__(bits, signed=True)
        self.name = f"mxint{bits}"

    def scale_for(self, largest: Tensor) -> Tensor:
        return _shared_exponent(largest, self.ends[1])

    def storable(self, scale: Tensor) -> Tensor:
        return _power_of_two(scale)


BLOCKS: list[Grid] = [
    BlockFloatGrid(2, 1, "mxfp4", 32),
    BlockFloatGrid(2, 3, "mxfp6_e2m3", 32),
    BlockFloatGrid(3, 2, "mxfp6_e3m2", 32),
    BlockFloatGrid(4, 3, "mxfp8_e4m3", 32),
    BlockFloatGrid(5, 2, "mxfp8_e5m2", 32),
    BlockIntegerGrid(8),
    BlockFloatGrid(2, 1, "nvfp4", 16, powers=False),
]
for _each in BLOCKS:
    register_grid(_each)
