"""Products of 8 bits that a processor adds in 16.

    saturate16(x_i w_i + x_(i+1) w_(i+1))          x: uint8, w: int8; i even, in the order in which the kernel reads w

x86 processors without VNNI multiply eight-bit integers in pairs and clip each pair's sum to 16 bits, without a word:
255 · (127 + 127) is twice what fits. A pair of opposite signs always fits. So a channel is safe where no two neighbours
of one sign have codes that add up to more than 32767 / 255 = 128, and a scale can be chosen that keeps them so:

    s  >=  max over neighbours of one sign (|w_i| + |w_(i+1)|) / 127          rounding adds at most 1

Only channels that need it get the coarser scale; most lose less than the bit that 7-bit weights cost everywhere.
Neighbours at odd places count as well. ONNX Runtime pairs places 0 and 1, 2 and 3, and so on, of the whole row.
OpenVINO pairs channels within each position of a convolution, so that with three channels places 3 and 4 meet. Being
safe in both costs normally distributed weights about half a decibel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from graphopt.ir.arguments import arguments, operator

_LIMIT = 32767 // 255
_BLOCK = 1 << 18  # elements looked at together


def paired_rows(weight: Tensor, node: fx.Node) -> Tensor | None:
    """Return the weight of `node` as [out, k] in the order in which kernels read it.

    Convolutions run over positions, at each over channels. None for a depthwise one, whose kernel adds in 32 bits.
    """
    if operator(node) == "linear":
        return weight
    if weight.shape[1] == 1 and arguments(node).get("groups", 1) == weight.shape[0]:
        return None
    return weight.movedim(1, -1).flatten(1)


def safe_scale(rows: Tensor) -> Tensor:
    """Return the smallest scale [out] with which no neighbours in `rows` [out, k] can saturate."""
    least = torch.zeros(len(rows), dtype=torch.float64)
    for start, block in _blocks(rows):
        wide = block.double()
        size, same = wide.abs(), wide[:, :-1] * wide[:, 1:] > 0
        sums = (size[:, :-1] + size[:, 1:]).masked_fill_(~same, 0.0)
        least[start : start + len(block)] = sums.amax(1) / (_LIMIT - 1)
    return least


def saturating(codes: Tensor) -> Tensor:
    """Return for each row of int8 `codes` [out, k] whether activations exist that saturate a pair of neighbours."""
    found = torch.zeros(len(codes), dtype=torch.bool)
    for start, block in _blocks(codes):
        wide = block.to(torch.int16)  # which holds the product of any two codes
        size, same = wide.abs(), wide[:, :-1] * wide[:, 1:] > 0
        found[start : start + len(block)] = (same & (size[:, :-1] + size[:, 1:] > _LIMIT)).any(1)
    return found


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, some rows of at least two elements): what is computed on the way needs little memory."""
    if rows.shape[1] >= 2:
        count = max(_BLOCK // rows.shape[1], 1)
        for start in range(0, len(rows), count):
            yield start, rows[start : start + count]
