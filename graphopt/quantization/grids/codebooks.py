"""Grids without a formula: a table of values.

    nf4         the 16 values of "QLoRA: Efficient Finetuning of Quantized LLMs": quantiles of a normal distribution
    codebookB   2^B values that come with the tensor, [2^B] or [K, 2^B] for the K entries of its first axis, ascending

An entry of a table is a code's value at scale 1.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.quantization.grids.base import Grid, looked_up, nearest_index, refuse_table, register_grid


class _Table(Grid):
    """Codes are places in a table."""

    def __init__(self, name: str, bits: int) -> None:
        super().__init__(name, bits, torch.uint8, 0, (1 << bits) - 1)

    @abstractmethod
    def _table(self, given: Tensor | None) -> Tensor:
        """Return the table of a tensor."""

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        steps = x.to(compute) / scale.to(compute)
        steps = torch.where(torch.isnan(steps), 0.0, steps)
        return nearest_index(steps, self._table(table).to(x.device, compute)).to(self.storage)

    def decode(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        compute = torch.promote_types(scale.dtype, torch.float32)
        unit = looked_up(self._table(table).to(codes.device, compute), codes.to(torch.int64))
        return (unit * scale.to(compute)).to(scale.dtype)

    def ladder(self, table: Tensor | None = None) -> Tensor:
        return self._table(table).double()


class CodebookGrid(_Table):
    """2^bits values, learned for each tensor or each of its output channels."""

    tabled: ClassVar[bool] = True

    def __init__(self, bits: int) -> None:
        super().__init__(f"codebook{bits}", bits)

    def _table(self, given: Tensor | None) -> Tensor:
        if given is None or given.dim() not in (1, 2) or given.shape[-1] != self.code_max + 1:
            shape, entries = "none" if given is None else list(given.shape), self.code_max + 1
            raise GraphoptError(
                f"the grid {self.name!r} needs a table [{entries}] or [channels, {entries}], not {shape}"
            )
        return given


class NormalFloatGrid(_Table):
    """Quantiles of a normal distribution between -1 and 1, zero among them."""

    def __init__(self) -> None:
        super().__init__("nf4", 4)
        outermost = 0.9677083  # of the paper's code: the mean of 1 - 1/30 and 1 - 1/32
        above = _quantiles(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
        below = -_quantiles(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
        every = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
        self.values = every / every.max()  # [16]: 7 quantiles below zero, zero and 8 above it

    def _table(self, given: Tensor | None) -> Tensor:
        refuse_table(self, given)
        return self.values


def _quantiles(share: Tensor) -> Tensor:
    return 2**0.5 * torch.erfinv(2 * share - 1)


for _bits in range(1, 9):
    register_grid(CodebookGrid(_bits))
register_grid(NormalFloatGrid())
