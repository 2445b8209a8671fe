"""Rounding against the textbook and against every code; no step of a sweep raises the cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_matrices import coding_of, drawn_gram, drawn_weight
from torch import Tensor

from graphopt.quantization.codebooks import learned_table
from graphopt.quantization.coding import Coding, Form, fit
from graphopt.quantization.grids import grid, known_grids
from graphopt.quantization.objectives import damped
from graphopt.quantization.rounding import (
    descend,
    objective,
    prepare,
    refit_scales,
    refit_table,
    round_with_feedback,
)
from graphopt.quantization.rounding.gptq import Order, feedback, input_order
from graphopt.quantization.solve import Choices, quantize_matrix, relative_error


def textbook_gptq(weight: Tensor, hessian: Tensor, coding: Coding) -> Tensor:
    """The paper's algorithm, one column after the other, with the inverse."""
    weight, rounded = weight.clone(), torch.zeros_like(weight)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for k in range(len(hessian)):
        rounded[k] = coding.nearest(weight[None, k : k + 1], slice(k, k + 1))[0, 0]
        error = (weight[k] - rounded[k]) / upper[k, k]
        weight[k + 1 :] -= upper[k, k + 1 :, None] * error
    return rounded


@pytest.mark.parametrize("order", ["given", "activation", "group"])
@pytest.mark.parametrize("group", [0, 5])
def test_equals_the_textbook(order: Order, group: int) -> None:
    inputs = 150  # more than a block
    hessian = damped(drawn_gram(inputs, 0).mean, 0.01)
    weight = drawn_weight(inputs, 6, 0)
    coding = coding_of(weight, "int3", group)
    rounded, _ = round_with_feedback(weight, prepare(hessian, coding.groups, order, weight.dtype), coding)
    steps = input_order(hessian, coding.groups, order)
    permuted = Coding(coding.grid, coding.groups[steps], coding.scale)
    expected = textbook_gptq(weight[0, steps], hessian[0][steps][:, steps], permuted)
    torch.testing.assert_close(rounded[0, steps], expected)


def test_order_by_group_keeps_groups_together() -> None:
    gram, groups = drawn_gram(20, 1).mean, torch.arange(20) // 4
    steps = input_order(gram, groups, "group")
    assert sorted(steps.tolist()) == list(range(20))
    assert len(list(itertools.groupby(groups[steps].tolist()))) == 5
    diagonal = gram[0].diagonal()
    assert int(steps[0]) == int(diagonal.argmax())
    assert input_order(gram, groups, "activation").tolist() == diagonal.argsort(descending=True).tolist()


def test_feedback_factorizes() -> None:
    hessian = damped(drawn_gram(9, 2, parts=3).mean, 0.01)
    lower = feedback(hessian) + torch.eye(9, dtype=torch.float64)
    middle = torch.linalg.inv(lower).mT @ hessian @ torch.linalg.inv(lower)
    off_diagonal = middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 1e-9 * float(middle.abs().max())


def brute_force(weight: Tensor, hessian: Tensor, coding: Coding) -> float:
    """The least cost over every combination of codes of a single channel [K]."""
    ladder = coding.grid.ladder() * float(coding.scale)
    every = torch.tensor(list(itertools.product(ladder.tolist(), repeat=len(weight))), dtype=torch.float64)
    error = weight - every
    return float(((error @ hessian) * error).sum(1).min())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["int2", "ternary", "e2m1"]))
def test_close_to_the_best_of_all_codes_and_descent_never_rises(seed: int, name: str) -> None:
    inputs = 4
    hessian = damped(drawn_gram(inputs, seed).mean, 1e-4)
    weight = drawn_weight(inputs, 1, seed)
    coding = coding_of(weight, name)
    best = brute_force(weight[0, :, 0], hessian[0], coding)
    nearest = coding.nearest(weight)
    gptq, _ = round_with_feedback(weight, prepare(hessian, coding.groups, "activation", weight.dtype), coding)
    cost, before = (float(objective(weight, each, hessian)) for each in (nearest, gptq))
    assert best <= before * (1 + 1e-9)
    assert best <= cost * (1 + 1e-9)
    now = gptq
    for _ in range(200):  # until it rests: the cost falls at every change, over finitely many codes
        last, now = now, descend(weight, now, hessian, coding)
        if torch.equal(last, now):
            break
        after = float(objective(weight, now, hessian))
        assert after <= before * (1 + 1e-9) + 1e-15
        before = after
    # At rest no single code can be improved: what "coordinate" means.
    for k, value in itertools.product(range(inputs), (coding.grid.ladder() * float(coding.scale)).tolist()):
        other = now.clone()
        other[0, k, 0] = value
        assert float(objective(weight, other, hessian)) >= before * (1 - 1e-9) - 1e-15


def test_gains_over_nearest_and_descent_over_gptq_on_the_whole() -> None:
    ratios = []
    for seed in range(10):
        gram, weight = drawn_gram(64, seed), drawn_weight(64, 32, seed)
        form = Form(grid("uint3"), 16, symmetric=False, range="mse")
        made = [
            relative_error(weight, quantize_matrix(weight, choices, gram), gram)
            for choices in (Choices(form), Choices(form, "gptq"), Choices(form, "gptq", sweeps=5))
        ]
        ratios.append([made[1] / made[0], made[2] / made[1]])
    gptq, sweeps = np.mean(ratios, axis=0)
    assert gptq < 0.5
    assert sweeps < 0.99


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([name for name, form in known_grids().items() if form.bits <= 8]),
    st.booleans(),
    st.sampled_from([0, 4, -1]),
    st.integers(1, 3),
)
def test_no_step_of_a_sweep_raises_the_cost(seed: int, name: str, symmetric: bool, group: int, parts: int) -> None:
    form = Form(grid(name), grid(name).block or group, symmetric)
    hessian = damped(drawn_gram(9, seed, parts).mean, 0.01)
    weight = drawn_weight(9, 3, seed, parts)
    coding = fit(weight, form)
    if form.grid.tabled:
        table = learned_table(weight, hessian.diagonal(dim1=-2, dim2=-1), form.grid.code_max + 1)
        coding = coding.with_scale(torch.ones_like(coding.scale)).with_table(table)
    rounded, coding = round_with_feedback(weight, prepare(hessian, coding.groups, "given", weight.dtype), coding)
    cost = objective(weight, rounded, hessian)
    for _ in range(3):
        if form.grid.tabled:
            rounded, coding = refit_table(weight, rounded, hessian, coding)
        else:
            rounded, coding = refit_scales(weight, rounded, hessian, coding, form)
        after = objective(weight, rounded, hessian)
        assert bool((after <= cost * (1 + 1e-6) + 1e-12).all())
        rounded = descend(weight, rounded, hessian, coding)
        cost = objective(weight, rounded, hessian)
        assert bool((cost <= after * (1 + 1e-6) + 1e-12).all())
        torch.testing.assert_close(coding.nearest(rounded), rounded, rtol=1e-9, atol=1e-12)


def test_scales_reach_least_squares() -> None:
    """With a single group and real-valued scales one step is the closed form <u, H w> / <u, H u>."""
    hessian, weight = damped(drawn_gram(8, 3).mean, 0.01), drawn_weight(8, 4, 3)
    form = Form(grid("int3"), half_scales=False)
    coding = fit(weight, form)
    rounded = coding.nearest(weight)
    units = rounded / coding.scale
    expected = (units * (hessian @ weight)).sum(1) / (units * (hessian @ units)).sum(1)
    _, refitted = refit_scales(weight, rounded, hessian, coding, form)
    torch.testing.assert_close(refitted.scale[:, 0], expected, rtol=1e-6, atol=0)


def test_tables_reach_least_squares() -> None:
    """LNQ's closed form: the table that minimises |w - P t| in the norm of H, P the indicator of the codes."""
    hessian, weight = damped(drawn_gram(12, 4).mean, 0.01), drawn_weight(12, 1, 4)
    table = learned_table(weight, torch.ones(1, 12), 4)
    coding = Coding(grid("codebook2"), torch.zeros(12, dtype=torch.int64), torch.ones(1, 1, 1).double(), None, table)
    rounded = coding.nearest(weight)
    chosen = torch.nn.functional.one_hot(coding.codes(rounded)[0, 0].long(), 4).double()
    normal = chosen.T @ hessian[0] @ chosen
    expected = torch.linalg.solve(normal, chosen.T @ hessian[0] @ weight[0])
    for _ in range(200):
        rounded, coding = refit_table(weight, rounded, hessian, coding)
    assert coding.table is not None
    closed = weight[0] - chosen @ expected
    best = float((closed * (hessian[0] @ closed)).sum())
    assert float(objective(weight, rounded, hessian)) <= best * 1.01 + 1e-9
