"""Observers: what is remembered of a tensor that streams by.

A Histogram holds the exact minimum and maximum and a histogram of fixed size whose range doubles as data asks for it,
so memory does not grow with the number of batches. Large tensors enter the histogram by a sample.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphoptError

BINS = 2048
# Values of one tensor of one batch that enter the histogram: as many as torch works on without waking its thread pool.
SAMPLE = 1 << 15
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, less their whole parts, keep apart
FEW = 8  # batches after which a quarter of that will do


class Observer(Protocol):
    """What is shown every value of one node."""

    def update(self, values: Tensor, name: str) -> None:
        """Take a tensor in; `name` is its node's."""


@dataclass(eq=False)
class Histogram:
    """Distribution of the finite values of one tensor, over all batches seen.

    Attributes:
        low, high: exact minimum and maximum.
        edge: the histogram covers [-edge, edge] in BINS equal bins, each with its lower end; 0 while only zeros were
            seen, else a power of two.
        counts: values a bin, float64 [BINS].
        updates: tensors seen; it seeds the samples.
    """

    low: float = float("inf")
    high: float = float("-inf")
    edge: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    updates: int = 0

    @property
    def empty(self) -> bool:
        return self.low > self.high

    def update(self, values: Tensor, name: str) -> None:
        """Add a tensor; GraphoptError where it holds NaN or infinity."""
        if values.numel() == 0:
            return
        plain = values.detach()
        wide = plain if plain.dtype in (torch.float32, torch.float64) else plain.float()
        low, high = (float(bound) for bound in torch.aminmax(wide))
        if not math.isfinite(low) or not math.isfinite(high):
            raise GraphoptError(
                f"calibration met NaN or infinity at {name}; check the calibration data, or keep that place float with "
                "skip"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover(max(abs(low), abs(high)))
        flat = wide.reshape(-1).numpy(force=True)
        size = SAMPLE if self.updates < FEW else SAMPLE // 4
        sample = flat if flat.size <= size else flat[_positions(flat.size, size, self.updates)]
        self.updates += 1
        # The edge is a power of two: the product is exact, and a value falls into the same bin however the range grew.
        bins = np.floor(sample.astype(np.float64) * (BINS // 2 / (self.edge or 1.0))).astype(np.intp) + BINS // 2
        counts = np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)
        self.counts += counts * (flat.size / sample.size)

    def merge(self, other: Histogram) -> None:
        """Add what another histogram has seen."""
        if other.empty:
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.updates += other.updates
        counts, edge = other.counts.copy(), other.edge
        self._cover(edge)
        while 0 < edge < self.edge:
            counts, edge = _fold(counts), edge * 2
        self.counts += counts

    def centers(self) -> np.ndarray:
        """Return the middle of every bin, float64 [BINS]."""
        width = 2 * self.edge / BINS
        return -self.edge + width * (np.arange(BINS) + 0.5)

    def _cover(self, magnitude: float) -> None:
        if magnitude == 0:
            return
        if self.edge == 0:
            # A power of two, so that the edges of any two histograms are a whole number of doublings apart. Zeros seen
            # before lie at the lower end of the bin right of the middle, whatever the edge.
            mantissa, exponent = math.frexp(magnitude)
            self.edge = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
        while self.edge < magnitude:
            self.counts, self.edge = _fold(self.counts), self.edge * 2


def _fold(counts: np.ndarray) -> np.ndarray:
    """Return the same counts over twice the range: neighbours merge into the middle half."""
    wide = np.zeros(BINS)
    wide[BINS // 4 : 3 * BINS // 4] = counts.reshape(-1, 2).sum(axis=1)
    return wide


def _positions(count: int, size: int, seed: int) -> np.ndarray:
    """Return `size` of `count` positions: one drawn from each of `size` equal stretches, all shifted for each seed.

    A fixed stride would fall in step with the sizes of the tensor's axes and see some channels only.
    """
    shifted: np.ndarray = _drawn(count, size) + int(count * (seed * _GOLDEN_RATIO % 1))
    return np.where(shifted < count, shifted, shifted - count)


@functools.lru_cache(maxsize=32)
def _drawn(count: int, size: int) -> np.ndarray:
    offsets = np.random.default_rng(0).random(size)
    return np.minimum(((np.arange(size) + offsets) * (count / size)).astype(np.intp), count - 1)
