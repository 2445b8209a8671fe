"""How hard values are to quantize: figures of a set of vectors x [rows, n], whose rows share one scale each.

    kurtosis          E (x - μ)⁴ / σ⁴ over all elements         3 for normal numbers, more where few are large
    max_to_median     mean over rows of max|x| / median|x|      what a row's largest element costs the others
    sqnr_db           10 log10 Σ x² / Σ (Q(x) - x)²             Q: round to nearest, symmetric, a scale for each row
    qsur              (V(ellipsoid) / V(box))^(1/n)             the share of the quantization box that the data fill

The ellipsoid has the mean and covariance of the data and passes through its typical vectors, at a Mahalanobis distance
of √n; the box is the smallest cube around zero that holds it. Both volumes vanish as n grows, so the root is taken: it
is comparable between sizes. A rotation leaves the ellipsoid's volume and shrinks the box.

Source of qsur: "OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for
Better Distribution Fitting".
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-3  # of the mean variance, added to every direction: fewer rows than coordinates span no volume


@dataclass(frozen=True)
class Summary:
    """The figures of one place. `sqnr_db` is None where there is nothing to quantize or nothing is lost."""

    kurtosis: float
    max_to_median: float
    sqnr_db: float | None
    qsur: float

    @classmethod
    def of(cls, x: Tensor, bits: int) -> Summary:
        """Return the figures of x [..., n], whose last axis shares a scale, at so many bits."""
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        ratio = quantization_sqnr_db(rows, bits)
        return cls(kurtosis(rows), max_to_median(rows), ratio if math.isfinite(ratio) else None, qsur(rows))

    @property
    def plain(self) -> dict[str, float | None]:
        """The figures by name, rounded to four digits."""
        values = dataclasses.asdict(self)
        return {name: None if value is None else float(f"{value:.4g}") for name, value in values.items()}


def kurtosis(x: Tensor) -> float:
    """Return the fourth standardized moment over all elements; 0 where all are equal or there are none."""
    if x.numel() == 0:
        return 0.0
    centered = x.double() - x.double().mean()
    variance = centered.square().mean()
    return float(centered.pow(4).mean() / variance.square()) if variance > 0 else 0.0


def max_to_median(x: Tensor) -> float:
    """Return the mean over the rows of x [rows, n] of max|x| / median|x|; rows with a median of 0 do not count."""
    if x.numel() == 0:
        return 0.0
    magnitudes = x.double().abs()
    medians = magnitudes.median(-1).values
    used = medians > 0
    return float((magnitudes.amax(-1)[used] / medians[used]).mean()) if bool(used.any()) else 0.0


def quantized_rows(x: Tensor, bits: int) -> Tensor:
    """Return x [..., n] rounded to the nearest of 2^bits - 1 levels around zero, with a scale for each row."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / top
    return torch.clamp((x / scale).round_(), -top, top).mul_(scale)


def quantization_sqnr_db(x: Tensor, bits: int) -> float:
    """Return signal to quantization noise of x [rows, n] in dB; inf where nothing is lost."""
    wide = x.double()
    noise = float((quantized_rows(wide, bits) - wide).square().sum()) if x.numel() else 0.0
    return 10 * math.log10(float(wide.square().sum()) / noise) if noise > 0 else math.inf


def qsur(x: Tensor) -> float:
    """Return the n-th root of the share of the quantization box that x [rows, n] fills, between 0 and 1."""
    rows = x.double()
    count, size = rows.shape
    if count < 2 or not bool(rows.abs().sum() > 0):
        return 0.0
    mean = rows.mean(0)
    centered = (rows - mean) / math.sqrt(count)
    variances = centered.square().sum(0)
    floor = float(variances.mean()) * _RIDGE
    if not floor > 0:
        return 0.0
    # |εI + XᵀX| = |εI + XXᵀ| but for one ε for each further dimension: the smaller of the two will do.
    gram = centered.mT @ centered if count > size else centered @ centered.mT
    rest = max(size - count, 0)
    determinant = torch.linalg.slogdet(gram + floor * torch.eye(len(gram), dtype=torch.float64)).logabsdet
    radius = math.sqrt(size)
    # log V(unit ball) / n, by the gamma function, which itself would overflow.
    ball = 0.5 * math.log(math.pi) - math.lgamma(size / 2 + 1) / size
    ellipsoid = ball + math.log(radius) + (float(determinant) + rest * math.log(floor)) / (2 * size)
    half = (mean.abs() + radius * (variances + floor).sqrt()).max()
    return math.exp(ellipsoid - math.log(2 * float(half)))
