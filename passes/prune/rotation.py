"""Turn spaces so that few of their coordinates explain what is there; the others can go.

    A = sum over the data of x x^T    of what is written      B = sum of w w^T, or of k k^T, of what reads it

    free under any matrix      x -> T x, w -> T^-T w with T A T^T = T^-T B T^-1 = diag(s): what goes with coordinate c
                               is s_c^2, and no other choice of so many coordinates leaves less
    free under rotations       T: the eigenvectors of A, whose norms read x
                               ("Compress Large Language Models by Deleting Rows and Columns", where each layer has
                               a T of its own; here all layers share one, and nothing is put on the skips)

Values and outputs, queries and keys of an attention are of the first kind (where no rotary embedding stands between),
residual streams of the second once the affine of their norms is folded. What a nonlinearity reads stays as it is.

Principal coordinates hold very different amounts, which no quantizer likes: in the end what is left is rotated once
more, so that every coordinate holds as much as every other.

Both are exact; what stands between is not.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces import Analysis, Read, Space, Symmetry, analyze
from graphopt.calibration import observe
from graphopt.errors import GraphoptError
from graphopt.ir import Program, Rewriter
from graphopt.ir.hadamard import orthogonal
from graphopt.passes.prune.candidates import Candidate
from graphopt.passes.transform.reparameterize import Reparameterization
from graphopt.pipeline import Context

_LEAST = 1e-5  # of a coordinate's share, relative to the largest: below it a matrix is not inverted

Place = frozenset[tuple[str, tuple[int, ...]]]  # where a space is read, which no rewriting of weights changes


def turn(rewriter: Rewriter, analysis: Analysis, candidates: Sequence[Candidate], context: Context) -> set[Place]:
    """Turn the spaces of candidates that are free to; return where these are. Analyses made before no longer hold."""
    program = rewriter.program
    free: dict[tuple[str, tuple[int, ...]], Space] = {}
    for symmetry in (Symmetry.ORTHOGONAL, Symmetry.GENERAL):  # the wider one last
        free |= {(each.name, (*each.fibres, each.size)): each for each in analysis.under(symmetry) if each.free}
    shapes = [(each.space.name, (*each.space.fibres, each.space.size)) for each in candidates]
    spaces = [free[shape] for shape in shapes if shape in free]
    seen = _moments(program, spaces, context)
    edits = Reparameterization(rewriter)
    for space in spaces:
        written, read = _two_sides(program, space, seen)
        if space.symmetry is Symmetry.GENERAL:
            change = _balanced(written, read)
        else:
            change = torch.linalg.eigh(written).eigenvectors.mT.flip(-2)
        edits.apply(space, change)
        rewriter.touch(space.members[0].weight, f"{space.name}: turned to its principal coordinates")
    edits.commit()
    return {_place(space) for space in spaces}


def spread(rewriter: Rewriter, places: Collection[Place], seed: int) -> None:
    """Rotate the spaces that were turned so that their coordinates hold alike much."""
    edits = Reparameterization(rewriter)
    for space in analyze(rewriter.program).under(Symmetry.ORTHOGONAL):
        if space.free and _place(space) in places:
            start, count = zlib.crc32(space.name.encode()) + seed, math.prod(space.fibres)
            each = [orthogonal(space.size, start + index, "hadamard", 0).mT for index in range(count)]
            edits.apply(space, torch.stack(each).reshape(space.shape))
    edits.commit()


def _place(space: Space) -> Place:
    return frozenset((read.node.name, read.dims) for read in space.reads)


def _two_sides(program: Program, space: Space, seen: Mapping[tuple[str, Read], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the moments [*fibres, n, n] of what takes a change as it is, and of what takes its inverse transpose.

    Of a space of rotations, under which the two are alike, all activations are in the first. Each reader counts as much
    as every other.
    """
    sides = [torch.zeros(*space.fibres, space.size, space.size, dtype=torch.float64) for _ in range(2)]
    general = space.symmetry is Symmetry.GENERAL

    def add(moment: Tensor, side: bool) -> None:
        sides[side] += moment / moment.diagonal(dim1=-2, dim2=-1).sum().clamp(min=1e-300)

    for each in space.reads:
        add(seen[space.name, each], each.dual and general)
    for member in space.members if general else ():
        if "reads" in member.role:
            rows = space.gather(member, program.weight(member.node)).double()
            add(torch.einsum("r...i,r...j->...ij", rows, rows), member.dual)
    return sides[0], sides[1]


def _balanced(written: Tensor, read: Tensor) -> Tensor:
    """Return T [..., n, n] with T A T^T = T^-T B T^-1 = diag(s), s descending, up to damping."""
    eye = torch.eye(written.shape[-1], dtype=written.dtype)
    mean = written.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    root = torch.linalg.cholesky(written + torch.where(mean > 0, _LEAST * mean, 1.0) * eye)
    squares, vectors = torch.linalg.eigh(root.mT @ read @ root)
    values = squares.clamp(min=0).sqrt().flip(-1)
    values = torch.where(values[..., :1] > 0, values.maximum(_LEAST * values[..., :1]), 1.0)
    change: Tensor = values.sqrt()[..., None] * torch.linalg.solve_triangular(root.mT, vectors.flip(-1), upper=True).mT
    return change


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
        if not bool(rows.isfinite().all()):
            raise GraphoptError(f"calibration met NaN or infinity at {name}; check the calibration data")
        self.total += torch.einsum("r...i,r...j->...ij", rows, rows)


@dataclass(eq=False)
class _Several:
    all: list[_Moment] = field(default_factory=list)

    def update(self, values: Tensor, name: str) -> None:
        for each in self.all:
            each.update(values, name)
