"""Ranges against brute force on the raw data, and the properties of scales and zero points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt.calibration import Histogram
from graphopt.quantization import ranges
from graphopt.quantization.grids import IntegerGrid, grid
from graphopt.quantization.ranges import Observer, affine, choose_range, symmetric_scale

GRIDS = [IntegerGrid(bits, signed) for bits in (2, 4, 8, 16) for signed in (False, True)]
OBSERVERS: tuple[Observer, ...] = get_args(Observer)
UINT8 = grid("uint8")


def seen(data: Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(data, "x")
    return histogram


def quantized(data: Tensor, low: float, high: float, on: IntegerGrid) -> Tensor:
    scale, zero = affine(low, high, on)
    codes = on.encode(data, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))
    return on.decode(codes, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))


def squared_error(data: Tensor, low: float, high: float, on: IntegerGrid = UINT8) -> float:
    return float((quantized(data.double(), low, high, on) - data.double()).square().mean())


def draw(name: str, count: int = 20_000) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    kinds: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: normal,
        "relu": lambda: normal.relu(),
        "negative": lambda: -normal.abs() - 0.5,
        "shifted": lambda: normal + 3,
        "laplace": lambda: normal.sign() * -uniform.log(),
        "outlier": lambda: torch.cat([normal, torch.tensor([60.0])]),
        "two outliers": lambda: torch.cat([normal, torch.tensor([60.0, -35.0])]),
        "uniform": lambda: uniform,
        "gelu": lambda: torch.nn.functional.gelu(2 * normal),
        "tiny": lambda: 1e-20 * normal,
        "huge": lambda: 1e30 * normal,
    }
    return kinds[name]()


KINDS = (
    "normal",
    "relu",
    "negative",
    "shifted",
    "laplace",
    "outlier",
    "two outliers",
    "uniform",
    "gelu",
    "tiny",
    "huge",
)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_range_holds_zero_and_lies_within_what_was_seen(kind: str, observer: Observer) -> None:
    data = draw(kind)
    for on in GRIDS:
        low, high = choose_range(seen(data), on, observer)
        assert isinstance(low, float) and isinstance(high, float)
        assert min(data.min().item(), 0) <= low <= 0 <= high <= max(data.max().item(), 0) and low < high


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=8), st.sampled_from(OBSERVERS), st.sampled_from(GRIDS)
)
def test_small_data(data: list[float], observer: Observer, on: IntegerGrid) -> None:
    low, high = choose_range(seen(torch.tensor(data)), on, observer)
    assert min([*data, 0.0]) <= low <= 0.0 <= high <= max([*data, 0.0])
    scale, zero = affine(low, high, on)
    assert scale > 0 and math.isfinite(scale) and on.code_min <= zero <= on.code_max


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("data", [[], [0.0], [0.0, 0.0]])
def test_nothing_or_zeros(data: list[float], observer: Observer) -> None:
    assert choose_range(seen(torch.tensor(data)), UINT8, observer) == (0.0, 0.0)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [5.0, -5.0, 1e-3])
def test_a_constant_is_met_exactly(value: float, observer: Observer) -> None:
    data = torch.full((100,), value)
    low, high = choose_range(seen(data), UINT8, observer)
    assert quantized(data, low, high, UINT8).sub(data).abs().max() <= abs(value) * 1e-6


def test_minmax_is_exact() -> None:
    data = draw("shifted")
    assert choose_range(seen(data), UINT8, "minmax") == (min(data.min().item(), 0.0), data.max().item())
    assert choose_range(seen(-data), UINT8, "minmax") == (-data.max().item(), max(0.0, -data.min().item()))


@pytest.mark.parametrize("share", [100.0, 99.99, 99.0, 90.0, 60.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_numpys_to_a_bin(kind: str, share: float) -> None:
    data = draw(kind)
    histogram = seen(data)
    low, high = choose_range(histogram, UINT8, "percentile", share)
    bin_width = 2 * histogram.edge / len(histogram.counts)
    expected = [np.percentile(data.numpy().astype(np.float64), each) for each in (100 - share, share)]
    assert abs(low - min(expected[0], 0.0)) <= 1.01 * bin_width
    assert abs(high - max(expected[1], 0.0)) <= 1.01 * bin_width


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_a_full_search_on_the_data(kind: str, bits: int) -> None:
    data, on = draw(kind, 3000), IntegerGrid(bits, signed=False)
    low, high = choose_range(seen(data), on, "mse")
    ends = [
        float(bound(each, torch.zeros(())))
        for bound, each in ((torch.minimum, data.min()), (torch.maximum, data.max()))
    ]
    steps = [1.0, 0.85, 0.7, 0.5, 0.3, 0.12, 0.05]
    lows, highs = ({step * end for step in steps} for end in ends)
    best = min(squared_error(data, a, b, on) for a, b in itertools.product(lows, highs))
    assert squared_error(data, low, high, on) <= 1.05 * best + 1e-12 * float(data.double().square().mean())


@pytest.mark.parametrize("on", GRIDS, ids=lambda on: on.name)
@pytest.mark.parametrize("clip", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("kind", ["normal", "uniform", "shifted", "outlier"])
def test_the_cost_of_mse_is_the_squared_error_of_the_data(kind: str, clip: float, on: IntegerGrid) -> None:
    data = draw(kind)
    low, high = clip * min(data.min().item(), 0.0), clip * max(data.max().item(), 0.0)
    histogram = seen(data)
    found = ranges._squared_error(histogram, on)(low, high) / histogram.counts.sum()
    assert found == pytest.approx(squared_error(data, low, high, on), rel=0.05)


def direct_divergence(histogram: Histogram, low: float, high: float, on: IntegerGrid) -> float:
    """KL(P || Q) from its definition, bin by bin: P clipped, Q each code's mass spread over its occupied bins."""
    scale, zero = affine(low, high, on)
    centers, counts = histogram.centers(), histogram.counts
    inside = [i for i, c in enumerate(centers) if low - scale / 2 <= c <= high + scale / 2]
    if not inside:
        return math.inf
    p = {i: counts[i] for i in inside}
    p[inside[0]] += sum(counts[i] for i in range(len(counts)) if centers[i] < low - scale / 2)
    p[inside[-1]] += sum(counts[i] for i in range(len(counts)) if centers[i] > high + scale / 2)
    cells: dict[int, list[int]] = {}
    for i in inside:
        if counts[i] > 0:
            code = min(max(round(centers[i] / scale) + zero, on.code_min), on.code_max)
            cells.setdefault(code, []).append(i)
    q = {i: sum(counts[j] for j in cell) / len(cell) for cell in cells.values() for i in cell}
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(
        v / total_p * math.log((v / total_p) / max(q.get(i, 0.0) / max(total_q, 1e-300), 1e-9))
        for i, v in p.items()
        if v > 0
    )


@pytest.mark.parametrize("on", [IntegerGrid(8, False), IntegerGrid(4, True)], ids=lambda on: on.name)
@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "outlier"])
def test_entropy_minimises_the_divergence_as_defined(kind: str, on: IntegerGrid) -> None:
    histogram = seen(draw(kind, 3000))
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    cost = ranges._divergence(histogram, on)
    for clip in (1.0, 0.7, 0.3, 0.05):
        direct = direct_divergence(histogram, clip * low, clip * high, on)
        assert cost(clip * low, clip * high) == pytest.approx(direct, rel=1e-9, abs=1e-12)
    chosen = cost(*choose_range(histogram, on, "entropy"))
    both_ends = [cost(clip * low, clip * high) for clip in (1.0, 0.9, 0.8, 0.7, 0.5)]
    assert chosen <= min(both_ends) + 1e-3


@pytest.mark.parametrize("observer", ["mse", "entropy"])
def test_an_outlier_on_one_side_does_not_cost_the_other(observer: Observer) -> None:
    data = draw("outlier", 200_000)
    low, high = choose_range(seen(data), UINT8, observer)
    assert high < 30 and low < -3  # sixty on one side, four on the other


@pytest.mark.parametrize("bits", [3, 4])
def test_outliers_on_both_sides_are_clipped_together(bits: int) -> None:
    """Moving one end alone gains nothing while the other keeps the step coarse."""
    data, on = draw("two outliers"), IntegerGrid(bits, signed=False)
    low, high = choose_range(seen(data), on, "mse")
    assert -20 < low < -1 and 1 < high < 30
    assert squared_error(data, low, high, on) < 0.5 * squared_error(data, -35.0, 60.0, on)


bound = st.floats(0, 1e30).filter(lambda value: value == 0 or value > 1e-30)


@given(bound, bound, st.sampled_from(GRIDS))
def test_affine_grids(below: float, above: float, on: IntegerGrid) -> None:
    scale, zero = affine(-below, above, on)
    assert scale > 0 and math.isfinite(scale) and scale == float(np.float32(scale))
    assert isinstance(zero, int) and on.code_min <= zero <= on.code_max
    if below == 0 and above > 0:
        assert zero == on.code_min
    if above == 0 and below > 0:
        assert zero == on.code_max
    inside = torch.linspace(-below, above, 301, dtype=torch.float64)
    found = quantized(inside, -below, above, on)
    slack = 2.0**-23 * (on.code_max - on.code_min)  # of the scale's own rounding, over all codes
    if below or above:
        assert (found - inside).abs().max().item() <= scale * (0.5 + slack)
    assert quantized(torch.zeros(1), -below, above, on).item() == 0.0


@pytest.mark.parametrize("on", GRIDS, ids=lambda on: on.name)
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-1e-42, 0.0), (0.0, 1e-44), (-3.4e38, 3.4e38), (-1e-37, 1e-37)])
def test_affine_at_the_ends_of_float32(low: float, high: float, on: IntegerGrid) -> None:
    scale, zero = affine(low, high, on)
    assert np.isfinite(scale) and scale >= np.finfo(np.float32).tiny
    assert on.code_min <= zero <= on.code_max
    assert quantized(torch.zeros(1), low, high, on).item() == 0.0


@pytest.mark.parametrize("on", [IntegerGrid(bits, signed=True) for bits in (2, 4, 8)], ids=lambda on: on.name)
@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 0), ((4, 3), 1), ((4, 3), -1), ((5,), 0), ((2, 3, 4, 5), 1)])
def test_symmetric_scales(shape: tuple[int, ...], axis: int, on: IntegerGrid) -> None:
    weight = torch.randn(shape)
    weight.select(axis, 0).zero_()
    scale = symmetric_scale(weight, on, axis)
    assert scale.dtype == torch.float64 and scale.shape == (shape[axis],)
    for channel in range(shape[axis]):
        row = weight.select(axis, channel).double()
        largest = row.abs().max().item()
        if largest == 0:
            assert scale[channel] == 1.0
            continue
        # The smallest step that clips nothing, on the codes that have a negative.
        assert scale[channel].item() == pytest.approx(largest / on.code_max, rel=1e-7)
        codes = (row / scale[channel]).round()
        assert codes.abs().max() == on.code_max
        assert (codes * scale[channel] - row).abs().max() <= scale[channel] * (0.5 + 1e-5)


def test_symmetric_scale_of_weights_at_the_ends() -> None:
    weight = torch.tensor([[1e-42, -1e-43], [3e38, -1.0], [1e-30, 0.0]])
    scale = symmetric_scale(weight, grid("int8"), 0)
    assert scale[0] == 1.0 and bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert scale[2].item() == pytest.approx(1e-30 / 127, rel=1e-6)
    assert symmetric_scale(torch.zeros(0, 3), grid("int8"), 0).shape == (0,)
