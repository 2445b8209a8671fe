"""Figures of how hard values are to quantize, against closed forms and a direct computation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.analysis.numerics import Summary, kurtosis, max_to_median, qsur, quantization_sqnr_db, quantized_rows

ROWS = torch.randn(4000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_kurtosis_of_known_distributions() -> None:
    assert kurtosis(ROWS) == pytest.approx(3, abs=0.1)
    assert kurtosis(torch.linspace(-1, 1, 100001)) == pytest.approx(1.8, abs=1e-3)  # uniform
    assert kurtosis(torch.tensor([1.0, -1.0])) == 1  # the smallest there is


def test_max_to_median_by_hand() -> None:
    assert max_to_median(torch.tensor([[1.0, 2.0, -8.0], [3.0, 3.0, 3.0], [0.0, 0.0, 5.0]])) == (4 + 1) / 2


@given(st.integers(2, 8), st.integers(0, 99))
def test_quantized_rows_are_the_nearest_levels(bits: int, seed: int) -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    top = 2 ** (bits - 1) - 1
    for row, made in zip(x, quantized_rows(x, bits), strict=True):
        levels = torch.arange(-top, top + 1) * row.abs().max() / top
        nearest = (row[:, None] - levels).abs().amin(1)
        torch.testing.assert_close((row - made).abs(), nearest, rtol=0, atol=1e-12)


def test_a_bit_is_worth_six_decibels() -> None:
    ratios = [quantization_sqnr_db(ROWS, bits) for bits in (6, 7, 8, 9)]
    assert [b - a for a, b in itertools.pairwise(ratios)] == pytest.approx([6.02] * 3, abs=0.3)


def test_qsur_of_a_ball_and_of_an_ellipsoid() -> None:
    """A ball fills π/6 of its cube; one axis ten times as long leaves (π/6 / 100) of the cube around it."""
    exact = torch.linalg.qr(ROWS[:, :3] - ROWS[:, :3].mean(0)).Q  # mean 0, covariance a multiple of the identity
    assert qsur(exact) == pytest.approx((math.pi / 6) ** (1 / 3), rel=2e-3)
    stretched = exact * torch.tensor([10.0, 1.0, 1.0])
    assert qsur(stretched) == pytest.approx((math.pi / 6 / 100) ** (1 / 3), rel=2e-2)


def test_qsur_of_few_rows_is_that_of_the_whole_covariance() -> None:
    """Fewer rows than coordinates take another way to the determinant: both agree where their numbers meet."""
    rows = ROWS[:20, :16]
    wide = torch.cat((rows, torch.zeros(20, 16)), 1)  # 20 rows of 32: by the Gram matrix of rows
    doubled = torch.cat((wide, wide))  # 40 rows with the same covariance
    assert qsur(wide) == pytest.approx(qsur(doubled), rel=1e-9)


def test_a_rotation_that_spreads_an_outlier_improves_every_figure() -> None:
    x = ROWS.clone()
    x[:, 3] *= 40
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))) / 2**0.5
    before, after = Summary.of(x, 4), Summary.of(x @ hadamard, 4)
    assert before.sqnr_db is not None and after.sqnr_db is not None
    assert after.kurtosis < before.kurtosis / 3
    assert after.max_to_median < before.max_to_median / 3
    assert after.sqnr_db > before.sqnr_db
    assert after.qsur > before.qsur * 1.5


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.zeros(3, 4), torch.ones(3, 4), torch.ones(1, 1)])
def test_degenerate_values_have_figures(x: torch.Tensor) -> None:
    plain = Summary.of(x, 8).plain
    assert all(value is None or math.isfinite(value) for value in plain.values())
    assert plain["sqnr_db"] is None
