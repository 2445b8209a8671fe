"""Axes as ordered products of atoms, and the union-find that makes atoms equal.

An *atom* is a set of coordinates: the 8 heads, the 64 channels. It is a leaf until something refines it, everywhere it
occurs, into

    a product   768 = 12 x 64                  a reshape, or a match with an axis already split so
    a sum       768 = 256 + 256 + 256          a slice or split, or a concatenation

An *axis* of a tensor is a list of *slots*, slowest first. A slot is one occurrence of an atom: operators that only
move data hand slots on, so equal slots mean one and the same coordinates of one value, while equal atoms mean
coordinates that correspond by index in any value. Permutations act on atoms; finer symmetries tell the slots of one
atom apart.

Sizes are monomials (coefficient, symbols), so that `2*s0` splits into 2 and s0; any other expression is an opaque
symbol. Axes of size 1 have no slots.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

Size = tuple[int, tuple[str, ...]]
ONE: Size = (1, ())


class Atom:
    """A set of coordinates: a leaf, a product of atoms, or a sum of products of atoms."""

    __slots__ = ("factors", "link", "parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.link: Atom | None = None
        self.factors: list[Atom] | None = None
        self.parts: list[list[Atom]] | None = None

    @property
    def root(self) -> Atom:
        """The atom that stands for all those equal to this one."""
        atom = self
        while atom.link is not None:
            if atom.link.link is not None:
                atom.link = atom.link.link
            atom = atom.link
        return atom

    @property
    def is_leaf(self) -> bool:
        return self.factors is None and self.parts is None


class Slot:
    """An occurrence of an atom. Its `factors` or `parts` are made when asked for, once the atom has been refined."""

    __slots__ = ("atom", "factors", "parts")

    def __init__(self, atom: Atom, parts: list[Axis] | None = None) -> None:
        self.atom = atom
        self.factors: Axis | None = None
        self.parts = parts


Axis = list[Slot]


def size_of(dimension: int | torch.SymInt) -> Size:
    """Return a dimension's size as a monomial."""
    if isinstance(dimension, int):
        return dimension, ()
    return _monomial(dimension.node.expr)


@functools.lru_cache(maxsize=4096)
def _monomial(expression: Any) -> Size:
    coefficient, rest = expression.as_coeff_Mul()
    if not coefficient.is_Integer or coefficient <= 0:
        return 1, (str(expression),)
    symbols: list[str] = []
    for base, exponent in rest.as_powers_dict().items():
        if base == 1:
            continue
        if not base.is_Symbol or not exponent.is_Integer or exponent < 1:
            return 1, (str(expression),)
        symbols += [str(base)] * int(exponent)
    return int(coefficient), tuple(sorted(symbols))


def divide(size: Size, by: Size) -> Size | None:
    """Return size / by, or None where it is no monomial."""
    if size[0] == 0 or by[0] == 0 or size[0] % by[0]:
        return None
    if not by[1]:
        return size[0] // by[0], size[1]
    rest = Counter(size[1])
    rest.subtract(by[1])
    if any(count < 0 for count in rest.values()):
        return None
    return size[0] // by[0], tuple(sorted(rest.elements()))


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes."""
    sizes = list(sizes)
    symbols = tuple(sorted(symbol for _, each in sizes for symbol in each))
    return math.prod(size for size, _ in sizes), symbols


def fresh(size: Size) -> Axis:
    """Return an axis that nothing else corresponds to."""
    return [] if size == ONE else [Slot(Atom(size))]


def copied(axis: Axis) -> Axis:
    """Return an axis of the same atoms with slots of its own: the same coordinates, free to change apart."""
    return [Slot(slot.atom) for slot in axis]


def atoms_of(axis: Axis) -> list[Atom]:
    return [slot.atom for slot in axis]


# Atoms ----------------------------------------------------------------------------------------------------------------


def flat(atoms: Sequence[Atom]) -> list[Atom]:
    """Return the list with products written out."""
    found: list[Atom] = []
    for atom in atoms:
        root = atom.root
        if root.factors is not None:
            found += flat(root.factors)
        else:
            found.append(root)
    return found


def unify(a: Atom, b: Atom) -> bool:
    """Make two atoms of one size equal; False where their refinements do not fit each other."""
    a, b = a.root, b.root
    if a is b:
        return True
    if a.is_leaf:
        a.link = b
        return True
    if b.is_leaf:
        b.link = a
        return True
    if a.factors is not None and b.factors is not None:
        fits = align(a.factors, b.factors)
    elif a.parts is not None and b.parts is not None:
        fits = _align_cut([a], [b], _bounds(a.parts) | _bounds(b.parts))
    else:
        # The product stays and is cut where the sum is: 2 x 32 cut at 32 is (1 + 1) x 32.
        if a.factors is None:
            a, b = b, a
        assert a.factors is not None and b.parts is not None
        fits = _align_cut(a.factors, [b], _bounds(b.parts))
    if fits and a.root is not b.root:
        b.root.link = a.root
    return fits


def align(left: Sequence[Atom], right: Sequence[Atom]) -> bool:
    """Make two products equal from the left, splitting the larger atom by the smaller where it divides."""
    ours, theirs = flat(left)[::-1], flat(right)[::-1]
    while ours and theirs:
        a, b = ours.pop().root, theirs.pop().root
        if a.factors is not None or b.factors is not None:
            ours += flat([a])[::-1]
            theirs += flat([b])[::-1]
        elif a.size == b.size:
            if not unify(a, b):
                return False
        elif divide(a.size, b.size) is not None:
            if not split(a, b.size):
                return False
            ours.append(a)
            theirs.append(b)
        elif divide(b.size, a.size) is not None:
            if not split(b, a.size):
                return False
            ours.append(a)
            theirs.append(b)
        else:
            return False
    return not ours and not theirs


def split(atom: Atom, outer: Size) -> bool:
    """Refine an atom into `outer` x the rest."""
    atom = atom.root
    rest = divide(atom.size, outer)
    assert rest is not None
    if atom.is_leaf:
        atom.factors = [Atom(outer), Atom(rest)]
        return True
    whole = Atom(atom.size)
    whole.factors = [Atom(outer), Atom(rest)]
    return unify(atom, whole)


def cut(atoms: Sequence[Atom], at: int) -> bool:
    """Refine a product such that its coordinates before `at` are a part of their own; False where that is no sum."""
    first, inner = _split_first(atoms)
    if first is None or first.size[1] or inner[1] or at % inner[0]:
        return False
    at //= inner[0]
    if not 0 < at < first.size[0]:
        return at in (0, first.size[0])
    if first.is_leaf:
        first.parts = [_some(at), _some(first.size[0] - at)]
        return True
    assert first.parts is not None
    start = 0
    for part in first.parts:
        stop = start + product(atom.size for atom in part)[0]
        if start < at < stop:
            return cut(part, at - start)
        start = stop
    return True


def _some(size: int) -> list[Atom]:
    return [] if size == 1 else [Atom((size, ()))]


def _split_first(atoms: Sequence[Atom]) -> tuple[Atom | None, Size]:
    """Return the slowest factor and the size of the rest."""
    written = flat(atoms)
    return (written[0], product(atom.size for atom in written[1:])) if written else (None, ONE)


def _bounds(parts: list[list[Atom]]) -> set[int]:
    """Return where the parts of a sum begin and end."""
    bounds = {0}
    for part in parts:
        bounds.add(max(bounds) + product(atom.size for atom in part)[0])
    return bounds


def _align_cut(left: Sequence[Atom], right: Sequence[Atom], bounds: set[int]) -> bool:
    """Cut two products at the same places and align what lies between."""
    places = sorted(bounds)
    if not all(cut(left, place) and cut(right, place) for place in places):
        return False
    for start, stop in itertools.pairwise(places):
        ours, theirs = _between(left, start, stop), _between(right, start, stop)
        # Cutting one side may have cut the other: two products may share their slowest atom.
        if not align(ours, theirs):
            return False
    return True


def _between(atoms: Sequence[Atom], start: int, stop: int) -> list[Atom]:
    """Return the atoms of coordinates start..stop of a product that has been cut there."""
    written = flat(atoms)
    inner = product(atom.size for atom in written[1:])[0] if written else 1
    if not written or (start == 0 and stop == written[0].size[0] * inner):
        return written
    first = written[0].parts
    assert first is not None
    chosen: list[list[Atom]] = []
    for part, low, high in _overlaps(first, [product(a.size for a in p)[0] for p in first], start, stop, inner):
        chosen.append(_between(part, low, high))
    return [*_joined(chosen), *written[1:]]


def _joined(parts: list[list[Atom]]) -> list[Atom]:
    if len(parts) == 1:
        return parts[0]
    whole = Atom((sum(product(atom.size for atom in part)[0] for part in parts), ()))
    whole.parts = parts
    return [whole]


def _overlaps(
    parts: Sequence[Any], sizes: Sequence[int], start: int, stop: int, inner: int
) -> list[tuple[Any, int, int]]:
    """Return (part, from, to) of every part that start..stop touches, counted in units of `inner`."""
    start, stop, offset, found = start // inner, stop // inner, 0, []
    for part, size in zip(parts, sizes, strict=True):
        low, high = max(start - offset, 0), min(stop - offset, size)
        if low < high:
            found.append((part, low, high))
        offset += size
    return found


# Slots ----------------------------------------------------------------------------------------------------------------


def written(axis: Axis) -> Axis:
    """Return the axis with products written out, as slots."""
    found: Axis = []
    for slot in axis:
        root = slot.atom.root
        if root.factors is None:
            found.append(slot)
            continue
        if slot.factors is None:
            slot.factors = [Slot(atom) for atom in root.factors]
        found += written(slot.factors)
    return found


def leaves(axis: Axis) -> Axis:
    """Return the leaf slots of an axis in order; those of a sum part by part."""
    found: Axis = []
    for slot in written(axis):
        if slot.atom.root.parts is None:
            found.append(slot)
        else:
            for part in parts_of(slot):
                found += leaves(part)
    return found


def parts_of(slot: Slot) -> list[Axis]:
    """Return the parts of a slot whose atom is a sum."""
    if slot.parts is None:
        parts = slot.atom.root.parts
        assert parts is not None
        slot.parts = [[Slot(atom) for atom in part] for part in parts]
    return slot.parts


def axis_size(axis: Axis) -> Size:
    return product(slot.atom.root.size for slot in axis)


def piece(axis: Axis, start: int, stop: int) -> Axis | None:
    """Return coordinates start..stop of an axis as an axis of the same slots; None where that is no sum."""
    if start >= stop:
        return fresh((0, ()))
    if not (cut(atoms_of(axis), start) and cut(atoms_of(axis), stop)):
        return None
    return _piece(axis, start, stop)


def _piece(axis: Axis, start: int, stop: int) -> Axis:
    slots = written(axis)
    inner = axis_size(slots[1:])[0] if slots else 1
    if not slots or (start == 0 and stop == slots[0].atom.root.size[0] * inner):
        return slots
    parts = parts_of(slots[0])
    sizes = [axis_size(part)[0] for part in parts]
    chosen = [_piece(part, low, high) for part, low, high in _overlaps(parts, sizes, start, stop, inner)]
    return [*concatenated(chosen), *slots[1:]]


def concatenated(parts: list[Axis]) -> Axis:
    """Return the ordered sum of axes; the slots are theirs."""
    parts = [part for part in parts if axis_size(part)[0] != 0]
    if len(parts) == 1:
        return parts[0]
    whole = Atom((sum(axis_size(part)[0] for part in parts), ()))
    whole.parts = [atoms_of(part) for part in parts]
    return [Slot(whole, parts)]


def take(axis: Axis, size: Size) -> tuple[Axis, Axis] | None:
    """Split an axis into its slowest `size` coordinates and the rest; None where no product does."""
    taken: Axis = []
    rest = written(axis)
    while size != ONE:
        if not rest:
            return None
        slot, *behind = rest
        if (remaining := divide(size, slot.atom.root.size)) is not None:
            taken.append(slot)
            size, rest = remaining, behind
        elif divide(slot.atom.root.size, size) is not None and split(slot.atom, size):
            rest = written([slot]) + behind
        else:
            return None
    return taken, rest
