"""Learned rounding: between its neighbours, never worse than the nearest, never better than the best of all."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.quantization.codebooks import learned_table
from graphopt.quantization.coding import Coding, Form, fit
from graphopt.quantization.grids import grid, known_grids
from graphopt.quantization.objectives import damped
from graphopt.quantization.rounding import prepare, round_with_feedback
from graphopt.quantization.rounding.adaround import learned_rounding
from graphopt.quantization.rounding.descent import objective


def drawn(inputs: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, inputs)
    x = torch.randn(8 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(1, inputs, channels, generator=generator, dtype=torch.float64)
    return weight, damped((x.T @ x / len(x))[None], 0.01)


def coding_of(weight: Tensor, name: str, group: int, symmetric: bool) -> Coding:
    form = Form(grid(name), grid(name).block or group, symmetric)
    coding = fit(weight, form)
    if not form.grid.tabled:
        return coding
    table = learned_table(weight, torch.ones(weight.shape[:2]), form.grid.code_max + 1)
    return coding.with_scale(torch.ones_like(coding.scale)).with_table(table)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name, form in known_grids().items() if form.bits <= 8]),
    st.sampled_from([0, 3]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_neighbours_are_values_of_the_grid_around_the_weight(name: str, group: int, symmetric: bool, seed: int) -> None:
    weight, _ = drawn(7, 4, seed)
    coding = coding_of(weight, name, group, symmetric)
    lower, upper = coding.around(weight)
    for each in (lower, upper):
        torch.testing.assert_close(coding.nearest(each), each, rtol=1e-9, atol=1e-12)
    nearest = coding.nearest(weight)
    one_of = torch.isclose(nearest, lower, rtol=1e-6, atol=1e-9) | torch.isclose(nearest, upper, rtol=1e-6, atol=1e-9)
    assert bool(one_of.all())
    inside = (lower <= weight + 1e-9) & (weight <= upper + 1e-9)
    beyond = torch.isclose(lower, upper, rtol=1e-6, atol=1e-9)
    assert bool((inside | beyond).all())


@pytest.mark.parametrize("name", ["int3", "e2m1", "nf4"])
def test_between_the_nearest_and_the_best_way_up_or_down(name: str) -> None:
    """Every way to round eight weights up or down, tried."""
    gains = []
    for seed in range(6):
        weight, hessian = drawn(8, 1, seed)
        coding = coding_of(weight, name, 0, True)
        lower, upper = coding.around(weight)
        ways = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=torch.float64)
        every = (lower + ways.T.unsqueeze(0) * (upper - lower)).expand(1, 8, -1)
        best = float(objective(weight.expand(1, 8, every.shape[2]), every, hessian).min())
        nearest, learned = (
            float(objective(weight, each, hessian))
            for each in (coding.nearest(weight), learned_rounding(weight, hessian, coding, 300))
        )
        assert best * (1 - 1e-9) <= learned <= nearest * (1 + 1e-9)
        gains.append((nearest - learned) / max(nearest - best, 1e-12))
    assert sum(gains) / len(gains) > 0.2


def test_gains_over_nearest_on_a_layer() -> None:
    weight, hessian = drawn(48, 24, 0)
    coding = coding_of(weight, "int3", 16, False)
    before, after = (
        float(objective(weight, each, hessian).sum())
        for each in (coding.nearest(weight), learned_rounding(weight, hessian, coding))
    )
    assert after < 0.8 * before


def test_below_feedback_kept_between_the_same_neighbours() -> None:
    """GPTQ moves a weight further than that where inputs are as correlated as here; so it is held back."""
    ratios = []
    for seed in range(4):
        weight, hessian = drawn(96, 48, seed)
        coding = coding_of(weight, "uint4", 48, False)
        fed_back, _ = round_with_feedback(weight, prepare(hessian, coding.groups, "activation", weight.dtype), coding)
        lower, upper = coding.around(weight)
        learned, held = learned_rounding(weight, hessian, coding), fed_back.clamp(lower, upper)
        ratios.append(float(objective(weight, learned, hessian).sum() / objective(weight, held, hessian).sum()))
    assert sum(ratios) / len(ratios) < 0.99
