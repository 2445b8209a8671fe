"""`analyze`: the spaces of a program."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from graphopt.analysis.spaces import rules
from graphopt.analysis.spaces.axes import Atom, Axis, Slot, leaves, parts_of, written
from graphopt.analysis.spaces.flow import Flow, trace
from graphopt.analysis.spaces.relation import Demands, Relation, cells, spread
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
            self._under[symmetry] = tuple(_spaces(self._flow, self._demands, symmetry))
        return self._under[symmetry]

    def __str__(self) -> str:
        return "\n".join(str(space) for space in self.spaces)


def analyze(program: Program) -> Analysis:
    """Find the spaces of a program. Linear in the number of nodes; an operator without a rule pins what it touches."""
    flow = trace(program)
    return Analysis(program, flow, spread(flow))


def _with(space: Space, symmetries: frozenset[str]) -> Space:
    return dataclasses.replace(space, symmetries=symmetries)


def _spaces(flow: Flow, demands: Demands, symmetry: Symmetry) -> list[Space]:
    relation = Relation(symmetry, flow, demands)
    members: dict[Slot, list[Member]] = {}
    axes: dict[fx.Node, list[Axis]] = {}
    for node, outputs in flow.axes.items():
        if node.op != "get_attr" or not node.meta["val"].is_floating_point() or isinstance(outputs, tuple):
            continue
        axes[node] = outputs
        for dim, axis in enumerate(outputs):
            _enter(members, relation, demands, node, dim, axis, leaves(axis))
    for mask, node, dim, axis, x, out, _ in flow.absorbs:
        if mask & symmetry.bit:
            slots = leaves(axis)
            _enter(members, relation, demands, node, dim, axis, slots, of=leaves(x), inverse=True)
            _enter(members, relation, demands, node, dim, axis, slots, of=leaves(out))
    siblings = _siblings(flow, relation, {root for root in members if not relation.reasons(root)})
    norms = _at_roots(relation, ((leaves(norm.x), norm.node) for norm in flow.norms))
    before = _at_roots(relation, ((leaves(norm.out), norm.node) for norm in flow.norms if norm.out is not norm.x))
    reads = _reads(flow, relation, siblings)
    names = {root.atom.root: _name(held) for root, held in reversed(members.items())}
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
                siblings=tuple((names.get(atom, "?"), atom.size[0]) for atom in beside),
                norms=tuple(norms.get(root, ())),
                norms_before=tuple(before.get(root, ())),
                reads=tuple(reads.get(root, ())),
                _axes={member.node: axes[member.node] for member in held},
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
            Member(str(node.target), dim, ", ".join(roles), dual, _layout(axis, own), node, tuple(own))
        )


def _stands_between(relation: Relation, slot: Slot) -> bool:
    """True for a vector that only absorbs: it is listed where it absorbs."""
    reasons = relation.reasons(slot)
    return len(reasons) == 1 and reasons[0].text == "stands between two axes"


def _layout(axis: Axis, own: list[Slot]) -> str:
    texts = []
    for slot in written(axis):
        if slot.atom.root.parts is not None:
            parts = " + ".join(_layout(part, own) or "1" for part in parts_of(slot))
            texts.append(f"({parts})")
        else:
            text = "*".join([str(slot.atom.root.size[0]), *slot.atom.root.size[1]])
            texts.append(f"[{text}]" if any(slot is each for each in own) else text)
    return " x ".join(texts)


def _name(members: list[Member]) -> str:
    """Name a space after the first weight that writes it: `layers.0.up.out`; inner factors by their place."""
    first = next((m for m in members if "writes" in m.role), members[0])
    module, _, leaf = first.weight.rpartition(".")
    side = {"writes": "out", "reads": "in"}.get(first.role.split(", ")[0], leaf)
    base = f"{module}.{side}" if module else f"{leaf}.{side}" if side != leaf else leaf
    factors = first.layout.count(" x ")
    if not factors:
        return base
    return f"{base}[{first.layout.split(' x ').index(next(f for f in first.layout.split(' x ') if '[' in f))}]"


def _at_roots(relation: Relation, found: Iterable[tuple[Axis, fx.Node]]) -> dict[Slot, dict[fx.Node, None]]:
    """Return the nodes by the spaces that their slots lie in."""
    at: dict[Slot, dict[fx.Node, None]] = {}
    for slots, node in found:
        for slot in slots:
            at.setdefault(relation.find(slot)[0], {})[node] = None
    return at


def _reads(flow: Flow, relation: Relation, siblings: dict[Slot, list[Atom]]) -> dict[Slot, list[Read]]:
    found: dict[Slot, list[Read]] = {}
    for node, source, partner, axis in flow.reads:
        axes = flow.of(source)
        held: dict[tuple[Slot, bool], list[Slot]] = {}
        for slot in leaves(axis):
            held.setdefault(relation.find(slot), []).append(slot)
        for (root, dual), own in held.items():
            wanted = {*own, *siblings.get(root, ())}
            dims = tuple(
                dim for dim, each in enumerate(axes) if any({slot, slot.atom.root} & wanted for slot in leaves(each))
            )
            places = tuple(axes[dim] for dim in dims)
            found.setdefault(root, []).append(Read(node, source, partner, dims, dual, places, tuple(own)))
    return found


def _siblings(flow: Flow, relation: Relation, wanted: set[Slot]) -> dict[Slot, list[Atom]]:
    """Return for each free space the atoms that stand beside it wherever it occurs, and that no operator mixes.

    A change of the space may then depend on the index of such an atom.
    """
    beside: dict[Slot, dict[Atom, None]] = {}
    seen: set[tuple[int, ...]] = set()
    for outputs in flow.axes.values():
        for axes in outputs if isinstance(outputs, tuple) else (outputs,):
            key = tuple(id(slot) for axis in axes for slot in axis)
            if key in seen:
                continue
            seen.add(key)
            for cell in cells(axes):
                _meet(cell, relation, wanted, beside)
    for absorb in flow.absorbs:
        if absorb.mask & relation.symmetry.bit:
            # The weight stands for the axes whose changes it takes: of these it has an index only for its own others.
            for axis in (absorb.x, absorb.out):
                places = list(flow.of(absorb.weight))
                places[absorb.dim] = axis
                for cell in cells(places):
                    _meet(cell, relation, wanted, beside)
    for mixed, riding in flow.mixes:
        roots = {relation.find(slot)[0] for axis in riding for slot in leaves(axis)} & beside.keys()
        if roots:
            atoms = {slot.atom.root for axis in mixed for slot in leaves(axis)}
            for root in roots:
                beside[root] = {atom: None for atom in beside[root] if atom not in atoms}
    return {root: list(atoms) for root, atoms in beside.items()}


def _meet(cell: list[Slot], relation: Relation, wanted: set[Slot], beside: dict[Slot, dict[Atom, None]]) -> None:
    """Keep of the atoms beside a space those that this cell holds too, once."""
    counts: Counter[Atom] | None = None
    for slot in cell:
        root = relation.find(slot)[0]
        if root not in wanted:
            continue
        if counts is None:
            counts = Counter(each.atom.root for each in cell)
        own = slot.atom.root
        here = {atom: None for atom, count in counts.items() if count == 1 and atom is not own and not atom.size[1]}
        known = beside.get(root)
        beside[root] = here if known is None else {atom: None for atom in known if atom in here}
