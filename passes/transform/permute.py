"""Reorder the coordinates of spaces, so that weights fit the form in which they will be stored.

    writers(W1)  ->  W1[π]          readers(W2)  ->  W2[:, π]

    range    coordinates in the order of the range that their readers hold: groups that share a scale become alike
    nm       an order in which N:M sparsity along the readers' input keeps more of their magnitude

The spaces are those that the analysis finds free under the symmetry `permutation`; where they have fibres (the
coordinates of each head) each is ordered by itself. A space whose figure would not improve is left as it is.

Exact, at no cost at run time. Source of the search for N:M: "Channel Permutations for N:M Sparsity" (with pairs of
coordinates drawn at random instead of all of them).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional

from graphopt.analysis.spaces import Symmetry, analyze
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter
from graphopt.passes.transform.reparameterize import Reparameterization
from graphopt.pipeline import Context, Pass

_ROUNDS = 200  # of swaps between all groups, two by two
_WORTH = 1e-6  # relative improvement below which an order is as good as another


@dataclass(frozen=True)
class Permute(Pass):
    """Reorder channels by range, for grouping, or for N:M sparsity.

    Attributes:
        by: "range": the ranges of groups of `group_size` become as small as they can; "nm": what the `n` largest of
            every `m` coordinates hold becomes as large as a search finds.
        group_size: coordinates that will share a scale.
        n, m: how many of how many will be kept.
    """

    by: Literal["range", "nm"] = "range"
    group_size: PositiveInt = 32
    n: PositiveInt = 2
    m: Annotated[int, Field(ge=2)] = 4

    def run(self, program: Program, context: Context) -> Changes:
        if self.n >= self.m:
            raise GraphoptError(f"permute.n={self.n} of m={self.m} keeps everything; n must be smaller than m")
        rewriter = Rewriter(program, self.name)
        edits = Reparameterization(rewriter)
        figures: dict[str, list[float]] = {}
        for space in analyze(program).under(Symmetry.PERMUTATION):
            readers = [member for member in space.members if "reads" in member.role]
            if not readers:
                continue
            where = space.members[0].weight
            if not space.free:
                rewriter.decline(where, f"{space.name} has a fixed order: {space.pins[0]}")
                continue
            columns = torch.cat([space.gather(each, edits.value(each.node)).abs() for each in readers])
            order, before, after = self._order(columns, context.seed + zlib.crc32(space.name.encode()))
            what = "range summed over groups" if self.by == "range" else "share of the magnitude kept"
            if order is None:
                rewriter.decline(where, f"{space.name} is in a good order: {what} {before:.4g}")
                continue
            edits.apply(space, order)
            figures[space.name] = [before, after]
            rewriter.touch(where, f"reordered {space.name} ({space.size}), {what} {before:.4g} -> {after:.4g}")
        rewriter.note(figures=figures)
        edits.commit()
        return rewriter.finish()

    def _order(self, columns: Tensor, seed: int) -> tuple[Tensor | None, float, float]:
        """Return an order [*fibres, n] of magnitudes [rest, *fibres, n], and its figure before and after.

        None in place of the order where it would not be better.
        """
        size = columns.shape[-1]
        fibres = columns.flatten(1, -2).unbind(1) if columns.dim() > 2 else [columns]
        generator = torch.Generator().manual_seed(seed)
        orders, before, after = [], 0.0, 0.0
        for fibre in fibres:
            plain = torch.arange(size)
            found = _by_range(fibre) if self.by == "range" else _for_sparsity(fibre, self.n, self.m, generator)
            was, now = (self._figure(fibre[:, order]) for order in (plain, found))
            better = now < was * (1 - _WORTH) if self.by == "range" else now > was * (1 + _WORTH)
            orders.append(found if better else plain)
            before, after = before + was / len(fibres), after + (now if better else was) / len(fibres)
        order = torch.stack(orders).reshape(columns.shape[1:])
        unchanged = bool((order == torch.arange(size)).all())
        return (None if unchanged else order), before, after

    def _figure(self, columns: Tensor) -> float:
        if self.by == "range":
            groups = torch.split(columns.amax(0), self.group_size)
            return float(sum(group.max() * len(group) for group in groups))
        total = float(columns.sum())
        return float(_kept(_grouped(columns, self.m), self.n).sum()) / total if total > 0 else 1.0


def _by_range(columns: Tensor) -> Tensor:
    return columns.amax(0).argsort(descending=True, stable=True)


def _grouped(columns: Tensor, m: int) -> Tensor:
    """Return [groups, rows, m]; the last group is filled up with zeros."""
    short = -columns.shape[1] % m
    padded = functional.pad(columns, (0, short))
    return padded.reshape(len(columns), -1, m).movedim(1, 0)


def _kept(groups: Tensor, n: int) -> Tensor:
    """Return for each group [groups, rows, m] what the n largest of each row sum up to."""
    return groups.topk(n, -1).values.sum((1, 2))


def _for_sparsity(columns: Tensor, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Swap coordinates of two groups where both together keep more then; groups meet at random."""
    groups = columns.shape[1] // m
    order = torch.arange(columns.shape[1])
    if groups < 2:
        return order
    for _ in range(_ROUNDS):
        meet = torch.randperm(groups, generator=generator)[: groups // 2 * 2].reshape(-1, 2)
        places = torch.randint(m, meet.shape, generator=generator)
        at = meet * m + places
        swapped = order.clone()
        swapped[at[:, 0]], swapped[at[:, 1]] = order[at[:, 1]], order[at[:, 0]]
        was, now = (_kept(_grouped(columns[:, each], m), n)[meet].sum(1) for each in (order, swapped))
        accepted = at[now > was]
        order[accepted[:, 0]], order[accepted[:, 1]] = order[accepted[:, 1]], order[accepted[:, 0]].clone()
    return order
