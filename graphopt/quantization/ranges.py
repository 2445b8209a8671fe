"""Ranges: from a distribution to scale and zero point.

    minmax       all that was seen
    percentile   all but the given share at either end
    mse          the clipping that minimises the expected squared error of rounding and clipping, values being spread
                 evenly within a bin of the histogram
    entropy      the clipping that minimises KL(clipped || quantized), after "8-bit Inference with TensorRT"

`mse` and `entropy` search both ends together, then in turns, as fractions of what was seen: an outlier on one side must
not cost the other side its resolution. Zero is always inside, so that padding and ReLU are exact, and a range that
starts at zero has its zero point at the grid's smallest code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.calibration.observers import Histogram
from graphopt.errors import GraphoptError
from graphopt.quantization.grids import Grid, IntegerGrid
from graphopt.quantization.grids.base import SMALLEST_SCALE

Observer = Literal["minmax", "percentile", "mse", "entropy"]
_Cost = Callable[[float, float], float]  # of a range, its ends given
# Dense where the best clipping of bell-shaped data lies, sparse down to where only far outliers push it.
_FRACTIONS = np.concatenate([np.linspace(1.0, 0.5, 26), np.geomspace(0.5, 0.02, 20)[1:]])
_TURNS = 2


def choose_range(
    seen: Histogram, grid: IntegerGrid, observer: Observer, percentile: float = 99.99
) -> tuple[float, float]:
    """Return (low, high), low <= 0 <= high, for the distribution `seen`."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if seen.empty or low == high:
        return 0.0, 0.0
    if observer == "percentile":
        return _percentile(seen, percentile, low, high)
    if observer == "minmax":
        return low, high
    cost = (_squared_error if observer == "mse" else _divergence)(seen, grid)
    # Both ends together first: with a far outlier on either side, moving one end alone gains nothing.
    both = _best(lambda fraction: cost(fraction * low, fraction * high))
    best_low, best_high = both * low, both * high
    for _ in range(_TURNS if low and high else 0):  # with one end at zero that was the whole search
        before = best_low
        best_high = high * _best(functools.partial(_with_high, cost, best_low, high))
        best_low = low * _best(functools.partial(_with_low, cost, low, best_high))
        if best_low == before:
            break  # the next turn would ask the same questions
    return best_low, best_high


def scale_and_zero_point(
    seen: Histogram, grid: Grid, observer: Observer, percentile: float = 99.99, symmetric: bool = False
) -> tuple[float, int]:
    """Return (scale, zero point) for the distribution `seen` on any grid; the zero point is 0 where there is none.

    For floating-point grids a searched scale is a searched exponent bias ("LLM-FP4: 4-Bit Floating-Point Quantized
    Transformers"). Raises GraphoptError for entropy on another than an integer grid.
    """
    if isinstance(grid, IntegerGrid) and grid.affine and not symmetric:
        low, high = choose_range(seen, grid, observer, percentile)
        return affine(low, high, grid)
    largest = 0.0 if seen.empty else max(-seen.low, seen.high, 0.0)
    if largest and observer == "percentile":
        low, high = _percentile(seen, percentile, min(seen.low, 0.0), max(seen.high, 0.0))
        largest = max(-low, high)
    elif largest and observer == "mse":
        largest *= _best(functools.partial(_rounding_error, seen, grid, largest))
    elif largest and observer == "entropy":
        if not isinstance(grid, IntegerGrid):
            raise GraphoptError(f"the entropy observer is for integer grids, not {grid.name}; take mse")
        mirrored = Histogram()
        mirrored.merge(seen)
        mirrored.counts = mirrored.counts + mirrored.counts[::-1]
        mirrored.low, mirrored.high = -largest, largest
        largest = choose_range(mirrored, grid, observer)[1]
    scale = float(np.float32(largest / grid.ends[1]))
    return (scale, 0) if scale >= SMALLEST_SCALE else (1.0, 0)


def _rounding_error(seen: Histogram, grid: Grid, largest: float, fraction: float) -> float:
    """Return the sum of squared errors of the bins' middles, with a scale that clips at a fraction of the largest."""
    middles = torch.from_numpy(seen.centers())
    scale = torch.tensor(fraction * largest / grid.ends[1], dtype=torch.float64)
    error = grid.nearest(middles, scale) - middles
    return float(seen.counts @ error.square().numpy())


def _best(cost: Callable[[float], float]) -> float:
    """Return the fraction with the smallest cost, of equal ones the widest."""
    return float(_FRACTIONS[int(np.argmin([cost(float(fraction)) for fraction in _FRACTIONS]))])


def _with_high(cost: _Cost, low: float, end: float, fraction: float) -> float:
    return cost(low, fraction * end)


def _with_low(cost: _Cost, end: float, high: float, fraction: float) -> float:
    return cost(fraction * end, high)


def affine(low: float, high: float, grid: IntegerGrid) -> tuple[float, int]:
    """Return (scale, zero point) of the asymmetric grid over [low, high], which holds zero; the scale is a float32."""
    scale = float(np.float32((high - low) / (grid.code_max - grid.code_min)))
    if scale < SMALLEST_SCALE:
        return 1.0, grid.code_min if low == 0 else 0
    zero_point = round(grid.code_min - low / scale)
    return scale, min(max(zero_point, grid.code_min), grid.code_max)


def symmetric_scale(weight: Tensor, grid: IntegerGrid, axis: int) -> Tensor:
    """Return float64 [channels]: max|w| of each channel over the grid's largest code; 1 for a channel of zeros.

    `weight`: [..., channels at `axis`, ...]. The smallest code stays unused, so that codes are symmetric.
    """
    others = [dim for dim in range(weight.dim()) if dim != axis % weight.dim()]
    largest = weight.to(torch.float64).abs()
    largest = largest.amax(dim=others) if others else largest
    scale = (largest / grid.code_max).to(torch.float32).to(torch.float64)
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)


def _percentile(seen: Histogram, percentile: float, low: float, high: float) -> tuple[float, float]:
    share = (100.0 - percentile) / 100.0
    cumulative = np.cumsum(seen.counts) / max(seen.counts.sum(), 1.0)
    edges = seen.centers() + seen.edge / len(seen.counts)
    first = int(np.searchsorted(cumulative, share, side="right"))
    last = min(int(np.searchsorted(cumulative, 1.0 - share)), len(edges) - 1)
    cut_low = float(edges[first - 1]) if first > 0 else low
    return max(low, min(cut_low, 0.0)), min(high, max(float(edges[last]), 0.0))


def _squared_error(seen: Histogram, grid: IntegerGrid) -> _Cost:
    """Return the cost of a range: the sum of squared errors of all values, integrated over each bin exactly."""
    occupied = seen.counts > 0
    counts, centers, half = seen.counts[occupied], seen.centers()[occupied], seen.edge / len(seen.counts)
    # Nothing lies beyond the minimum and maximum, which are known exactly; a constant leaves a bin of no width.
    first, last = np.maximum(centers - half, seen.low), np.minimum(centers + half, seen.high)
    thin = last - first < 1e-6 * half
    first, last = np.where(thin, first - 5e-7 * half, first), np.where(thin, last + 5e-7 * half, last)
    edges, density = np.stack([first, last]), counts / (last - first)

    def cost(low: float, high: float) -> float:
        scale, zero_point = affine(low, high, grid)
        before, behind = _integrated_error(edges / scale, grid, zero_point)
        return float(density @ (behind - before)) * scale**3

    return cost


def _integrated_error(steps: np.ndarray, grid: IntegerGrid, zero_point: int) -> np.ndarray:
    """Return the integral from 0 to `steps` of the squared distance to the grid, in steps.

    Within a cell around the code k it is (steps - k)^3 / 3, and 1/12 a full cell; beyond the outermost codes the
    distance goes on growing.
    """
    nearest = np.rint(steps)
    np.minimum(nearest, grid.code_max - zero_point, out=nearest)
    np.maximum(nearest, grid.code_min - zero_point, out=nearest)
    away = steps - nearest
    area: np.ndarray = nearest / 12 + away * away * away / 3  # numpy's power takes many times as long
    return area


def _divergence(seen: Histogram, grid: IntegerGrid) -> _Cost:
    """Return the cost of a range: KL between the clipped distribution and its image on the grid.

    The image of a code is spread evenly over the bins that it came from.
    """
    counts, centers = seen.counts, seen.centers()
    return functools.partial(_divergence_of, counts, centers, grid)


def _divergence_of(counts: np.ndarray, centers: np.ndarray, grid: IntegerGrid, low: float, high: float) -> float:
    scale, zero_point = affine(low, high, grid)
    codes = (
        np.clip(np.round(centers / scale) + zero_point, grid.code_min, grid.code_max).astype(np.int64) - grid.code_min
    )
    inside = (centers >= low - scale / 2) & (centers <= high + scale / 2)
    clipped = np.where(inside, counts, 0.0)
    below, above = counts[centers < low - scale / 2].sum(), counts[centers > high + scale / 2].sum()
    positions = np.flatnonzero(inside)
    if positions.size == 0:
        return float("inf")
    clipped[positions[0]] += below
    clipped[positions[-1]] += above
    held = np.where(inside, counts, 0.0)
    occupied = held > 0
    mass = np.bincount(codes, weights=held, minlength=grid.code_max - grid.code_min + 1)
    members = np.bincount(codes, weights=occupied.astype(float), minlength=mass.size)
    image = np.where(occupied, mass[codes] / np.maximum(members[codes], 1.0), 0.0)
    p, q = clipped / clipped.sum(), image / max(image.sum(), 1e-300)
    # A bin that holds only clipped mass has no image: a small floor makes that dear, not infinite.
    support = p > 0
    return float(np.sum(p[support] * np.log(p[support] / np.maximum(q[support], 1e-9))))
