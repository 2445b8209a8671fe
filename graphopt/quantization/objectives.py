"""Objectives: what an error in a weight costs.

    plain      sum_k (w_k - q_k)^2                     for every output channel
    Gram       (w - q)^T H (w - q),   H = sum_t r_t x_t x_t^T / sum_t r_t over the inputs x_t of the layer

A Gram matrix H makes the cost the squared error of the layer's outputs over the calibration data. The weights r_t of
the tokens are 1, or what attention or the gradients of the loss say of a token; a group of output channels may have its
own (`parts`). Where the quantized layer will see other inputs x' than the original one saw, H is over x' and

    sum_t |W x_t - Q x'_t|^2  =  tr (W' - Q) H (W' - Q)^T + const,    W' = W C H^-1,   C = sum_t x_t x'_t^T

so that the rounding of W' also undoes what the layers before have done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.errors import GraphoptError

_ROWS = 1 << 14  # inputs multiplied in float32 at a time, before the sum goes on in float64
_TOGETHER = 512  # of these multiplied at once: of fewer, writing the product takes longer than computing it
_FLOOR = 1e-7  # of the mean of the diagonal: what keeps a factorization alive at all


class _Sum:
    """A sum of products a^T b [P, K, K]: of some thousand rows in their own precision, over these in float64."""

    def __init__(self, parts: int, inputs: int) -> None:
        self._whole = torch.zeros(parts, inputs, inputs, dtype=torch.float64)
        self._recent: Tensor | None = None
        self._rows, self._name = 0, ""
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, a: Tensor, b: Tensor, name: str) -> None:
        """Add the product of a [P or 1, T, K] and b, which stand for the layer `name`."""
        first = self._waiting[0] if self._waiting else (a, b)
        if any(old.dtype != new.dtype or len(old) != len(new) for old, new in zip(first, (a, b), strict=True)):
            self._multiply()
        self._waiting.append((a, b))
        self._name = name
        if sum(each.shape[1] for each, _ in self._waiting) >= _TOGETHER:
            self._multiply()

    def _multiply(self) -> None:
        if not self._waiting:
            return
        left, right = zip(*self._waiting, strict=True)
        same = all(a is b for a, b in self._waiting)
        self._waiting = []
        a = torch.cat(left, 1)
        b = a if same else torch.cat(right, 1)
        if self._recent is not None and (self._recent.dtype != a.dtype or self._rows + a.shape[1] > _ROWS):
            self._fold()
        if self._recent is None:
            self._recent = a.mT @ b
        else:
            self._recent += a.mT @ b
        self._rows += a.shape[1]

    def value(self) -> Tensor:
        """Return the sum; GraphoptError where something in it was not finite."""
        self._multiply()
        self._fold()
        return self._whole

    def _fold(self) -> None:
        if self._recent is not None:
            if not bool(self._recent.isfinite().all()):
                raise GraphoptError(
                    "calibration met NaN or infinity, or numbers too large to square, at the input of "
                    f"{self._name}; check the calibration data, or keep that place float with skip"
                )
            self._whole += self._recent
            self._recent, self._rows = None, 0


@dataclass(eq=False)
class Gram:
    """Gram matrix of the inputs of a layer, summed over a stream.

    Attributes:
        parts, inputs: P parts of K inputs each.
        weight: sum of r_t, [P].
        squares: sum of r_t^2, [P].
        count: inputs seen.

    What is read of it is float64, and raises GraphoptError where `update` was given NaN or infinity.
    """

    parts: int
    inputs: int
    weight: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    count: int = 0
    _total: _Sum = field(init=False)
    _cross: _Sum | None = None

    def __post_init__(self) -> None:
        self.weight = torch.zeros(self.parts, dtype=torch.float64)
        self.squares = torch.zeros(self.parts, dtype=torch.float64)
        self._total = _Sum(self.parts, self.inputs)

    def update(self, x: Tensor, name: str, weights: Tensor | None = None, original: Tensor | None = None) -> None:
        """Add inputs x [P or 1, T, K].

        Args:
            x: what the quantized layer reads.
            name: of the layer, for messages.
            weights: r_t >= 0, [P or 1, T]; 1 where not given.
            original: what the original layer read in the place of x.
        """
        if x.shape[1] == 0:
            return
        for start in range(0, x.shape[1], _ROWS):
            here = slice(start, start + _ROWS)
            # float16 would overflow in its sums; float32 holds the product of a few thousand inputs to 1e-6.
            wide = x[:, here].to(torch.promote_types(x.dtype, torch.float32))
            scaled = wide if weights is None else wide * weights[:, here, None].to(wide.dtype)
            self._total.add(scaled, wide, name)
            if original is not None:
                self._cross = self._cross or _Sum(self.parts, self.inputs)
                self._cross.add(original[:, here].to(wide.dtype), scaled, name)
        self.weight += x.shape[1] if weights is None else weights.double().sum(1)
        self.squares += x.shape[1] if weights is None else weights.double().square().sum(1)
        self.count += x.shape[1]

    @property
    def mean(self) -> Tensor:
        """H [P, K, K]; zeros where nothing was seen."""
        return self._total.value() / self.weight.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]

    def damped(self, least: float) -> Tensor:
        """Return H + d mean(diag H) I [P, K, K], d as the number of inputs demands but not below `least`."""
        return damped(self.mean, torch.maximum(self.shrinkage(), self.weight.new_tensor(least)))

    def shrinkage(self) -> Tensor:
        """Return `shrinkage` of H [P]; n counts weighted inputs as (sum r_t)^2 / sum r_t^2."""
        return shrinkage(self.mean, self.weight.square() / self.squares.clamp(min=torch.finfo(torch.float64).tiny))

    def target(self, weight: Tensor, damping: float) -> Tensor:
        """Return W' [P, K, R] for W [P, K, R]: the weight that makes the most of the changed inputs."""
        if self._cross is None:
            return weight
        mean = self.damped(damping)
        cross = self._cross.value() / self.weight.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
        # What damping adds pulls towards W, not towards zero.
        extra = mean - self.mean
        solved: Tensor = torch.linalg.solve(mean, (cross + extra).mT @ weight.double())
        return solved.to(weight.dtype)


def shrinkage(mean: Tensor, n: Tensor) -> Tensor:
    """Return d [P] for which H + d mean(diag H) I is about as near to the H of all data as n inputs [P] allow.

    With r = (tr H)^2 / tr H^2 directions in use that is about r / n ("Shrinkage Algorithms for MMSE Covariance
    Estimation", the OAS estimate), at most 1. It is what rounding wants while n is at most half of K; with K inputs or
    more it wants next to nothing, as small eigenvalues are known by then, which that estimate does not look at: d falls
    to 0 in between. H [P, K, K], a mean over the inputs.
    """
    size = max(mean.shape[-1], 1)
    trace = mean.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    square = mean.square().sum((-2, -1))
    above, below = (1 - 2 / size) * square + trace, (n + 1 - 2 / size) * (square - trace / size)
    share = torch.where(below > 0, above / below, 0.0).clamp(0, 0.5)  # H a multiple of I needs none
    return share / (1 - share) * (2 - 2 * n / size).clamp(0, 1)


def damped(gram: Tensor, damping: Tensor | float) -> Tensor:
    """Return H + d mean(diag H) I, with d, or [P], raised from `damping` tenfold until H is safely positive.

    A Gram matrix of few samples, or of inputs that repeat each other, is singular, and rounding would chase noise along
    what it has not seen. Inputs that are always zero get the mean instead of nothing. H [P, K, K] float64.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    made = gram.clone()
    step = torch.as_tensor(damping, dtype=gram.dtype).clamp(min=_FLOOR).unsqueeze(-1) * mean
    made.diagonal(dim1=-2, dim2=-1).add_(torch.where(diagonal <= 0, mean, 0.0) + step)
    while bool(torch.linalg.cholesky_ex(made).info.any()):
        made.diagonal(dim1=-2, dim2=-1).add_(9 * step)
        step = 10 * step
    return made
