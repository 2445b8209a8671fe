"""Rotate activation spaces, so that no few of their coordinates hold large values.

    writers(W)  ->  T W          readers(W)  ->  W Tᵀ          T Tᵀ = I, for every weight whose axis lies in the space

Where no weight can take the rotation, because a nonlinearity or a rotary embedding stands before, it is done online:

    reader(W, x)  ->  reader(W Qᵀ, x Q)          q kᵀ  ->  (q Q)(k Q)ᵀ          Q: a Hadamard transform

The spaces are those that the analysis finds free under the symmetry `orthogonal`. Norms keep the length of a vector
only: the affine of a norm is folded before and its mean subtraction moved into the writers. A norm whose output is
itself added to the space (post-norm, sandwich norm) pins it, unless one linear is put behind it (`explicit`).

Exact. Runs before anything that quantizes. Sources: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", "SpinQuant:
LLM Quantization with Learned Rotations" (whose R1 to R4 these are).
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from graphopt.analysis.spaces import Space, Symmetry, analyze
from graphopt.errors import GraphoptError
from graphopt.ir import Changes, Program, Rewriter
from graphopt.ir.hadamard import orthogonal
from graphopt.passes.transform.explicit_linears import put_linears_behind_norms
from graphopt.passes.transform.online_rotation import (
    Hidden,
    hidden_rotation,
    hidden_sites,
    query_key_sites,
    rotate_hidden,
    rotate_query_key,
)
from graphopt.passes.transform.reparameterize import Reparameterization
from graphopt.passes.transform.site_statistics import is_linear_read, observe_reads
from graphopt.pipeline import Context, Pass

_BATCHES = 8  # that the figures of the trace are taken from
_ORTHOGONALITY = 1e-6  # of a matrix from a file, which may be stored in float32


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate the residual stream and the values of attention; online also queries, keys and hidden activations.

    Attributes:
        kind: "hadamard": a Hadamard matrix with random signs, Kronecker a small orthogonal one where no order fits;
            "orthogonal": uniform over all orthogonal matrices.
        residual: rotate spaces that norms read (R1).
        values: rotate spaces inside of branches: value and output projections per key/value head (R2).
        queries_keys: transform queries and keys online, after their rotary embedding (R3).
        hidden: transform the inputs of down-projections online (R4).
        block_size: rotate blocks of so many coordinates apart; 0: the whole space.
        file: path of a .npy file with an orthogonal matrix Q [n, n], by which spaces of n coordinates that norms read
            are rotated, x -> x Q.
        explicit: where a norm writes a residual, or its affine is read by others than linears, put one linear behind
            it, which carries the rotation at run time.
        activation_bits: at which the trace tells the quantization error of what was rotated, where calibration data is
            given.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonicalize", "fold_layer_scale", "fold_norm_affine", "center_norms")

    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    residual: bool = True
    values: bool = True
    queries_keys: bool = False
    hidden: bool = False
    block_size: NonNegativeInt = 0
    file: str = ""
    explicit: bool = False
    activation_bits: Annotated[int, Field(ge=2, le=16)] = 4

    def run(self, program: Program, context: Context) -> Changes:
        given = _matrix(self.file) if self.file else None
        rewriter = Rewriter(program, self.name)
        if self.explicit:
            put_linears_behind_norms(rewriter)
        spaces = analyze(program).under(Symmetry.ORTHOGONAL)
        changes = {}
        for space in filter(self._wants, spaces):
            if space.free:
                changes[space.name] = space, self._change(space, given, context.seed)
            elif space.norms:
                why = "; ".join(str(pin) for pin in space.pins[:2])
                rewriter.decline(space.members[0].weight, f"{space.name} ({space.size}) cannot be rotated: {why}")
        scored = query_key_sites(program, spaces) if self.queries_keys else []
        hidden = hidden_sites(spaces, rewriter) if self.hidden else []
        if context.calibration is not None:
            rewriter.note(sites=self._numbers(changes.values(), hidden, program, context))
        edits = Reparameterization(rewriter)
        for space, change in changes.values():
            edits.apply(space, change)
            rewriter.touch(space.members[0].weight, f"rotated {space.name} ({space.size}), {_extent(space)}")
        edits.commit()
        for pair in scored:
            rotate_query_key(pair, self.block_size, rewriter)
        for site in hidden:
            rotate_hidden(site, self.block_size, rewriter)
        return rewriter.finish()

    def _numbers(
        self,
        changes: Collection[tuple[Space, Tensor]],
        hidden: list[Hidden],
        program: Program,
        context: Context,
    ) -> dict[str, dict[str, object]]:
        """Return for each linear that reads a rotated activation how hard that is to quantize before and after."""
        rotated = [(space, read, change) for space, change in changes for read in filter(is_linear_read, space.reads)]
        online = [(site, read) for site in hidden for read in site.reads]
        reads = [*(read for _, read, _ in rotated), *(read for _, read in online)]
        # Figures for the trace: a few batches tell as much.
        few = dataclasses.replace(context, calibration=context.needed_calibration(self.name).head(_BATCHES))
        statistics = observe_reads(program, reads, few)
        found = {}
        for space, read, change in rotated:
            after = functools.partial(space.transform_read, read, change=change)
            found[read.node.name] = statistics.numbers(read, after, self.activation_bits)
        for site, read in online:
            after = functools.partial(torch.matmul, other=hidden_rotation(site, self.block_size))
            found[read.node.name] = statistics.numbers(read, after, self.activation_bits)
        return found

    def _wants(self, space: Space) -> bool:
        return self.residual if space.norms else self.values

    def _change(self, space: Space, given: Tensor | None, seed: int) -> Tensor:
        """Return T [*fibres, n, n]: of spaces with fibres, one rotation for each."""
        if given is not None and space.norms and given.shape[0] == space.size:
            return given.mT
        if self.block_size and space.size % self.block_size:
            raise GraphoptError(
                f"rotate.block_size={self.block_size} does not divide the {space.size} coordinates of {space.name}"
            )
        start = zlib.crc32(space.name.encode()) + seed
        count = torch.Size(space.fibres).numel()
        each = [orthogonal(space.size, start + index, self.kind, self.block_size).mT for index in range(count)]
        return torch.stack(each).reshape(space.shape)


def _extent(space: Space) -> str:
    weights = len({member.weight for member in space.members})
    what = f"{weights} weights"
    return f"{what}, {' x '.join(str(size) for size in space.fibres)} rotations" if space.fibres else what


def _matrix(path: str) -> Tensor:
    """Read an orthogonal matrix; GraphoptError where the file holds none."""
    try:
        found = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise GraphoptError(f"rotate.file={path!r} cannot be read: {error}") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.ndim != 2 or len(set(found.shape)) > 1:
        raise GraphoptError(f"rotate.file={path!r} holds no square matrix of floats")
    matrix = torch.from_numpy(found.astype(np.float64))
    if not torch.allclose(matrix @ matrix.mT, torch.eye(len(matrix), dtype=torch.float64), atol=_ORTHOGONALITY):
        raise GraphoptError(f"rotate.file={path!r} holds a matrix Q that is not orthogonal: Q Qᵀ is not the identity")
    # A matrix rounded to float32 is brought back to the next orthogonal one, or the pass would not be exact.
    left, _, right = torch.linalg.svd(matrix)
    return torch.mm(left, right)
