"""`analyze`: the spaces of a program."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from graphopt.analysis.spaces import rules
from graphopt.analysis.spaces.axes import Atom, Axis, Slot, leaves
from graphopt.analysis.spaces.flow import Absorb, Contraction, Flow, Outputs, trace
from graphopt.analysis.spaces.relation import Demands, Reason, Relation, cells, spread
from graphopt.analysis.spaces.space import Member, Read, Space
from graphopt.analysis.spaces.symmetry import Symmetry
from graphopt.ir.program import Program

assert rules  # the table is filled by importing them

_FEW = 6  # reasons shown for a space


@dataclass
class Analysis:
    """What the axes of a program have to do with each other.

    Attributes:
        program: what was analysed; later changes of it are not seen.
    """

    program: Program
    _flow: Flow = field(repr=False)
    _demands: Demands = field(repr=False)
    _places: _Places = field(repr=False)
    _under: dict[Symmetry, tuple[Space, ...]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def spaces(self) -> tuple[Space, ...]:
        """The coarsest view: axes that correspond by index, each with every symmetry under which some part is free."""
        found = []
        finer = {
            symmetry: {(member.weight, member.axis, id(slot)) for space in self.under(symmetry) if space.free
                       for member in space.members for slot in member.slots}
            for symmetry in Symmetry
            if symmetry is not Symmetry.PERMUTATION
        }  # fmt: skip
        for space in self.under(Symmetry.PERMUTATION):
            places = {(m.weight, m.axis, id(slot)) for m in space.members for slot in m.slots}
            symmetries = {str(symmetry) for symmetry, held in finer.items() if places & held}
            if space.free:
                symmetries.add(str(Symmetry.PERMUTATION))
            found.append(_with(space, frozenset(symmetries)))
        return tuple(found)

    def under(self, symmetry: Symmetry | str) -> tuple[Space, ...]:
        """Return the spaces of one symmetry, pinned ones included: axes that must undergo one and the same change."""
        symmetry = Symmetry(symmetry)
        if symmetry not in self._under:
            with _collector_paused():
                self._under[symmetry] = tuple(_spaces(self._flow, self._demands, self._places, symmetry))
        return self._under[symmetry]

    def axes(self, node: fx.Node) -> Outputs:
        """Return the axes of a node's tensor, a tuple of those of each tensor it returns, or nothing."""
        return self._flow.axes.get(node, [])

    def __str__(self) -> str:
        return "\n".join(str(space) for space in self.spaces)


def analyze(program: Program) -> Analysis:
    """Find the spaces of a program. Linear in the number of nodes; an operator without a rule pins what it touches."""
    with _collector_paused():
        flow = trace(program)
        return Analysis(program, flow, spread(flow), _places(flow))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's cycle collector from running: all that is made here stays; going through it doubles the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _with(space: Space, symmetries: frozenset[str]) -> Space:
    return dataclasses.replace(space, symmetries=symmetries)


class _Places(NamedTuple):
    """Leaf slots of all that relations ask about, which are the same for each of them.

    Attributes:
        weights: each axis of a weight that is floating, with its leaves. axes: all axes of these weights.
        absorbs: the leaves of the vector, of what it multiplies and of the product.
        norms: of what a norm normalizes. norms_out: of what it writes, where that is something else.
        reads: of what an operator contracts; beside it all axes of that value, each with its slots and atoms.
        cells: every combination of slots that stand side by side in some value, once. absorb_cells: those in which a
            weight stands for the axes whose change it takes.
        mixes: the atoms that an operator mixes, and the leaves that ride along.
    """

    weights: list[tuple[fx.Node, int, Axis, Axis]]
    axes: dict[fx.Node, list[Axis]]
    absorbs: list[tuple[Absorb, Axis, Axis, Axis]]
    norms: list[tuple[Axis, fx.Node]]
    norms_out: list[tuple[Axis, fx.Node]]
    reads: list[tuple[Contraction, Axis, list[tuple[Axis, set[Slot | Atom]]]]]
    cells: list[_Cell]
    absorb_cells: list[tuple[int, _Cell]]
    mixes: list[tuple[set[Atom], Axis]]


class _Cell(NamedTuple):
    """Slots side by side, and the atoms that a change of one of them may depend on: those that are there once."""

    slots: list[Slot]
    once: dict[Atom, None]


def _cell(slots: list[Slot]) -> _Cell:
    counts = Counter(slot.atom.root for slot in slots)
    return _Cell(slots, {atom: None for atom, count in counts.items() if count == 1 and not atom.size[1]})


def _places(flow: Flow) -> _Places:
    weights, axes = [], {}
    found: list[_Cell] = []
    seen: set[tuple[int, ...]] = set()
    for node, outputs in flow.axes.items():
        if node.op == "get_attr" and node.meta["val"].is_floating_point() and not isinstance(outputs, tuple):
            axes[node] = outputs
            weights += [(node, dim, axis, leaves(axis)) for dim, axis in enumerate(outputs)]
        for each in outputs if isinstance(outputs, tuple) else (outputs,):
            key = tuple(id(slot) for axis in each for slot in axis)
            if key not in seen:
                seen.add(key)
                found += map(_cell, cells(each))
    known: dict[int, set[Slot | Atom]] = {}

    def held(axis: Axis) -> set[Slot | Atom]:
        if id(axis) not in known:
            known[id(axis)] = {each for slot in leaves(axis) for each in (slot, slot.atom.root)}
        return known[id(axis)]

    beside = []
    for absorb in flow.absorbs:
        for axis in (absorb.x, absorb.out):
            # The weight stands for the axes whose changes it takes: of these it has an index only for its own others.
            around = list(flow.of(absorb.weight))
            around[absorb.dim] = axis
            beside += [(absorb.mask, _cell(cell)) for cell in cells(around)]
    return _Places(
        weights,
        axes,
        [(absorb, leaves(absorb.axis), leaves(absorb.x), leaves(absorb.out)) for absorb in flow.absorbs],
        [(leaves(norm.x), norm.node) for norm in flow.norms],
        [(leaves(norm.out), norm.node) for norm in flow.norms if norm.out is not norm.x],
        [(read, leaves(read.axis), [(axis, held(axis)) for axis in flow.of(read.source)]) for read in flow.reads],
        found,
        beside,
        [
            ({slot.atom.root for axis in mixed for slot in leaves(axis)}, [s for axis in riding for s in leaves(axis)])
            for mixed, riding in flow.mixes
        ],
    )


def _spaces(flow: Flow, demands: Demands, places: _Places, symmetry: Symmetry) -> list[Space]:
    relation = Relation(symmetry, flow, demands)
    members: dict[Slot, list[Member]] = {}
    for node, dim, axis, slots in places.weights:
        _enter(members, relation, demands, node, dim, axis, slots)
    for absorb, slots, x, out in places.absorbs:
        if absorb.mask & symmetry.bit:
            at = absorb.weight, absorb.dim, absorb.axis, slots
            _enter(members, relation, demands, *at, of=x, inverse=True)
            _enter(members, relation, demands, *at, of=out)
    counted: dict[Slot, dict[Reason, None]] = {}
    for slots, reason in demands.counts if symmetry is Symmetry.PERMUTATION else ():
        for slot in slots:
            counted.setdefault(relation.find(slot)[0], {})[reason] = None
    siblings = _siblings(places, relation, {root for root in members if not relation.pinned(root)})
    norms = _at_roots(relation, places.norms)
    before = _at_roots(relation, places.norms_out)
    reads = _reads(places, relation, siblings)
    named = {root.atom.root: held for root, held in reversed(members.items())}
    wanted = dict.fromkeys(atom for beside in siblings.values() for atom in beside)
    names = {atom: _name(named[atom]) if atom in named else "?" for atom in wanted}
    found, taken = [], Counter[str]()
    for root, held in members.items():
        size = root.atom.root.size
        if size[1]:
            continue
        reasons = tuple(relation.reasons(root))
        name = _name(held)
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        beside = siblings.get(root, [])
        found.append(
            Space(
                name,
                size[0],
                tuple(held),
                frozenset() if reasons else frozenset((str(symmetry),)),
                reasons[:_FEW],
                symmetry,
                siblings=tuple((names[atom], atom.size[0]) for atom in beside),
                counted=tuple(counted.get(root, ()))[:_FEW],
                norms=tuple(norms.get(root, ())),
                norms_before=tuple(before.get(root, ())),
                reads=tuple(reads.get(root, ())),
                _axes={member.node: places.axes[member.node] for member in held},
                _sibling_atoms=tuple(beside),
            )
        )
    return found


def _enter(
    members: dict[Slot, list[Member]],
    relation: Relation,
    demands: Demands,
    node: fx.Node,
    dim: int,
    axis: Axis,
    slots: Axis,
    of: Axis | None = None,
    inverse: bool = False,
) -> None:
    """Add the slots of a weight's axis to the spaces they lie in; `of` names the axis whose change they absorb."""
    held: dict[tuple[Slot, bool], list[Slot]] = {}
    for slot, means in zip(slots, of or slots, strict=True):
        root, dual = relation.find(means)
        if of is None and relation.symmetry.bit and _stands_between(relation, slot):
            continue
        held.setdefault((root, dual ^ inverse), []).append(slot)
    for (root, dual), own in held.items():
        roles = dict.fromkeys(role for slot in own for role in demands.roles.get(slot, ()))
        members.setdefault(root, []).append(
            Member(str(node.target), dim, ", ".join(roles), dual, node, tuple(own), axis)
        )


def _stands_between(relation: Relation, slot: Slot) -> bool:
    """True for a vector that only absorbs: it is listed where it absorbs."""
    return relation.pinned_only(slot, "stands between two axes")


def _name(members: list[Member]) -> str:
    """Name a space after the first weight that writes it: `layers.0.up.out`; inner factors by their place."""
    first = next((m for m in members if "writes" in m.role), members[0])
    module, _, leaf = first.weight.rpartition(".")
    side = {"writes": "out", "reads": "in"}.get(first.role.split(", ")[0], leaf)
    base = f"{module}.{side}" if module else f"{leaf}.{side}" if side != leaf else leaf
    factors = first.layout.split(" x ")
    return base if len(factors) == 1 else f"{base}[{next(i for i, factor in enumerate(factors) if '[' in factor)}]"


def _at_roots(relation: Relation, found: Iterable[tuple[Axis, fx.Node]]) -> dict[Slot, dict[fx.Node, None]]:
    """Return the nodes by the spaces that their slots lie in."""
    at: dict[Slot, dict[fx.Node, None]] = {}
    for slots, node in found:
        for slot in slots:
            at.setdefault(relation.find(slot)[0], {})[node] = None
    return at


def _reads(places: _Places, relation: Relation, siblings: dict[Slot, list[Atom]]) -> dict[Slot, list[Read]]:
    found: dict[Slot, list[Read]] = {}
    for (node, source, partner, _), slots, axes in places.reads:
        held: dict[tuple[Slot, bool], list[Slot]] = {}
        for slot in slots:
            held.setdefault(relation.find(slot), []).append(slot)
        for (root, dual), own in held.items():
            wanted = {*own, *siblings.get(root, ())}
            dims = [dim for dim, (_, present) in enumerate(axes) if not wanted.isdisjoint(present)]
            of_dims = tuple(axes[dim][0] for dim in dims)
            found.setdefault(root, []).append(Read(node, source, partner, tuple(dims), dual, of_dims, tuple(own)))
    return found


def _siblings(places: _Places, relation: Relation, wanted: set[Slot]) -> dict[Slot, list[Atom]]:
    """Return for each free space the atoms that stand beside it wherever it occurs, and that no operator mixes.

    A change of the space may then depend on the index of such an atom.
    """
    beside: dict[Slot, dict[Atom, None]] = {}
    for cell in places.cells:
        _meet(cell, relation, wanted, beside)
    for mask, cell in places.absorb_cells:
        if mask & relation.symmetry.bit:
            _meet(cell, relation, wanted, beside)
    for mixed, riding in places.mixes:
        for root in {relation.find(slot)[0] for slot in riding} & beside.keys():
            beside[root] = {atom: None for atom in beside[root] if atom not in mixed}
    return {root: list(atoms) for root, atoms in beside.items()}


def _meet(cell: _Cell, relation: Relation, wanted: set[Slot], beside: dict[Slot, dict[Atom, None]]) -> None:
    """Keep of the atoms beside a space those that this cell holds too, once."""
    for slot in cell.slots:
        root = relation.find(slot)[0]
        if root in wanted:
            own, known = slot.atom.root, beside.get(root, cell.once)
            if known:
                beside[root] = {atom: None for atom in known if atom in cell.once and atom is not own}
