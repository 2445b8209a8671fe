"""Rotate spaces so that few of their coordinates explain what is there; the others can go.

    A = sum over the data of x x^T    of what is written      B = sum of w w^T, or of y y^T, of what reads it

    free under any matrix      x -> T x, w -> T^-T w with T A T^T = T^-T B T^-1 = diag(s): what goes with coordinate c
                               is s_c^2, and no other choice of so many coordinates leaves less
    free under rotations       T: the eigenvectors of A, whose norms read x; what goes with c is its variance
                               ("SliceGPT" turns each layer's stream by its own T; here all layers share one)
    free under permutations    T = 1; what goes with c is A_cc B_cc

Values and outputs, queries and keys of an attention are of the first kind (where no rotary embedding stands between),
residual streams of the second once the affine of their norms is folded, what a nonlinearity reads of the third.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces import Analysis, Read, Space, Symmetry
from graphopt.calibration import observe
from graphopt.ir import Program
from graphopt.passes.prune.candidates import Candidate
from graphopt.passes.prune.ranking import Order, by_score
from graphopt.pipeline import Context

_LEAST = 1e-5  # of a coordinate's share, relative to the largest: below it a matrix is not inverted


@dataclass(frozen=True)
class Explained:
    """What a space looks like when it is turned.

    Attributes:
        order: of its coordinates after the change.
        space: the space that is changed first, by `change`; None: none is.
    """

    order: Order
    space: Space | None = None
    change: Tensor | None = None


def explain(
    program: Program, analysis: Analysis, candidates: Sequence[Candidate], context: Context
) -> dict[Space, Explained]:
    """Return for each candidate's space how it is turned and in which order its coordinates then go."""
    free: dict[tuple[str, tuple[int, ...]], Space] = {}
    for symmetry in (Symmetry.ORTHOGONAL, Symmetry.GENERAL):  # the wider one last
        free |= {(each.name, (*each.fibres, each.size)): each for each in analysis.under(symmetry) if each.free}
    turned = {
        each.space: free.get((each.space.name, (*each.space.fibres, each.space.size)), each.space)
        for each in candidates
    }
    seen = _moments(program, list(turned.values()), context)
    return {own: _explained(program, own, space, seen) for own, space in turned.items()}


def _explained(program: Program, own: Space, space: Space, seen: Mapping[tuple[str, Read], Tensor]) -> Explained:
    written, read = _two_sides(program, space, seen)
    if space.symmetry is Symmetry.GENERAL:
        change, values = _balanced(written, read)
        scores = values.square()
    elif space.symmetry is Symmetry.ORTHOGONAL:
        values, vectors = torch.linalg.eigh(written)
        change, scores = vectors.mT.flip(-2), values.flip(-1).clamp(min=0)
    else:
        scores = written.diagonal(dim1=-2, dim2=-1) * read.diagonal(dim1=-2, dim2=-1)
    readers = max(len({each.node for each in space.reads}), 1)  # errors of other spaces add up over readers, too
    order = by_score(own, (scores / scores.sum().clamp(min=1e-300) * readers).reshape(-1, own.size))
    return Explained(order) if space is own else Explained(order, space, change)


def _two_sides(
    program: Program, space: Space, seen: Mapping[tuple[str, Read], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return A and B [*fibres, n, n]; each reader counts as much as every other."""
    sides = [torch.zeros(*space.fibres, space.size, space.size, dtype=torch.float64) for _ in range(2)]
    first = space.reads[0].dual if space.reads else False
    for each in space.reads:
        moment = seen[space.name, each]
        scale = moment.diagonal(dim1=-2, dim2=-1).sum().clamp(min=1e-300)
        # Under rotations both sides of a product turn alike.
        sides[space.symmetry is Symmetry.GENERAL and each.dual is not first] += moment / scale
    for member in space.members:
        if "reads" in member.role:
            rows = space.gather(member, program.weight(member.node)).double()
            moment = torch.einsum("r...i,r...j->...ij", rows, rows)
            sides[1] += moment / moment.diagonal(dim1=-2, dim2=-1).sum().clamp(min=1e-300)
    if not bool(sides[1].any()):  # a product reads both
        sides[1] = sides[0]
    return sides[0], sides[1]


def _balanced(written: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Return T [..., n, n] and s [..., n], descending, with T A T^T = T^-T B T^-1 = diag(s), up to damping."""
    eye = torch.eye(written.shape[-1], dtype=written.dtype)
    mean = written.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    root = torch.linalg.cholesky(written + _LEAST * mean * eye)
    squares, vectors = torch.linalg.eigh(root.mT @ read @ root)
    values = squares.clamp(min=0).sqrt().flip(-1)
    values = values.clamp(min=1e-300).maximum(_LEAST * values[..., :1])
    change = values.sqrt()[..., None] * torch.linalg.solve_triangular(
        root.mT, vectors.flip(-1), upper=True
    ).mT
    return change, values


def _moments(program: Program, spaces: Sequence[Space], context: Context) -> dict[tuple[str, Read], Tensor]:
    """Return sum of x x^T [*fibres, n, n] over the data for every read of the spaces."""
    moments = [_Moment(space, read) for space in spaces for read in space.reads]
    observers: dict[fx.Node, _Several] = {}
    for each in moments:
        observers.setdefault(each.read.source, _Several()).all.append(each)
    if observers:
        observe(program, observers, context.needed_calibration("prune"), context.progress)
    return {(each.space.name, each.read): each.total for each in moments}


@dataclass(eq=False)
class _Moment:
    space: Space
    read: Read

    def __post_init__(self) -> None:
        size = self.space.size
        self.total = torch.zeros(*self.space.fibres, size, size, dtype=torch.float64)

    def update(self, values: Tensor, name: str) -> None:
        last = list(self.read.dims)
        order = [dim for dim in range(values.dim()) if dim not in last] + last
        rows = self.space.gather_read(self.read, values.permute(order)).double()
        self.total += torch.einsum("r...i,r...j->...ij", rows, rows)


@dataclass(eq=False)
class _Several:
    all: list[_Moment] = field(default_factory=list)

    def update(self, values: Tensor, name: str) -> None:
        for each in self.all:
            each.update(values, name)
