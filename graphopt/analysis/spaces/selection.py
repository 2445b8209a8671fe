"""What is left of axes, and of the values on them, when coordinates of some spaces are deleted.

    axis  = 3 x [8]         2 of 8 kept      ->  3 x [2], flat indices 8 h + kept[h]
    axis  = [8] + 5         a concatenation  ->  [2] + 5

A space of permutations is one atom, so whatever is deleted of it goes from every axis that holds the atom: its size
there is counted anew, and values are gathered part by part, factor by factor.
"""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.analysis.spaces.axes import Atom, Axis, Size, Slot, axis_size, leaves, parts_of, product, written
from graphopt.analysis.spaces.space import Space
from graphopt.analysis.spaces.symmetry import Symmetry


class Widths:
    """How many coordinates of some spaces stay, and what sizes that gives.

    Attributes:
        widths: by space of permutations, the number that stays in each fibre.
    """

    def __init__(self, widths: Mapping[Space, int]) -> None:
        self.widths = dict(widths)
        self._width = {space.atom: width for space, width in widths.items() if width < space.size}

    def touches(self, axis: Axis) -> bool:
        """Return whether the axis loses coordinates."""
        return any(slot.atom.root in self._width for slot in leaves(axis))

    def size(self, axis: Axis) -> Size:
        """Return the size of what is left of an axis."""
        return product(self._slot_size(slot) for slot in written(axis))

    def _slot_size(self, slot: Slot) -> Size:
        root = slot.atom.root
        if root.parts is not None:
            return sum(self.size(part)[0] for part in parts_of(slot)), ()
        return (self._width[root], ()) if root in self._width else root.size


class Selection(Widths):
    """The coordinates of some spaces that stay.

    Attributes:
        kept: by space of permutations, the indices that stay, [n'] or, another set for each index of its siblings,
            [*fibres, n'].

    Raises ValueError where a space is no free one of permutations, where the indices are none, out of range, or twice
    there, and where those of two spaces differ along each other.
    """

    def __init__(self, kept: Mapping[Space, Tensor]) -> None:
        self.kept = {space: _checked(space, indices) for space, indices in kept.items()}
        super().__init__({space: indices.shape[-1] for space, indices in self.kept.items()})
        fewer = {space: indices for space, indices in self.kept.items() if indices.shape[-1] < space.size}
        self._of = {space.atom: (space.sibling_atoms, indices) for space, indices in fewer.items()}
        self._order = self._dependents_first()

    def _dependents_first(self) -> dict[Atom, int]:
        """Return the place of each atom in an order in which what differs from fibre to fibre precedes the fibres."""
        depends = {
            space.atom: [atom.root for atom in space.sibling_atoms if indices.dim() > 1 and atom.root in self._of]
            for space, indices in self.kept.items() if space.atom in self._of
        }
        try:
            ahead = list(graphlib.TopologicalSorter(depends).static_order())
        except graphlib.CycleError as error:
            names = [space.name for space in self.kept if space.atom in error.args[1]]
            raise ValueError(f"what is kept of {' and '.join(names)} may differ along one of them, not both") from None
        return {atom: -place for place, atom in enumerate(ahead)}

    def take(self, axes: Sequence[Axis], values: Tensor) -> Tensor:
        """Return what is left of a tensor with these axes.

        Raises ValueError where that depends on the index of a sibling that the tensor does not have.
        """
        dims: list[Slot | None] = []
        for axis in axes:
            dims += written(axis) or [None]
        sizes = [1 if slot is None else slot.atom.root.size[0] for slot in dims]
        taken = self._taken(values.reshape(sizes), dims)
        return taken.reshape([self.size(axis)[0] for axis in axes])

    def _taken(self, values: Tensor, dims: list[Slot | None]) -> Tensor:
        for dim, slot in enumerate(dims):
            if slot is None or slot.atom.root.parts is None:
                continue
            pieces, start = [], 0
            for part in parts_of(slot):
                size = axis_size(part)[0]
                inner: list[Slot | None] = [*written(part)] or [None]
                sizes = [1 if each is None else each.atom.root.size[0] for each in inner]
                block = values.narrow(dim, start, size).reshape([*values.shape[:dim], *sizes, *values.shape[dim + 1 :]])
                taken = self._taken(block, [*dims[:dim], *inner, *dims[dim + 1 :]])
                pieces.append(taken.flatten(dim, dim + len(inner) - 1))
                start += size
            return torch.cat(pieces, dim)
        roots = [None if slot is None else slot.atom.root for slot in dims]
        selected = [(root, dim) for dim, root in enumerate(roots) if root is not None and root in self._of]
        for root, dim in sorted(selected, key=lambda each: self._order[each[0]]):
            values = _gathered(values, roots, dim, *self._of[root])
        return values


def _gathered(
    values: Tensor, roots: list[Atom | None], dim: int, siblings: Sequence[Atom], indices: Tensor
) -> Tensor:
    if indices.dim() == 1:
        return values.index_select(dim, indices.to(values.device))
    if not all(atom.root in roots for atom in siblings):
        raise ValueError("what is kept differs along an axis that this tensor does not have")
    places = [roots.index(atom.root) for atom in siblings]
    shape = [1] * values.dim()
    for place, size in zip([*places, dim], indices.shape, strict=True):
        shape[place] = size
    order = sorted(range(len(places) + 1), key=lambda index: [*places, dim][index])
    wide = list(values.shape)
    wide[dim] = indices.shape[-1]
    return values.gather(dim, indices.permute(order).reshape(shape).expand(wide).to(values.device))


def _checked(space: Space, indices: Tensor) -> Tensor:
    if space.symmetry is not Symmetry.PERMUTATION:
        raise ValueError(f"{space.name} is a space of {space.symmetry}; what loses coordinates is one of permutations")
    if space.pins or space.counted:
        raise ValueError(f"nothing can be deleted of {space.name}: {[*space.pins, *space.counted][0]}")
    if indices.dim() != 1 and tuple(indices.shape[:-1]) != space.fibres:
        raise ValueError(f"{space.name} has fibres {list(space.fibres)}, not {list(indices.shape[:-1])}")
    indices = indices.to(torch.int64)
    if not indices.shape[-1]:
        raise ValueError(f"of {space.name} nothing would be left")
    ordered = indices.sort(-1).values
    twice = bool((ordered[..., 1:] == ordered[..., :-1]).any())
    if twice or int(ordered.min()) < 0 or int(ordered.max()) >= space.size:
        raise ValueError(f"what is kept of {space.name} must be different indices from 0 to {space.size - 1}")
    if indices.dim() > 1 and bool((ordered == ordered.flatten(0, -2)[0]).all()):
        ordered = ordered.flatten(0, -2)[0]  # alike in every fibre
    return ordered
