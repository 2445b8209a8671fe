"""Ranges: what a group of weights is clipped to, by hand and by a finer search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_matrices import drawn_weight

from graphopt.errors import GraphoptError
from graphopt.quantization.coding import Form, WeightRange, fit
from graphopt.quantization.grids import grid


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["int4", "uint3", "int8", "e2m1", "ternary", "nf4"]),
    st.sampled_from([-1, 0, 2, 3, 16]),
    st.booleans(),
    st.sampled_from(["minmax", "percentile", "mse"]),
    st.integers(0, 1000),
)
def test_ranges_hold_zero_and_mse_is_no_worse(
    name: str, group: int, symmetric: bool, range: WeightRange, seed: int
) -> None:
    weight = drawn_weight(7, 5, seed, parts=2)
    form = Form(grid(name), group, symmetric, range, percentile=90)
    coding = fit(weight, form)
    assert coding.scale.shape == (2, 1 if group <= 0 or group > 7 else -(-7 // group), 5)
    assert bool((coding.scale > 0).all())
    assert torch.equal(coding.nearest(torch.zeros_like(weight)), torch.zeros_like(weight))
    if group < 0:
        assert bool((coding.scale == coding.scale[:1, :, :1]).all())
    if range == "mse":
        plain = fit(weight, Form(grid(name), group, symmetric, "minmax"))
        cost, other = ((each.nearest(weight) - weight).square().sum() for each in (coding, plain))
        assert cost <= other * (1 + 2e-3)  # scales in float16


def test_minmax_by_hand() -> None:
    weight = torch.tensor([[[-3.0, 0.0], [1.0, 0.0], [5.0, 2.0]]], dtype=torch.float64)
    coding = fit(weight, Form(grid("uint4"), 2, symmetric=False))
    assert coding.scale.shape == (1, 2, 2)
    torch.testing.assert_close(
        coding.scale[0], torch.tensor([[4 / 15, 1], [5 / 15, 2 / 15]], dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert coding.zero_point is not None
    assert coding.zero_point[0].tolist() == [[11, 0], [0, 0]]


def test_mse_finds_the_best_of_a_fine_search() -> None:
    weight = torch.randn(1, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 9
    found = fit(weight, Form(grid("int4"), range="mse", half_scales=False))
    scales = torch.linspace(0.02, 1.0, 4000, dtype=torch.float64) * 9 / 7
    costs = torch.stack([(grid("int4").nearest(weight, s) - weight).square().sum() for s in scales])
    cost = (found.nearest(weight) - weight).square().sum()
    assert cost <= costs.min() * 1.05


def test_percentile_of_a_channel() -> None:
    weight = torch.arange(1.0, 101)[None, :, None].double()
    coding = fit(weight, Form(grid("int8"), range="percentile", percentile=95, half_scales=False))
    assert float(coding.scale) == pytest.approx(95 / 127)


def test_entropy_clips_an_outlier_and_refuses_groups() -> None:
    weight = drawn_weight(4000, 1, 0)
    weight[0, 0] = 40
    coding = fit(weight, Form(grid("int8"), range="entropy"))
    assert float(coding.scale) < 20 / 127
    with pytest.raises(GraphoptError, match="range='mse'"):
        Form(grid("int8"), 64, range="entropy")
    with pytest.raises(GraphoptError, match="for integer grids, not e2m1"):
        fit(weight, Form(grid("e2m1"), range="entropy"))


def test_block_formats_want_their_block() -> None:
    with pytest.raises(GraphoptError, match="mxfp4 has a scale for 32 elements; give group_size=32"):
        Form(grid("mxfp4"), 64)


def test_tiny_channels_do_not_cost_the_others_their_sixteen_bits() -> None:
    weight = torch.tensor([1.0, 1e-6, 0.0])[None, None]
    assert fit(weight, Form(grid("int8"))).scale.flatten().tolist() == pytest.approx([1 / 127, 2**-16, 1], rel=1e-3)
    tiny = fit(weight * 1e-6, Form(grid("int8")))  # all of it is small: float32 it is
    assert tiny.scale.flatten()[0].item() == pytest.approx(1e-6 / 127, rel=1e-6)
