"""The changes of coordinates that an axis may undergo.

Each is a bit, so that a rule states for which of them it ties or pins; the algebra of a change lives in `apply`.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class Symmetry(enum.StrEnum):
    """A group of changes x -> T x of an axis, coarsest tie first.

    PERMUTATION reorders coordinates, SIGN flips some, DIAGONAL scales them by positive numbers, ORTHOGONAL rotates,
    GENERAL is any invertible matrix. CENTER subtracts the mean over the axis: no group, but carried by the same ties;
    it is free where every reader removes the mean anyway.
    """

    PERMUTATION = "permutation"
    SIGN = "sign"
    DIAGONAL = "diagonal"
    ORTHOGONAL = "orthogonal"
    GENERAL = "general"
    CENTER = "center"

    @property
    def bit(self) -> int:
        return _BITS[self]

    @property
    def twisted(self) -> bool:
        """Whether a dual axis changes by another matrix: T^-T is not T."""
        return self in (Symmetry.DIAGONAL, Symmetry.GENERAL)


_BITS = {symmetry: 1 << index for index, symmetry in enumerate(Symmetry)}

PERMUTATION, SIGN, DIAGONAL, ORTHOGONAL, GENERAL, CENTER = _BITS.values()
ALL = PERMUTATION | SIGN | DIAGONAL | ORTHOGONAL | GENERAL | CENTER
LINEAR = ALL & ~PERMUTATION  # every change that mixes or scales coordinates
SCALES = SIGN | DIAGONAL
MIXES = ORTHOGONAL | GENERAL | CENTER


def apply(symmetry: Symmetry, change: Tensor | None, values: Tensor, dual: bool) -> Tensor:
    """Return `values` [..., *fibres, n] with the change applied to the last axis.

    Args:
        change: PERMUTATION: index [*fibres, n], new[i] = old[index[i]]; SIGN and DIAGONAL: factors [*fibres, n];
            ORTHOGONAL and GENERAL: T [*fibres, n, n], new = T old; CENTER: None.
        dual: apply T^-T, so that a contraction of this axis with one that undergoes T stays what it was.
    """
    if symmetry is Symmetry.CENTER:
        return values - values.mean(-1, keepdim=True)
    assert change is not None
    if symmetry is Symmetry.PERMUTATION:
        return values.gather(-1, change.expand(values.shape))
    if symmetry in (Symmetry.SIGN, Symmetry.DIAGONAL):
        return values / change if dual else values * change
    if dual and symmetry is Symmetry.GENERAL:
        change = torch.linalg.inv(change).mT  # an orthogonal T is its own T^-T
    if change.dim() == 2:
        return values @ change.mT
    fibres, size = change.shape[:-2].numel(), change.shape[-1]
    flat, matrices = values.reshape(-1, fibres, size), change.reshape(fibres, size, size)
    return torch.einsum("rfn,fmn->rfm", flat, matrices).reshape(values.shape)
