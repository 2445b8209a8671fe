"""Codings: scales, zero points and tables for a weight matrix, and how they are fitted.

A weight is seen as W [P, K, R]: P parts that have nothing to do with each other (the groups of a convolution; one
otherwise), in each R output channels that read K inputs. An input is a row, so that rounding one input of every channel
after the other walks through memory in order. Runs of `group` inputs share a scale:

    group > 0: runs of that length, the last may be short      0: one scale a channel      -1: one scale for everything

The range of a group, by `range`:

    minmax       all there is
    percentile   all but the given share of the largest magnitudes, at either end for grids with a zero point
    mse          the clipping that minimises  sum_k h_k (w_k - q_k)^2,   h the importance of the inputs (1 where none is
                 given); the ends are searched together, then each alone
    entropy      the clipping that minimises KL(clipped || quantized); for whole channels or matrices only
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.calibration.observers import Histogram
from graphopt.errors import GraphoptError
from graphopt.quantization.grids import Grid, IntegerGrid
from graphopt.quantization.ranges import choose_range

WeightRange = Literal["minmax", "percentile", "mse", "entropy"]
_FRACTIONS = tuple(float(f) for f in np.concatenate([np.linspace(0.975, 0.6, 16), np.linspace(0.55, 0.2, 8)]))
_WIDER = (2**0.5,)  # a range between two storable ones may be better off with the wider
_CHUNK = 1 << 18  # weights searched at a time: what stays in a core's cache
# float16 holds scales from here on to 1 part in 512, and none beyond its end.
_HALF_LOW, _HALF_HIGH = 2.0**-16, float(torch.finfo(torch.float16).max)
_COARSE = 2.0**-10  # beside a step like this, a step of _HALF_LOW loses nothing that counts


@dataclass(frozen=True)
class Form:
    """What a weight is to become, before any number is known.

    Attributes:
        grid: the values.
        group: inputs that share a scale, see above.
        symmetric: whether zero is the middle; grids without zero points always are.
        range, percentile: how the ends of a group are found; the share inside in percent.
        half_scales: whether scales are rounded to float16, where it can hold them.
    """

    grid: Grid
    group: int = 0
    symmetric: bool = True
    range: WeightRange = "minmax"
    percentile: float = 99.9
    half_scales: bool = True

    def __post_init__(self) -> None:
        if self.grid.block and self.group != self.grid.block:
            raise GraphoptError(
                f"{self.grid.name} has a scale for {self.grid.block} elements; give group_size={self.grid.block}"
            )
        if self.range == "entropy" and self.group > 0:
            raise GraphoptError(
                "the entropy of a few weights says nothing; take range='mse', or group_size=0 for whole channels"
            )

    @property
    def shifted(self) -> bool:
        """Whether there are zero points."""
        return self.grid.affine and not self.symmetric

    def groups(self, inputs: int) -> Tensor:
        """Return the group of each of `inputs` inputs, int64 [K]."""
        return torch.arange(inputs) // (self.group if self.group > 0 else max(inputs, 1))


@dataclass(frozen=True)
class Coding:
    """Scales, and what else turns codes into weights.

    Attributes:
        grid: the values.
        groups: the group of each input, int64 [K].
        scale: [P, n, R], n groups.
        zero_point: whole numbers [P, n, R] in the scale's dtype, or None.
        table: [P, R, levels] ascending, or None.
    """

    grid: Grid
    groups: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    table: Tensor | None = None

    def nearest(self, weight: Tensor, inputs: Tensor | slice = slice(None)) -> Tensor:
        """Return the nearest values to `weight` [P, k, R], the given k of the K inputs."""
        scale, zero = self.of(inputs)
        if self.table is None:
            return self.grid.nearest(weight, scale, zero)
        rows = (weight / scale).mT.flatten(0, 1)
        values = self.grid.nearest(rows, torch.ones((), dtype=rows.dtype), None, self.table.flatten(0, 1))
        return values.reshape(weight.mT.shape).mT * scale

    def by_input(self, inputs: slice) -> Callable[[int, Tensor], Tensor]:
        """Return a function that gives the nearest values to row [P, R] of the i-th of `inputs`.

        Rounding goes through inputs one after the other, with few channels at a time: what a row costs is the number of
        operators that it takes, so that scales are looked up here, for all rows at once.
        """
        if self.table is not None:
            return lambda i, row: self.nearest(row.unsqueeze(1), slice(inputs.start + i, inputs.start + i + 1))[:, 0]
        scale, zero = self.of(inputs)
        scales, zeros = scale.unbind(1), None if zero is None else zero.unbind(1)
        grid, shared = self.grid, len(scales) == 1

        def nearest(i: int, row: Tensor) -> Tensor:
            at = 0 if shared else i
            return grid.nearest(row, scales[at], None if zeros is None else zeros[at])

        return nearest

    def around(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values at or below and above each weight [P, K, R]; beyond an end both are the end."""
        units, ladder = self._units(weight)
        same = ladder.dim() == 1
        above = torch.bucketize(units, ladder, right=True) if same else torch.searchsorted(ladder, units, right=True)
        return self._on(above - 1, ladder), self._on(above, ladder)

    def _units(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [P, R, K] in steps of the grid, and its values ascending: [levels], or [P, R, levels]."""
        scale, zero = self.of()
        units = weight / scale if zero is None else weight / scale + zero
        ladder = self.grid.ladder().to(weight.dtype) if self.table is None else self.table.contiguous()
        return units.mT.contiguous(), ladder

    def _on(self, place: Tensor, ladder: Tensor) -> Tensor:
        """Return the weights [P, K, R] at places [P, R, K] on the ladder."""
        scale, zero = self.of()
        place = place.clamp(0, ladder.shape[-1] - 1)
        units = (ladder[place] if ladder.dim() == 1 else ladder.gather(-1, place)).mT
        return (units if zero is None else units - zero) * scale

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes of `weight` [P, K, R], channels first: [P, R, K]."""
        scale, zero = self.of()
        if self.table is None:
            return self.grid.encode(weight, scale, zero).mT.contiguous()
        rows = (weight / scale).mT.flatten(0, 1)
        codes = self.grid.encode(rows, torch.ones((), dtype=rows.dtype), None, self.table.flatten(0, 1))
        return codes.reshape(weight.mT.shape)

    def of(self, inputs: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point of the given inputs, [P, k, R], or [P, 1, R] where all share one."""
        if self.scale.shape[1] == 1:
            return self.scale, self.zero_point
        which = self.groups[inputs]
        return self.scale[:, which], None if self.zero_point is None else self.zero_point[:, which]

    def with_scale(self, scale: Tensor) -> Coding:
        return Coding(self.grid, self.groups, scale, self.zero_point, self.table)

    def with_table(self, table: Tensor) -> Coding:
        return Coding(self.grid, self.groups, self.scale, self.zero_point, table)


def fit(weight: Tensor, form: Form, importance: Tensor | None = None) -> Coding:
    """Return scales and zero points for `weight` [P, K, R] by `form.range`; importance [P, K], none negative.

    A grid with a table gets evenly spread values between the ends; see `codebooks` for learned ones.
    """
    inputs = weight.shape[1]
    group = form.group if 0 < form.group < inputs else max(inputs, 1)
    blocks, weights = _blocks(weight, group), _blocks(_importance(weight, importance), group)
    if form.group < 0:  # one range for everything: a single group of a single channel
        blocks = blocks.movedim(1, 0).reshape(1, blocks.shape[1], -1, 1)
        weights = weights.expand(*weights.shape[:3], weight.shape[2]).movedim(1, 0).reshape(blocks.shape)
    scale, zero = _fitted(blocks, weights, form)
    if form.group < 0:
        shape = (len(weight), 1, weight.shape[2])
        scale, zero = scale.expand(shape), None if zero is None else zero.expand(shape)
    table = None
    if form.grid.tabled:
        levels = torch.linspace(-1, 1, form.grid.code_max + 1, dtype=weight.dtype)
        table = levels.expand(len(weight), weight.shape[2], -1).contiguous()
    return Coding(form.grid, form.groups(inputs), scale, zero, table)


def stored_scale(scale: Tensor, grid: Grid, half: bool = True) -> Tensor:
    """Return what of `scale` [P, n, R] the format, or with `half` float16, can hold; all positive.

    Scales too small for float16 become its smallest good one where others are far coarser; else all stay float32.
    """
    scale = grid.storable(scale).to(torch.float32).to(scale.dtype)
    if not half or grid.scale_bits or not scale.numel():
        return scale
    real = scale[scale != 1]  # a group of zeros has the scale 1, which says nothing
    low, high = (float(end) for end in torch.aminmax(real)) if real.numel() else (1.0, 1.0)
    if high > _HALF_HIGH or (low < _HALF_LOW and high < _COARSE):
        return scale
    return scale.clamp(min=_HALF_LOW).to(torch.float16).to(scale.dtype)


def _importance(weight: Tensor, importance: Tensor | None) -> Tensor:
    given = weight.new_ones(weight.shape[:2]) if importance is None else importance.to(weight.dtype)
    return given.unsqueeze(-1)


def _blocks(values: Tensor, group: int) -> Tensor:
    """Return [P, n, group, R] of [P, K, R], filled up with zeros: no range and no error grows by them."""
    parts, inputs, channels = values.shape
    filled = torch.nn.functional.pad(values, (0, 0, 0, -inputs % group))
    return filled.reshape(parts, -1, group, channels)


def _fitted(blocks: Tensor, importance: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point [P, n, R] for blocks [P, n, g, R]."""
    if blocks.shape[2] == 0:
        low = high = blocks.new_zeros(blocks.shape[0], blocks.shape[1], blocks.shape[3])
    else:
        low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    if form.range == "percentile":
        low, high = _percentile(blocks, form)
    elif form.range == "entropy":
        low, high = _entropy(blocks, low, high, form)
    elif form.range == "mse" and not form.grid.tabled:
        low, high = _searched(blocks, importance, low, high, form)
    return _parameters(low, high, form)


def _parameters(low: Tensor, high: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point for ranges low <= 0 <= high."""
    grid = form.grid
    if not form.shifted:
        return stored_scale(_symmetric_scale(low, high, form), grid, form.half_scales), None
    scale = stored_scale((high - low) / (grid.code_max - grid.code_min), grid, form.half_scales)
    return scale, _zero_point(low, scale, grid)


def _zero_point(low: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the code that comes nearest to making `low` the smallest value."""
    return (grid.code_min - low / scale).round().clamp(grid.code_min, grid.code_max)


def _symmetric_scale(low: Tensor, high: Tensor, form: Form) -> Tensor:
    """Return the scale that reaches the larger end; an integer grid's smallest code, which has no opposite, aside."""
    largest = torch.maximum(-low, high)
    return form.grid.scale_for(largest) if form.range == "minmax" else largest / form.grid.ends[1]


def _percentile(blocks: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    share = form.percentile / 100
    count = blocks.shape[2]
    rank = min(max(math.ceil(share * count), 1), count)
    if not form.shifted:
        high = blocks.abs().kthvalue(rank, dim=2).values
        return -high, high
    high = blocks.kthvalue(rank, dim=2).values.clamp(min=0)
    return -((-blocks).kthvalue(rank, dim=2).values.clamp(min=0)), high


def _entropy(blocks: Tensor, low: Tensor, high: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    if not isinstance(form.grid, IntegerGrid):
        raise GraphoptError(f"range='entropy' is for integer grids, not {form.grid.name}; take range='mse'")
    low, high = low.clone(), high.clone()
    for part in range(len(blocks)):
        for channel in range(blocks.shape[3]):
            seen = Histogram()
            values = blocks[part, :, :, channel].float()
            seen.update(values if form.shifted else torch.cat([values, -values]), "a weight")
            low[part, 0, channel], high[part, 0, channel] = choose_range(seen, form.grid, "entropy")
    return low, high


def _searched(blocks: Tensor, importance: Tensor, low: Tensor, high: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Search the clipping of every block, some blocks at a time."""
    low, high = low.clone(), high.clone()
    each = max(blocks[0, 0].numel(), 1)
    step = max(_CHUNK // each, 1)
    for part in range(len(blocks)):
        for start in range(0, blocks.shape[1], step):
            here = part, slice(start, start + step)
            weights = importance[here] if importance.shape[1] > 1 else importance[part]
            low[here], high[here] = _search(blocks[here], weights, low[here], high[here], form)
    return low, high


def _search(blocks: Tensor, importance: Tensor, low: Tensor, high: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return the best ends [n, R] of blocks [n, g, R]: first as one fraction of both, then each by itself."""
    several = (1, *((*_WIDER, *_FRACTIONS) if form.grid.scale_bits else _FRACTIONS))
    fractions = blocks.new_tensor(several).reshape(-1, 1, 1)
    together = max(_CHUNK // max(blocks.numel(), 1), 1)  # candidates tried at once

    def cost(low: Tensor, high: Tensor) -> Tensor:
        error = form.grid.nearest(blocks, *_loose(low, high, form)) - blocks
        return error.square_().mul_(importance).sum(-2)

    turns = [(True, True)] + ([(True, False), (False, True)] if form.shifted else [])
    for move_low, move_high in turns:
        lows = low * fractions if move_low else low.expand(len(fractions), *low.shape)
        highs = high * fractions if move_high else high.expand(len(fractions), *high.shape)
        tried = [slice(first, first + together) for first in range(0, len(fractions), together)]
        costs = torch.cat([cost(lows[each], highs[each]) for each in tried])
        best = costs.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)  # the first of equals: ends as they are
        low, high = lows.gather(0, best)[0], highs.gather(0, best)[0]
    return low, high


def _loose(low: Tensor, high: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point [c, n, 1, R] of c candidates; only the final scale goes through float16."""
    grid = form.grid
    low, high = low.unsqueeze(-2), high.unsqueeze(-2)
    if not form.shifted:
        scale = torch.maximum(-low, high) / grid.ends[1]
        return (grid.storable(scale) if grid.scales_alone else scale.clamp(min=1e-30)), None
    scale = grid.storable((high - low) / (grid.code_max - grid.code_min))
    return scale, _zero_point(low, scale, grid)
