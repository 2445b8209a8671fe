"""Spaces: the coordinates that one change must reach everywhere, and how their weights change with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces.axes import Atom, Axis, Slot, axis_size, parts_of, written
from graphopt.analysis.spaces.relation import Reason
from graphopt.analysis.spaces.symmetry import Symmetry, apply


@dataclass(frozen=True)
class Member:
    """An axis of a weight that lies in a space, wholly or in part.

    Attributes:
        weight: the tensor's name. axis: which of its axes. node: who reads it from the program.
        role: what operators do with it: writes, reads, scale, bias, table, mean, variance; several joined by a comma.
        dual: whether it undergoes the inverse transpose of the space's change.
        slots: where in it the space lies. whole: all of it.
        layout: the axis as it is composed, slowest first, the space itself in brackets: `2 x 3 x [8]`.
    """

    weight: str
    axis: int
    role: str
    dual: bool
    node: fx.Node = field(compare=False, repr=False)
    slots: tuple[Slot, ...] = field(compare=False, repr=False)
    whole: Axis = field(compare=False, repr=False)

    @property
    def layout(self) -> str:
        return _layout(self.whole, self.slots)

    def __str__(self) -> str:
        return f"{self.weight}[{self.axis}] {self.role or 'used'}{' (dual)' if self.dual else ''}: {self.layout}"


@dataclass(frozen=True)
class Read:
    """An operator that contracts a space of an activation.

    Attributes:
        node: the operator. source: the activation. partner: what it is multiplied by.
        dims: the dimensions of the activation on which the space and its siblings lie.
        dual: whether the activation undergoes the inverse transpose of the space's change.
    """

    node: fx.Node
    source: fx.Node
    partner: fx.Node
    dims: tuple[int, ...]
    dual: bool
    axes: tuple[Axis, ...] = field(compare=False, repr=False)
    slots: tuple[Slot, ...] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Space:
    """Coordinates that change together.

    Attributes:
        name: after the first weight that writes them.
        size: how many there are.
        members: the weight axes that hold them.
        symmetries: the changes that leave the function as it is. Of a space of permutations these are all those under
            which at least a part of its members is free.
        pins: why it cannot change under the symmetry asked for; empty where it can.
        symmetry: whose ties formed it.
        counted: why none of the coordinates can be deleted though they can be reordered; asked of permutations alone.
        siblings: names and sizes of the atoms on whose index the change may depend (one matrix per head), in the order
            of the leading axes of `T`.
        norms: the norms that take their statistic over it. norms_before: those whose output lies in it, changed by an
            affine or a mean that they take away.
        reads: the operators that contract it, with the activations in which they find it.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    symmetries: frozenset[str]
    pins: tuple[Reason, ...]
    symmetry: Symmetry
    counted: tuple[Reason, ...] = ()
    siblings: tuple[tuple[str, int], ...] = ()
    norms: tuple[fx.Node, ...] = field(default=(), compare=False, repr=False)
    norms_before: tuple[fx.Node, ...] = field(default=(), compare=False, repr=False)
    reads: tuple[Read, ...] = field(default=(), compare=False, repr=False)
    _axes: Mapping[fx.Node, list[Axis]] = field(default_factory=dict, compare=False, repr=False)
    _sibling_atoms: tuple[Atom, ...] = field(default=(), compare=False, repr=False)

    @property
    def free(self) -> bool:
        return not self.pins

    @property
    def atom(self) -> Atom:
        """The atom of a space of permutations: its coordinates, wherever they occur."""
        return self.members[0].slots[0].atom.root

    @property
    def sibling_atoms(self) -> tuple[Atom, ...]:
        """The atoms on whose index a change may depend, in the order of `siblings`."""
        return self._sibling_atoms

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a change: sibling sizes, then the size, twice where the change is a matrix."""
        return (*self.fibres, *[self.size] * (2 if self.symmetry in (Symmetry.ORTHOGONAL, Symmetry.GENERAL) else 1))

    @property
    def fibres(self) -> tuple[int, ...]:
        """The sizes of the siblings."""
        return tuple(size for _, size in self.siblings)

    def transform(self, change: Tensor | None, value: Callable[[fx.Node], Tensor] | None = None) -> dict[str, Tensor]:
        """Return the rewritten weights by name, in float64.

        Args:
            change: T of shape `shape`, or of its last axes to change every fibre alike. x becomes T x in what the
                space's own members hold and T^-T x in its dual ones; see `symmetry.apply`. None for CENTER.
            value: gives the present value of a weight; default: what the program holds.

        Raises ValueError where the space is pinned or the change has another shape.
        """
        nodes = {str(member.node.target): member.node for member in self.members}
        read = stored if value is None else value
        return {name: self.changed(node, read(node), change) for name, node in nodes.items()}

    def changed(self, node: fx.Node, value: Tensor, change: Tensor | None) -> Tensor:
        """Return what a weight of the space becomes, in float64; arguments and errors are those of `transform`."""
        change = self.checked(change)
        after = value.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        for member in self.members:
            if member.node is node:
                for view in blocks(after, self._axes[node], member.slots, self._sibling_atoms):
                    view.copy_(apply(self.symmetry, change, view, member.dual))
        return after

    def gather(self, member: Member, value: Tensor | None = None) -> Tensor:
        """Return the elements of a member [rest, *fibres, size]: what stands at each coordinate, over all else.

        `value` replaces what the program holds; it has the weight's shape.
        """
        value = stored(member.node) if value is None else value
        return self._stacked(self.views(member, value.detach().contiguous()))

    def views(self, member: Member, value: Tensor) -> Iterator[Tensor]:
        """Yield views [..., *fibres, size] of a contiguous tensor of the weight's shape: a write goes to `value`."""
        return blocks(value, self._axes[member.node], member.slots, self._sibling_atoms)

    def gather_read(self, read: Read, value: Tensor) -> Tensor:
        """Return what stands at each coordinate [rest, *fibres, size] of an activation.

        `value` [..., *sizes of read.dims] has the dimensions on which the space lies last.
        """
        return self._stacked(self.read_views(read, value.detach().contiguous()))

    def read_views(self, read: Read, value: Tensor) -> Iterator[Tensor]:
        """Yield views [..., *fibres, size] of a contiguous tensor [..., *sizes of read.dims]: writes go to `value`."""
        return blocks(value, read.axes, read.slots, self._sibling_atoms)

    def transform_read(self, read: Read, value: Tensor, change: Tensor | None) -> Tensor:
        """Return what an activation [..., *sizes of read.dims] becomes when the space changes, in float64."""
        change = self.checked(change)
        after = value.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        for view in self.read_views(read, after):
            view.copy_(apply(self.symmetry, change, view, read.dual))
        return after

    def _stacked(self, views: Iterator[Tensor]) -> Tensor:
        return torch.cat([view.reshape(-1, *self.fibres, self.size) for view in views])

    def checked(self, change: Tensor | None) -> Tensor | None:
        """Return a change in the shape `shape`; ValueError where the space is pinned or it has another one."""
        if self.pins:
            raise ValueError(f"{self.name} cannot change: {self.pins[0]}")
        if change is None:
            return None
        shape = self.shape
        if change.dim() < len(shape) and change.shape == shape[len(self.siblings) :]:
            change = change.expand(shape)
        if tuple(change.shape) != shape:
            raise ValueError(f"{self.name} takes a change of shape {list(shape)}, not {list(change.shape)}")
        return change if self.symmetry is Symmetry.PERMUTATION else change.to(torch.float64)

    def __str__(self) -> str:
        head = f"{self.name}: {self.size} coordinates, {len(self.members)} members"
        head += f"; {', '.join(sorted(self.symmetries)) or 'no change is free'}"
        if self.siblings:
            head += f"; one change for each of {' x '.join(str(size) for size in self.fibres)}"
        return "\n".join([head, *(f"  {each}" for each in self.members), *(f"  pinned: {each}" for each in self.pins)])


def _layout(axis: Axis, own: Sequence[Slot]) -> str:
    texts = []
    for slot in written(axis):
        if slot.atom.root.parts is not None:
            parts = " + ".join(_layout(part, own) or "1" for part in parts_of(slot))
            texts.append(f"({parts})")
        else:
            text = "*".join([str(slot.atom.root.size[0]), *slot.atom.root.size[1]])
            texts.append(f"[{text}]" if any(slot is each for each in own) else text)
    return " x ".join(texts)


def stored(node: fx.Node) -> Tensor:
    """Return the weight that a get_attr node reads."""
    value: object = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def blocks(
    values: Tensor, axes: Sequence[Axis], slots: Sequence[Slot], siblings: Sequence[Atom]
) -> Iterator[Tensor]:
    """Yield views [..., *siblings, n] of a contiguous tensor, one for each occurrence of a slot in its last axes.

    Axes that are sums are cut into their parts, and each part into its product.
    """
    lead = values.dim() - len(axes)
    dims: list[Slot | None] = [None] * lead
    for axis in axes:
        dims += written(axis) or [None]
    sizes = [1 if slot is None else slot.atom.root.size[0] for slot in dims[lead:]]
    view = values.view([*values.shape[:lead], *sizes])
    yield from _blocks(view, dims, set(slots), siblings)


def _blocks(view: Tensor, dims: list[Slot | None], slots: set[Slot], siblings: Sequence[Atom]) -> Iterator[Tensor]:
    for index, slot in enumerate(dims):
        if slot is None or slot.atom.root.parts is None:
            continue
        start = 0
        for part in parts_of(slot):
            size = axis_size(part)[0]
            inner: list[Slot | None] = list(written(part)) or [None]
            sizes = [1 if each is None else each.atom.root.size[0] for each in inner]
            shape = [*view.shape[:index], *sizes, *view.shape[index + 1 :]]
            block = view.narrow(index, start, size).view(shape)
            yield from _blocks(block, [*dims[:index], *inner, *dims[index + 1 :]], slots, siblings)
            start += size
        return
    roots = [None if slot is None else slot.atom.root for slot in dims]
    for index, slot in enumerate(dims):
        if slot in slots:
            source = [*(roots.index(atom.root) for atom in siblings), index]
            yield view.movedim(source, list(range(-len(source), 0)))
