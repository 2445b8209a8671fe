"""Which coordinates a reader can do without, and what its weights become: least squares over calibration data.

A reader gives X W + b for its inputs X. Fitted to a target T over the data it has

    W* = A C,    A = (X^T X + D)^-1,    C = X^T T + D W0                        D: damping, which pulls towards W0

Removing the inputs g (a channel's taps, a head's columns) and fitting the rest again costs exactly

    tr W_g^T (A_gg)^-1 W_g,       W <- W - A_:g (A_gg)^-1 W_g,       A <- A - A_:g (A_gg)^-1 A_g:

so coordinates go one after the other, each time the one that costs least, and every step knows the error that it
leaves ("Optimal Brain Surgeon and general network pruning", by groups of inputs instead of single weights). Several
readers of one space add up their costs, each relative to what its target varies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.quantization.objectives import damped, shrinkage

_DAMPING = 1e-4
_TOGETHER = 512  # rows multiplied at once: of fewer, writing the product to memory would take longer than computing it
_AT_ONCE = 64  # rounds at least: what a round takes away was chosen before any of it was gone


@dataclass(eq=False)
class Normal:
    """The normal equations of a reader, summed over a stream: K inputs and a constant one, R outputs.

    Attributes:
        inputs, outputs: K and R. constant: whether there is a bias to fit.
        count: rows seen. total: sum of the targets [R]. squares: of their squares.
    """

    inputs: int
    outputs: int
    constant: bool
    count: int = 0
    total: Tensor = field(init=False)
    squares: float = 0.0
    _gram: Tensor = field(init=False)
    _cross: Tensor = field(init=False)
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = self.inputs + self.constant
        self._gram = torch.zeros(size, size, dtype=torch.float64)
        self._cross = torch.zeros(size, self.outputs, dtype=torch.float64)
        self.total = torch.zeros(self.outputs, dtype=torch.float64)

    def update(self, x: Tensor, target: Tensor) -> None:
        """Add rows x [T, K] and what they should give [T, R]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.constant:
            wide = torch.cat([wide, wide.new_ones(len(wide), 1)], 1)
        target = target.to(wide.dtype)
        self._waiting.append((wide, target))
        if sum(len(rows) for rows, _ in self._waiting) >= _TOGETHER:
            self._multiply()
        self.total += target.sum(0)
        self.squares += float(target.double().square().sum())
        self.count += len(x)

    def _multiply(self) -> None:
        if self._waiting:
            wide, target = (torch.cat(each) for each in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._gram += wide.mT @ wide
            self._cross += wide.mT @ target

    @property
    def gram(self) -> Tensor:
        """X^T X, [K + constant, K + constant]."""
        self._multiply()
        return self._gram

    @property
    def cross(self) -> Tensor:
        """X^T T, [K + constant, R]."""
        self._multiply()
        return self._cross

    @property
    def variance(self) -> float:
        """What the target varies around its mean, summed over outputs and rows."""
        return max(self.squares - float(self.total.square().sum()) / max(self.count, 1), 1e-300)


class Fit:
    """A reader fitted to its target, from which groups of inputs are taken away.

    Args:
        normal: its equations.
        weight: W0 [K + constant, R], what damping pulls towards.
        labels: [K], the coordinate that each input belongs to; -1: an input that stays.
        damping: D, relative to the mean of the diagonal of X^T X; more where rows are few, or that is singular.
    """

    def __init__(self, normal: Normal, weight: Tensor, labels: Tensor, damping: float = _DAMPING) -> None:
        gram = normal.gram
        few = shrinkage(gram[None] / max(normal.count, 1), torch.tensor([float(normal.count)], dtype=gram.dtype))
        extra = damped(gram[None], few.clamp(min=damping))[0] - gram
        if normal.constant:
            extra[-1, -1] = 0  # a constant is seen in every row
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + extra))
        # What was always zero costs nothing, and keeps its weight as long as it stays.
        silent = gram.diagonal() <= 0
        linear = normal.cross + torch.where(silent, 0.0, extra.diagonal())[:, None] * weight.double()
        self._fitted = self._inverse @ linear
        self._silent = torch.where(silent[:, None], weight.double(), 0.0)
        self._normal = normal
        self.groups = {label: (labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()) - {-1})}

    @property
    def weight(self) -> Tensor:
        """The weight [K + constant, R] of what is left; zeros elsewhere."""
        return self._fitted + self._silent

    def costs(self) -> tuple[Tensor, Tensor]:
        """Return the coordinates that are left, and what removing each of them costs, relative to the variance."""
        left, found = [], [torch.zeros(0, dtype=torch.float64)]
        for size in sorted({len(group) for group in self.groups.values()}):
            alike = {label: group for label, group in self.groups.items() if len(group) == size}
            index = torch.stack(list(alike.values()))  # [G, m]
            blocks = self._inverse[index[:, :, None], index[:, None, :]]
            values = self._fitted[index]
            solved = torch.linalg.solve(blocks, values)
            left += list(alike)
            found.append((values * solved).sum((1, 2)) / self._normal.variance)
        return torch.tensor(left, dtype=torch.int64), torch.cat(found)

    def remove(self, coordinates: Sequence[int]) -> float:
        """Take coordinates away and fit what is left again; return what that costs, relative to the variance."""
        gone = [self.groups.pop(each) for each in coordinates if each in self.groups]
        if not gone:
            return 0.0
        index = torch.cat(gone)
        block = self._inverse[index][:, index]
        column = self._inverse[:, index]
        step = torch.linalg.solve(block, torch.cat([self._fitted[index], self._inverse[index]], 1))
        outputs = self._fitted.shape[1]
        cost = float((self._fitted[index] * step[:, :outputs]).sum()) / self._normal.variance
        self._fitted.addmm_(column, step[:, :outputs], alpha=-1)
        self._inverse.addmm_(column, step[:, outputs:], alpha=-1)
        for values in (self._fitted, self._inverse, self._silent):
            values[index] = 0
        self._inverse[:, index] = 0
        return max(cost, 0.0)

    def error(self) -> float:
        """Return the squared error of the fit over the data, relative to what the target varies."""
        normal = self._normal
        fitted = float((self._fitted * (normal.gram @ self._fitted - 2 * normal.cross)).sum()) + normal.squares
        return max(fitted, 0.0) / normal.variance


class Unfitted:
    """A sum over coordinates in which nothing can be fitted: what goes is missing.

    Of terms t_k that add up, those that are gone leave the error 1_g^T H 1_g with H_kl = sum over the data of t_k t_l.
    Of an unfitted reader H = X^T X * W W^T, of scores q k^T of an attention H = Q^T Q * K^T K, entry by entry.

    Args:
        products: H [K, K]. labels: [K], the coordinate that each term belongs to; -1: one that stays.
        variance: what errors are relative to.
    """

    def __init__(self, products: Tensor, labels: Tensor, variance: float) -> None:
        self._left = sorted(set(labels.tolist()) - {-1})
        held = (torch.tensor(self._left)[:, None] == labels).to(products.dtype)
        self._products = held @ products @ held.mT
        self._gone = torch.zeros(len(self._left), dtype=torch.bool)
        self._variance = max(variance, 1e-300)

    def costs(self) -> tuple[Tensor, Tensor]:
        """Return the coordinates that are left, and what removing each of them costs, relative to the variance."""
        with_gone = self._products[:, self._gone].sum(1)
        costs = (self._products.diagonal() + 2 * with_gone) / self._variance
        return torch.tensor(self._left)[~self._gone], costs[~self._gone]

    def remove(self, coordinates: Sequence[int]) -> float:
        """Take coordinates away; return what that costs, relative to the variance."""
        before = self.error()
        for each in set(coordinates) & set(self._left):
            self._gone[self._left.index(each)] = True
        return self.error() - before

    def error(self) -> float:
        """Return the squared error over the data, relative to the variance."""
        return float(self._products[self._gone][:, self._gone].sum()) / self._variance


def eliminate(
    fits: Sequence[Fit | Unfitted],
    coordinates: int,
    remove: int,
    fibres: int = 1,
    show: Mapping[int, Callable[[], None]] | None = None,
) -> tuple[Tensor, list[float]]:
    """Remove coordinates from all fits that read them, each time those that cost least, one of every fibre.

    Args:
        fits: readers of one space of `coordinates` coordinates, as many in each of `fibres` fibres, fibre after fibre.
        remove: how many go of each fibre.
        show: is called when so many of each fibre are gone and the fits are what is left then.

    Returns which go [remove, fibres], numbered within their fibre, first first, and what it costs that 0, 1, 2 ... of
    each fibre are gone, summed over the fits.
    """
    gone = torch.zeros(0, fibres, dtype=torch.int64)
    first = torch.arange(fibres) * (coordinates // fibres)
    errors = [0.0]
    while len(gone) < remove:
        costs = torch.zeros(coordinates, dtype=torch.float64)
        for fit in fits:
            left, found = fit.costs()
            costs.index_add_(0, left, found)
        costs[(first + gone).flatten()] = torch.inf
        count = max(1, (remove - len(gone)) // _AT_ONCE)
        count = min([count, *(stop - len(gone) for stop in show or () if stop > len(gone))])
        chosen = costs.view(fibres, -1).argsort(dim=-1, stable=True)[:, :count].mT
        cost = sum(fit.remove((first + chosen).flatten().tolist()) for fit in fits)
        gone = torch.cat([gone, chosen])
        if show and len(gone) in show:
            show[len(gone)]()
        errors += [max(errors[-1] + cost, 0.0)] * count
    return gone, errors
