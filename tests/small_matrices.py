"""Small random matrices, their Gram matrices and codings."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.quantization.coding import Coding, Form, fit
from graphopt.quantization.grids import grid
from graphopt.quantization.objectives import Gram


def drawn_gram(inputs: int, seed: int, parts: int = 1, rows: int = 0) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, inputs)
    x = torch.randn(parts, rows or 8 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix
    gram = Gram(parts, inputs)
    gram.update(x, "x")
    return gram


def drawn_weight(inputs: int, channels: int, seed: int, parts: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(parts, inputs, channels, generator=generator, dtype=torch.float64)


def coding_of(weight: Tensor, name: str, group: int = 0, symmetric: bool = True) -> Coding:
    return fit(weight, Form(grid(name), group, symmetric, half_scales=False))
