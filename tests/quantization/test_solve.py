"""One matrix, every choice: channels that know of each other, side information, and what is combined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_matrices import drawn_gram, drawn_weight
from torch import Tensor

from graphopt.quantization.coding import Form, fit
from graphopt.quantization.grids import grid, known_grids
from graphopt.quantization.objectives import Gram
from graphopt.quantization.rounding import (
    objective,
)
from graphopt.quantization.solve import Choices, Quantized, quantize_matrix, relative_error


def total_cost(weight: Tensor, made: Quantized, gram: Gram, outputs: Tensor) -> float:
    error = (weight - made.value())[0].double()
    return float(((gram.mean[0] @ error @ outputs) * error).sum())


@pytest.mark.parametrize("name", ["uint3", "int2", "e2m1", "codebook2"])
def test_channels_that_know_of_each_other_do_less_harm(name: str) -> None:
    """tr G E^T H E falls against channels on their own, and G = I changes next to nothing."""
    gains = []
    for seed in range(4):
        gram, weight = drawn_gram(32, seed), drawn_weight(32, 96, seed)
        outputs = drawn_gram(96, seed + 50).mean[0]
        choices = Choices(Form(grid(name), 0 if name == "codebook2" else 8, False, "mse"), "gptq", sweeps=1)
        alone, together = (quantize_matrix(weight, choices, gram, each) for each in (None, outputs))
        gains.append(total_cost(weight, together, gram, outputs) / total_cost(weight, alone, gram, outputs))
        same = quantize_matrix(weight, choices, gram, torch.eye(96, dtype=torch.float64))
        assert relative_error(weight, same, gram) == pytest.approx(relative_error(weight, alone, gram), rel=0.02)
    assert np.mean(gains) < 0.9


def test_scales_that_hang_together_leave_channels_on_their_own() -> None:
    gram, weight, outputs = drawn_gram(32, 0), drawn_weight(32, 40, 0), drawn_gram(40, 1).mean[0]
    for form in (Form(grid("nvfp4"), 16), Form(grid("int4"), -1)):
        alone, together = (quantize_matrix(weight, Choices(form, "gptq"), gram, each) for each in (None, outputs))
        assert torch.equal(alone.codes, together.codes)


# Side information ---------------------------------------------------------------------------------------------


def planted(inputs: int = 32, channels: int = 16) -> tuple[Tensor, Gram]:
    weight, gram = drawn_weight(inputs, channels, 5), drawn_gram(inputs, 5)
    weight[0, 3] *= 12
    weight[0, 7, 2] = 40
    return weight, gram


def test_the_column_that_costs_most_is_kept_exactly() -> None:
    weight, gram = planted()
    form = Form(grid("int3"), 8, range="minmax")
    made = quantize_matrix(weight, Choices(form, "gptq", columns=1 / 32, sweeps=2), gram)
    clipped = fit(weight, Form(grid("int3"), 8, range="mse"), gram.mean.diagonal(dim1=-2, dim2=-1)).nearest(weight)
    scores = (clipped - weight).square().sum((0, 2)) * gram.damped(0.01)[0].diagonal()
    assert made.columns.tolist() == [int(scores.argmax())]
    plain = quantize_matrix(weight, Choices(form, "gptq", sweeps=2), gram)
    assert relative_error(weight, made, gram) < relative_error(weight, plain, gram)
    assert made.bits() - plain.bits() == 16 * 16 + 32


def test_single_outliers_are_kept_and_counted() -> None:
    weight, gram = planted()
    form = Form(grid("int3"), 0)
    made = quantize_matrix(weight, Choices(form, "gptq", outliers=24 / 512, sweeps=1), gram)
    assert made.outliers is not None
    assert int((made.outliers != 0).sum()) == 24
    assert float(made.outliers[0, 7, 2]) != 0
    plain = quantize_matrix(weight, Choices(form, "gptq", sweeps=1), gram)
    assert relative_error(weight, made, gram) < 0.5 * relative_error(weight, plain, gram)
    assert made.bits() - plain.bits() == 24 * (16 + 32)


def test_low_rank_is_the_best_for_what_is_left() -> None:
    """Eckart-Young in the norm of H: what remains after rank r is the sum of the other singular values squared."""
    weight, gram = planted()
    form = Form(grid("int2"), 8)
    made = quantize_matrix(weight, Choices(form, "gptq", rank=3), gram)
    hessian = gram.damped(0.01)
    assert made.left is not None
    rest = weight - made.coded()
    root = torch.linalg.cholesky(hessian).mT
    singular = torch.linalg.svdvals(root @ rest)[0]
    cost = float(objective(weight, made.value(), hessian).sum())
    assert cost == pytest.approx(float(singular[3:].square().sum()), rel=2e-2)
    plain = quantize_matrix(weight, Choices(form, "gptq"), gram)
    assert relative_error(weight, made, gram) < relative_error(weight, plain, gram)
    assert made.bits() - plain.bits() == 16 * 3 * (32 + 16)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name, form in known_grids().items() if form.bits <= 8]),
    st.sampled_from(["nearest", "gptq"]),
    st.sampled_from([0, -1, 5]),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0, 2]),
    st.integers(1, 2),
    st.booleans(),
)
def test_every_combination_runs(
    name: str,
    rounding: str,
    group: int,
    symmetric: bool,
    columns: float,
    outliers: float,
    rank: int,
    parts: int,
    informed: bool,
) -> None:
    weight = drawn_weight(11, 6, 0, parts).float()
    form = Form(grid(name), grid(name).block or group, symmetric, "mse")
    choices = Choices(form, rounding, columns=columns, outliers=outliers, rank=rank, sweeps=1)  # type: ignore[arg-type]
    made = quantize_matrix(weight, choices, drawn_gram(11, 0, parts) if informed else None)
    value = made.value()
    assert value.shape == weight.shape
    assert bool(value.isfinite().all())
    assert made.codes.shape == (parts, 6, 11)
    torch.testing.assert_close(made.coding.nearest(made.coded()), made.coded())
    assert made.bits() >= form.grid.packed_bits(made.codes.numel())


def test_nothing_to_round() -> None:
    made: Quantized = quantize_matrix(torch.zeros(1, 0, 3), Choices(Form(grid("int4"), 8), "gptq"), Gram(1, 0))
    assert made.value().shape == (1, 0, 3)
