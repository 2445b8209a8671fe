"""Observers: what is remembered of a tensor that streams by.

A Histogram holds the exact minimum and maximum and a histogram of fixed size whose range doubles as data asks for it, so
memory does not grow with the number of batches. Large tensors enter the histogram by a strided sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphoptError

BINS = 2048
SAMPLE = 1 << 16  # values of one tensor of one batch that enter the histogram
_STRIDE_OFFSET = 1  # an odd stride does not fall in step with channel counts, which are even


@dataclass
class Histogram:
    """Distribution of the finite values of one tensor, over all batches seen.

    Attributes:
        low, high: exact minimum and maximum.
        edge: the histogram covers [-edge, edge] in BINS equal bins.
        counts: float64 [BINS].
    """

    low: float = float("inf")
    high: float = float("-inf")
    edge: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))

    @property
    def empty(self) -> bool:
        return self.low > self.high

    def update(self, values: Tensor, name: str) -> None:
        """Add a tensor; GraphoptError where it holds NaN or infinity."""
        if values.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(values.detach().float()))
        if not np.isfinite(low) or not np.isfinite(high):
            raise GraphoptError(
                f"calibration met NaN or infinity at {name}; check the calibration data, or keep that place float with skip"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover(max(abs(low), abs(high)))
        if self.edge > 0:
            sample = _sample(values)
            counts = torch.histc(sample, BINS, -self.edge, self.edge).to(torch.float64)
            self.counts += counts.numpy() * (values.numel() / sample.numel())

    def merge(self, other: Histogram) -> None:
        """Add what another histogram has seen."""
        if other.empty:
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
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
            # A power of two, so that the edges of any two histograms are a whole number of doublings apart.
            self.edge = float(2.0 ** np.ceil(np.log2(magnitude)))
        while self.edge < magnitude:
            self.counts, self.edge = _fold(self.counts), self.edge * 2


def _fold(counts: np.ndarray) -> np.ndarray:
    """Return the same counts over twice the range: neighbours merge into the middle half."""
    wide = np.zeros(BINS)
    wide[BINS // 4 : 3 * BINS // 4] = counts.reshape(-1, 2).sum(axis=1)
    return wide


def _sample(values: Tensor) -> Tensor:
    flat = values.detach().reshape(-1)
    if flat.numel() > SAMPLE:
        flat = flat[:: (flat.numel() // SAMPLE) | _STRIDE_OFFSET]
    return flat.float()
