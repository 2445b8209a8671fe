"""Learned tables against every partition of a channel."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from small_matrices import drawn_gram

from graphopt.quantization.codebooks import learned_table
from graphopt.quantization.coding import Form
from graphopt.quantization.grids import grid
from graphopt.quantization.solve import Choices, quantize_matrix


def test_learned_tables_against_every_partition() -> None:
    """k-means in one dimension splits the sorted weights in runs: try all of them."""
    losses = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(9, generator=generator, dtype=torch.float64).sort().values
        mass = torch.rand(9, generator=generator, dtype=torch.float64) + 0.1
        best = np.inf
        for cuts in itertools.combinations(range(1, 9), 2):
            loss = 0.0
            for part in np.split(np.arange(9), cuts):
                center = (mass[part] * values[part]).sum() / mass[part].sum()
                loss += float((mass[part] * (values[part] - center) ** 2).sum())
            best = min(best, loss)
        table = learned_table(values[None, :, None], mass[None], 4)[0, 0]
        assert table.tolist() == sorted(table.tolist())
        found = float((mass * (values[:, None] - table).square().amin(1)).sum())
        losses.append(found / best)
    assert max(losses) < 1.001  # four levels are no worse than the best three


def test_constant_and_zero_channels() -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.3), torch.randn(16)], 1)[None]
    gram = drawn_gram(16, 0)
    for name, group in [("int4", 8), ("uint2", 8), ("codebook2", 0), ("nf4", 5), ("nvfp4", 16), ("ternary", 0)]:
        form = Form(grid(name), group, symmetric=False, range="mse")
        value = quantize_matrix(weight, Choices(form, "gptq", sweeps=2), gram).value()
        assert bool(value.isfinite().all()), name
        assert float(value[0, :, 0].abs().max()) < 1e-3, name
        assert float((value[0, :, 1] - 0.3).abs().mean()) < 0.1, name
