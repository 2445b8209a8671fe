"""Which spaces can lose coordinates, and who reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.analysis.blocks import find_blocks
from graphopt.analysis.cost import node_macs, shape_of
from graphopt.analysis.spaces import Analysis, Read, Space, Widths
from graphopt.analysis.spaces.axes import axis_size, leaves
from graphopt.ir import Program, arguments, operator
from graphopt.passes.prune.deletion import Deletion, Undeletable
from graphopt.passes.prune.refit import fittable
from graphopt.quantization.matrices import to_matrix

_READERS = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear or a convolution that contracts a space by its weight.

    Attributes:
        site: the call.
        labels: int64 [P, K], which coordinate (fibre after fibre) each input of its matrix holds; -1: none.
        fitted: whether it can be fitted anew: the weight, and the bias, are its own.
    """

    site: fx.Node
    labels: Tensor
    fitted: bool


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two activations that contracts a space: q k^T of an attention.

    Attributes:
        site: the call. left, right: what it multiplies, [..., T, E] and [..., S, E], or [..., E, S] if `flipped`.
        labels: int64 [..., E], which coordinate each place of the left one holds, over all but T; -1: none.
    """

    site: fx.Node
    left: fx.Node
    right: fx.Node
    flipped: bool
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Candidate:
    """A space that can lose coordinates.

    Attributes:
        space: which.
        readers: who contracts it by weights. products: who contracts it with another activation.
        stream: whether it is a residual stream, which every block reads.
    """

    space: Space
    readers: tuple[Reader, ...]
    products: tuple[Product, ...]
    stream: bool

    @property
    def coordinates(self) -> int:
        """How many there are, of all fibres together."""
        return self.space.size * self.fibres

    @property
    def fibres(self) -> int:
        return math.prod(self.space.fibres)

    @property
    def where(self) -> fx.Node:
        """A weight that holds it, for records."""
        return next((m.node for m in self.space.members if "writes" in m.role), self.space.members[0].node)


def find_candidates(
    program: Program, analysis: Analysis, decline: Callable[[Space, str], None]
) -> list[Candidate]:
    """Return the spaces that can lose coordinates; `decline` hears of each other that a user might think of."""
    streams = _streams(program, analysis)
    found = []
    for space in analysis.under("permutation"):
        if space.size < 2 or not any("writes" in member.role for member in space.members):
            continue
        if reason := _refusal(analysis, space):
            decline(space, reason)
            continue
        weights = [read for read in space.reads if _reads_by_weight(program, read.node, read.partner)]
        sites = dict.fromkeys(read.node for read in weights)
        readers = tuple(Reader(site, _labels(space, site), fittable(program, site)) for site in sites)
        others = [read for read in space.reads if read not in weights]
        products = tuple(made for read in others if (made := _product(space, read)) is not None)
        known = {each.site for each in products}
        if unknown := [read.node for read in others if read.node not in known]:
            decline(space, f"{space.name} is contracted by {unknown[0].name}, of whose error nothing is known")
        elif not readers and not products:
            decline(space, f"{space.name} has no reader that tells what its coordinates are worth")
        else:
            found.append(Candidate(space, readers, products, space.atom in streams))
    return found


def _refusal(analysis: Analysis, space: Space) -> str:
    if space.pins:
        return f"{space.name} cannot lose coordinates: {space.pins[0]}"
    if space.counted:
        return f"{space.name} cannot lose coordinates: {space.counted[0]}"
    try:
        Deletion(analysis, {space: torch.arange(space.size - 1)})
    except Undeletable as error:
        return f"{space.name} cannot lose coordinates: {error}"
    return ""


def _product(space: Space, read: Read) -> Product | None:
    """Return what a read is for the operand that comes first; None for another, or an operator that is not known."""
    named = arguments(read.node)
    if operator(read.node) == "scaled_dot_product_attention":
        left, right, flipped = named["query"], named["key"], False
    elif operator(read.node) in ("matmul", "bmm"):
        left, right, flipped = named["self"], named.get("mat2", named.get("other")), True
    else:
        return None
    dims, shape = read.dims, shape_of(left)
    if read.source is not left or len(shape) - 1 not in dims or len(shape) - 2 in dims:
        return None
    labels = torch.full([shape[dim] for dim in dims], -1)
    numbers = torch.arange(space.size * math.prod(space.fibres)).reshape(*space.fibres, space.size)
    for view in space.read_views(read, labels):
        view.copy_(numbers.expand(view.shape))
    places = sorted(range(len(dims)), key=lambda place: dims[place])
    sizes = [size if dim in dims else 1 for dim, size in enumerate(shape)]
    return Product(read.node, left, right, flipped, labels.permute(places).reshape(sizes).squeeze(-2))


def _streams(program: Program, analysis: Analysis) -> set[object]:
    """Return the atoms on the axes of values where residual branches join."""
    found: set[object] = set()
    for branch in find_blocks(program).branches:
        axes = analysis.axes(branch.join)
        if isinstance(axes, list):
            found |= {slot.atom.root for axis in axes for slot in leaves(axis)}
    return found


def _reads_by_weight(program: Program, site: fx.Node, partner: fx.Node) -> bool:
    return operator(site) in _READERS and partner.op == "get_attr" and arguments(site)["weight"] is partner


def _labels(space: Space, site: fx.Node) -> Tensor:
    """Return the coordinate of every input of a reader's matrix [P, K]."""
    weight = arguments(site)["weight"]
    shape = shape_of(weight)
    labels = torch.full(shape, -1)
    numbers = torch.arange(space.size * math.prod(space.fibres)).reshape(*space.fibres, space.size)
    for member in space.members:
        if member.node is weight and "reads" in member.role:
            for view in space.views(member, labels):
                view.copy_(numbers.expand(view.shape))
    return to_matrix(labels, site)[:, :, 0]


class Costs:
    """Multiply-accumulates and parameters of a program whose spaces lose coordinates, counted without rewriting it."""

    def __init__(self, program: Program, analysis: Analysis) -> None:
        self._analysis = analysis
        self._products = [
            node for node in program.graph.nodes if node.op == "call_function" and node_macs(node)
        ]
        read = [node for node in program.graph.nodes if node.op == "get_attr" and node.users]
        self._weights = {str(node.target): node for node in read}

    def macs(self, widths: Mapping[Space, int]) -> int:
        shape = self.shape(widths)
        return sum(node_macs(node, shape) for node in self._products)

    def parameters(self, widths: Mapping[Space, int]) -> int:
        shape = self.shape(widths)
        return sum(math.prod(shape(node)) for node in self._weights.values())

    def shape(self, given: Mapping[Space, int]) -> Callable[[fx.Node], list[int]]:
        """Return what gives the sizes of a node for these widths."""
        widths = Widths(given)

        def shape(node: fx.Node) -> list[int]:
            sizes, axes = shape_of(node), self._analysis.axes(node)
            if not isinstance(axes, list) or len(axes) != len(sizes):
                return sizes
            # A symbolic factor is what the example had of it.
            return [
                size * widths.size(axis)[0] // max(axis_size(axis)[0], 1) if widths.touches(axis) else size
                for size, axis in zip(sizes, axes, strict=True)
            ]

        return shape
