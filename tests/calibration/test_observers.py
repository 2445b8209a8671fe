"""The histogram against numpy: mass, ends, merging, sampling, and numbers at the edge of what floats hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt.calibration import Histogram
from graphopt.calibration.observers import BINS, SAMPLE
from graphopt.errors import GraphoptError

number = st.floats(width=32, allow_nan=False, allow_infinity=False)
values = st.lists(number, min_size=1, max_size=30)


def seen(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch, "x")
    return histogram


def expected(data: np.ndarray, edge: float) -> np.ndarray:
    edges = np.linspace(-1.0, 1.0, BINS + 1)  # multiples of 2^-10: exact, which np.histogram's own range is not
    return np.histogram(data.astype(np.float64) / (edge or 1.0), edges)[0].astype(float)


@given(values)
def test_one_batch_is_numpys_histogram(data: list[float]) -> None:
    histogram, array = seen(torch.tensor(data)), np.array(data, np.float32)
    assert (histogram.low, histogram.high) == (array.min(), array.max())
    largest = float(np.abs(array).max())
    assert histogram.edge == 0 if largest == 0 else largest <= histogram.edge < 2 * largest
    assert math.log2(histogram.edge or 1.0).is_integer()
    np.testing.assert_array_equal(histogram.counts, expected(array, histogram.edge))


@given(st.lists(values, min_size=1, max_size=6))
def test_streaming_and_merging_are_one_large_batch(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    whole, streamed = seen(torch.cat(tensors)), seen(*tensors)
    merged = Histogram()
    for each in tensors:
        merged.merge(seen(each))
    for each in (streamed, merged):
        assert (each.low, each.high, each.edge) == (whole.low, whole.high, whole.edge)
        assert each.counts.sum() == whole.counts.sum() == sum(map(len, batches))
        assert np.abs(np.cumsum(each.counts) - np.cumsum(whole.counts)).max() <= _on_the_upper_end(batches)
    np.testing.assert_array_equal(streamed.counts, merged.counts)


@given(st.lists(values, min_size=1, max_size=6))
def test_merging_in_any_order_is_the_same(batches: list[list[float]]) -> None:
    one, other = Histogram(), Histogram()
    for each in batches:
        one.merge(seen(torch.tensor(each)))
    for each in reversed(batches):
        other.merge(seen(torch.tensor(each)))
    assert (one.low, one.high, one.edge) == (other.low, other.high, other.edge)
    np.testing.assert_array_equal(one.counts, other.counts)


def _on_the_upper_end(batches: list[list[float]]) -> int:
    """Count powers of two: as the largest value seen so far they fall into the last bin, later into the next one."""
    return sum(value > 0 and math.frexp(value)[0] == 0.5 for batch in batches for value in batch)


def test_zeros_seen_first_are_not_forgotten() -> None:
    late = seen(torch.zeros(100), torch.ones(1))
    assert late.counts.sum() == 101
    np.testing.assert_array_equal(late.counts, seen(torch.cat([torch.zeros(100), torch.ones(1)])).counts)
    merged = seen(torch.zeros(100))
    merged.merge(seen(torch.tensor([3.0])))
    assert merged.counts.sum() == 101 and (merged.low, merged.high) == (0.0, 3.0)


@pytest.mark.parametrize(
    "data",
    [
        torch.full((7,), 5.0),
        torch.full((7,), -5.0),
        torch.zeros(7),
        torch.tensor(2.5),
        -torch.rand(100) - 1,
        torch.tensor([1e-45, -1e-45, 0.0]),
        torch.tensor([3.4e38, -3.4e38, 1.0]),
        torch.tensor([1e30, -2.0]),
        torch.tensor([1e300, -1e-300], dtype=torch.float64),
        torch.randn(50).to(torch.bfloat16),
        torch.tensor([65504.0, -65504.0], dtype=torch.float16),
        torch.tensor([5, -3, 0]),
        torch.tensor([True, False]),
        torch.randn(6, 5, 4).permute(2, 0, 1)[:, ::2],
    ],
    ids=lambda data: f"{data.dtype}{list(data.shape)}",
)
def test_odd_tensors(data: Tensor) -> None:
    histogram = seen(data, data)
    assert histogram.low == data.min().item() and histogram.high == data.max().item()
    assert histogram.counts.sum() == 2 * data.numel()
    centers = histogram.centers()
    assert np.isfinite(centers).all()
    low, high = (centers[histogram.counts > 0][end] for end in (0, -1))
    width = 2 * histogram.edge / BINS
    assert abs(low - histogram.low) <= width and abs(high - histogram.high) <= width


def test_nothing_seen() -> None:
    histogram = seen(torch.zeros(0, 3))
    assert histogram.empty and histogram.counts.sum() == 0
    other = seen(torch.ones(2))
    other.merge(histogram)
    assert other.counts.sum() == 2
    histogram.merge(other)
    assert (histogram.low, histogram.high) == (1.0, 1.0) and not histogram.empty


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_and_leaves_no_mark(bad: float) -> None:
    histogram = seen(torch.ones(3))
    with pytest.raises(GraphoptError, match="calibration met NaN or infinity at conv_3;"):
        histogram.update(torch.tensor([1.0, bad, 9.0]), "conv_3")
    assert (histogram.low, histogram.high, histogram.counts.sum()) == (1.0, 1.0, 3)


@pytest.mark.parametrize("channels", [2, 3, 5, 7, 64, 96, 768, 1000])
def test_a_sample_sees_every_channel(channels: int) -> None:
    """A fixed stride that shares a divisor with the number of channels sees some of them never."""
    rows = 3 * SAMPLE // channels + 1
    data = torch.zeros(rows, channels)
    data[:, 0] = 1.0  # one channel holds what the others do not
    histogram = seen(data)
    share = histogram.counts[BINS - BINS // 4 :].sum() / histogram.counts.sum()
    assert histogram.counts.sum() == pytest.approx(data.numel())
    error = math.sqrt(1 / channels * (1 - 1 / channels) / SAMPLE)
    assert abs(share - 1 / channels) < 5 * error


def test_sampling_is_unbiased_and_repeats_itself() -> None:
    data = torch.randn(40, 101, 97)
    histogram = seen(data)
    full = np.histogram(data.numpy() / histogram.edge, BINS, (-1, 1))[0]
    distance = np.abs(np.cumsum(histogram.counts) - np.cumsum(full)).max() / data.numel()
    assert distance < 2 / math.sqrt(SAMPLE)  # Kolmogorov-Smirnov, far in the tail
    np.testing.assert_array_equal(histogram.counts, seen(data).counts)
    # Another batch is sampled elsewhere: its mistakes do not add up.
    twice = seen(data, data)
    assert not np.array_equal(twice.counts, 2 * histogram.counts)
    assert (histogram.low, histogram.high) == (data.min().item(), data.max().item())


def test_size_does_not_depend_on_what_was_seen() -> None:
    histogram = seen(*(torch.randn(100) * 2.0**i for i in range(30)))
    assert histogram.counts.shape == (BINS,) and histogram.counts.sum() == 3000
