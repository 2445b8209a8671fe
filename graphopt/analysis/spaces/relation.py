"""Which slots must change together under one symmetry, and which must not change at all.

A union-find over leaf slots with a parity: duals undergo T and T^-T. Where T^-T is T the parity says nothing; where it
is not, a slot that must equal its own dual is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import fx

from graphopt.analysis.spaces.axes import Axis, Slot, leaves, parts_of, piece, written
from graphopt.analysis.spaces.axes import axis_size as size_of_axis
from graphopt.analysis.spaces.flow import Flow
from graphopt.analysis.spaces.symmetry import Symmetry


class Reason(NamedTuple):
    """Why a slot is pinned: `node` is the operator, `text` completes a sentence about it."""

    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node} {self.text}"


class Demands(NamedTuple):
    """The demands of a Flow over leaf slots, and what operators do with them."""

    ties: list[tuple[int, Axis, Axis, bool]]
    pins: list[tuple[int, Axis, Reason]]
    counts: list[tuple[Axis, Reason]]
    roles: dict[Slot, dict[str, None]]


def spread(flow: Flow) -> Demands:
    """Spread ties and pins over the leaves that the axes have now that nothing is refined any more."""
    ties: list[tuple[int, Axis, Axis, bool]] = []
    pins: list[tuple[int, Axis, Reason]] = []
    for mask, a, b, dual, node in flow.ties:
        if not mask:
            continue
        ours, theirs = leaves(a), leaves(b)
        if len(ours) == len(theirs) and all(x.atom.root is y.atom.root for x, y in zip(ours, theirs, strict=True)):
            ties.append((mask, ours, theirs, dual))
        else:
            reason = Reason(node.name, "matches two axes whose parts lie in different orders")
            pins += [(mask, ours, reason), (mask, theirs, reason)]
    known: dict[str, Reason] = {}
    for mask, axis, node, text in flow.pins:
        reason = Reason(node.name, text)
        pins.append((mask, leaves(axis), known.setdefault(str(reason), reason)))
    for ours, theirs in _converted(flow):
        ties.append((~0, ours, theirs, False))
    roles: dict[Slot, dict[str, None]] = {}
    for axis, role in flow.roles:
        for slot in leaves(axis):
            roles.setdefault(slot, {})[role] = None
    counts = [(leaves(axis), Reason(node.name, text)) for _, axis, node, text in flow.counts]
    return Demands(ties, pins, counts, roles)


def _converted(flow: Flow) -> Iterator[tuple[Axis, Axis]]:
    """Yield the parts of slots that became products after they had been sums, with the same places of the product."""
    seen: set[int] = set()
    stack: list[Slot] = []
    for outputs in flow.axes.values():
        for axes in outputs if isinstance(outputs, tuple) else (outputs,):
            for axis in axes:
                stack += axis
    while stack:
        slot = stack.pop()
        if id(slot) in seen:
            continue
        seen.add(id(slot))
        if slot.factors:
            stack += slot.factors
        if slot.parts is None:
            continue
        for part in slot.parts:
            stack += part
        if slot.atom.root.factors is not None:
            start = 0
            for part in slot.parts:
                stop = start + size_of_axis(part)[0]
                same = piece([slot], start, stop)
                assert same is not None, "a sum that became a product was cut where its parts are"
                yield leaves(part), leaves(same)
                start = stop


class Relation:
    """The union-find of one symmetry.

    Attributes:
        symmetry: whose ties these are.
    """

    def __init__(self, symmetry: Symmetry, flow: Flow, demands: Demands) -> None:
        self.symmetry = symmetry
        self._twisted = symmetry.twisted
        self._parent: dict[Slot, Slot] = {}
        self._parity: dict[Slot, bool] = {}
        self._reasons: dict[Slot, dict[Reason, None]] = {}
        self._atoms: dict[object, Slot] = {}
        bit = symmetry.bit
        for mask, ours, theirs, dual in demands.ties:
            if mask & bit:
                for a, b in zip(ours, theirs, strict=True):
                    self._tie(a, b, dual)
        for mask, axis, reason in demands.pins:
            if mask & bit:
                for slot in axis:
                    self._pin(slot, reason)
        if symmetry is Symmetry.CENTER:
            for node, x, _, centers in flow.norms:
                if centers and len(leaves(x)) != 1:
                    for slot in leaves(x):
                        self._pin(slot, Reason(node.name, "normalizes over an axis of several parts"))
        for product in flow.products:
            if product.mask & bit:
                places = zip(leaves(product.a), leaves(product.b), leaves(product.out), strict=True)
                for one, other, made in places:
                    self._multiply(one, other, made, product.node)

    def find(self, slot: Slot) -> tuple[Slot, bool]:
        """Return the slot that stands for all tied to this one, and whether this one is its dual."""
        parent = self._parent
        if self.symmetry is Symmetry.PERMUTATION:
            # Slots of one atom correspond by index, so they are permuted together.
            root = slot.atom.root
            slot = self._atoms.setdefault(root, slot)
        if slot not in parent:
            return slot, False
        path, parity = [], False
        while slot in parent:
            path.append(slot)
            slot = parent[slot]
        for each in reversed(path):
            parity ^= self._parity[each]
            parent[each], self._parity[each] = slot, parity
        return slot, self._parity[path[0]]

    def _tie(self, a: Slot, b: Slot, dual: bool) -> None:
        (one, p), (other, q) = self.find(a), self.find(b)
        twist = (p ^ q ^ dual) and self._twisted
        if one is other:
            if twist:
                self._pin(a, Reason("a tied weight", "is both written and read here, which takes T and its inverse"))
            return
        self._parent[one], self._parity[one] = other, bool(twist)
        if one in self._reasons:
            self._reasons.setdefault(other, {}).update(self._reasons.pop(one))

    def _pin(self, slot: Slot, reason: Reason) -> None:
        self._reasons.setdefault(self.find(slot)[0], {})[reason] = None

    def _multiply(self, a: Slot, b: Slot, out: Slot, node: fx.Node) -> None:
        """s_out = s_a s_b: what is pinned passes the other on; of two that are free the second is pinned."""
        if self.pinned(a) and not self.pinned(b):
            a, b = b, a
        if not self.pinned(b):
            self._pin(b, Reason(node.name, "multiplies it with another value, which passes its scale instead"))
        self._tie(a, out, False)

    def pinned(self, slot: Slot) -> bool:
        return self.find(slot)[0] in self._reasons

    def pinned_only(self, slot: Slot, text: str) -> bool:
        """True where that is the one reason."""
        reasons = self._reasons.get(self.find(slot)[0], ())
        return len(reasons) == 1 and next(iter(reasons)).text == text

    def reasons(self, slot: Slot) -> list[Reason]:
        """Return why a slot is pinned, what no pass lifts first; empty where it is free."""
        return sorted(self._reasons.get(self.find(slot)[0], ()), key=lambda reason: ": " in reason.text)


def cells(axes: Iterable[Axis]) -> list[list[Slot]]:
    """Return the leaf slots of a tensor, one list for each block that the parts of its sums cut it into."""
    found: list[list[Slot]] = [[]]
    for axis in axes:
        choices = _axis_cells(axis)
        if len(choices) == 1:
            for cell in found:
                cell += choices[0]
        else:
            found = [cell + choice for cell in found for choice in choices]
    return found


def _axis_cells(axis: Axis) -> list[list[Slot]]:
    found: list[list[Slot]] = [[]]
    for slot in written(axis):
        if slot.atom.root.parts is None:
            for cell in found:
                cell.append(slot)
        else:
            choices = [cell for part in parts_of(slot) for cell in _axis_cells(part)]
            found = [cell + choice for cell in found for choice in choices]
    return found
