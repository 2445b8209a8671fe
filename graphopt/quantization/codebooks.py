"""Learn a codebook for each output channel.

    levels = argmin  sum_k a_k (w_k - nearest level)^2            a_k = (1 / [H^-1]_kk)^p

A weighted k-means in one dimension for every channel at once. The weights a are those of "LeanQuant: Accurate and
Scalable Large Language Model Quantization with Loss-error-aware Grid" (p = 4 there), which keeps levels near the
weights that the rounding after it can least make up for.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 50


def learned_table(weight: Tensor, importance: Tensor, levels: int, rounds: int = _ROUNDS) -> Tensor:
    """Return [P, R, levels] ascending float16 values for W [P, K, R]; importance [P, K], none negative.

    Starts from evenly spread quantiles by weight, which is deterministic. Levels without members stay where they are.
    """
    rows = weight.mT.double().contiguous()  # [P, R, K]
    parts, channels, inputs = rows.shape
    values, order = rows.sort(-1)
    share = importance.double().clamp(min=0)
    share = share / share.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # Nothing counts for nothing: every weight is rounded to some level.
    mass = (share + 1e-6).unsqueeze(1).expand(parts, channels, inputs).gather(-1, order)
    if inputs == 0:
        return torch.zeros(parts, channels, levels, dtype=weight.dtype)
    total = mass.cumsum(-1)
    wanted = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * total[..., -1:]
    table = values.gather(-1, torch.searchsorted(total, wanted.contiguous()).clamp(max=inputs - 1))
    weighted = mass * values
    for _ in range(rounds):
        middles = (table[..., 1:] + table[..., :-1]) / 2
        nearest = torch.searchsorted(middles, values)
        sums = torch.zeros_like(table).scatter_add_(-1, nearest, weighted)
        counts = torch.zeros_like(table).scatter_add_(-1, nearest, mass)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1e-300), table).sort(-1).values
        if torch.allclose(moved, table, rtol=1e-9, atol=0):
            break
        table = moved
    return table.half().to(weight.dtype)
