"""What the operators of a program say about its axes, collected in one walk over the graph.

A rule (`rules/`) gives the axes of an operator's outputs, made of the slots of its inputs where data only moves, and
records what the operator demands:

    tie      two axes undergo the same change (dual: T and its inverse transpose), under the symmetries of a mask
    pin      an axis undergoes none, with the reason a user reads
    product  out = a * b elementwise: a scale passes through one factor once the other is pinned
    absorb   a weight vector stands between two axes and takes a scale of either
    norm     a norm takes its statistic over an axis, and may remove the mean itself
    read     an operator contracts an axis of an activation
    mix      an operator combines the coordinates of some axes while others ride along unchanged
    count    an operator depends on how many coordinates there are: none can be deleted

Demands hold for whole axes; `relation` spreads them over the leaf slots that the axes have in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx

from graphopt.analysis.spaces.axes import Axis, Size, align, atoms_of, fresh, size_of
from graphopt.analysis.spaces.symmetry import ALL, LINEAR, SCALES
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.program import Program

Axes = list[Axis]
Outputs = Axes | tuple[Axes, ...]  # of a tensor, or of each tensor of a tuple


class Tie(NamedTuple):
    mask: int
    a: Axis
    b: Axis
    dual: bool
    node: fx.Node


class Pin(NamedTuple):
    mask: int
    axis: Axis
    node: fx.Node
    reason: str


class Product(NamedTuple):
    mask: int
    a: Axis
    b: Axis
    out: Axis
    node: fx.Node


class Absorb(NamedTuple):
    mask: int
    weight: fx.Node
    dim: int
    axis: Axis
    x: Axis
    out: Axis
    node: fx.Node


class Norm(NamedTuple):
    node: fx.Node
    x: Axis
    out: Axis
    centers: bool


class Contraction(NamedTuple):
    node: fx.Node
    source: fx.Node
    partner: fx.Node
    axis: Axis


class Mix(NamedTuple):
    mixed: tuple[Axis, ...]
    riding: tuple[Axis, ...]


@dataclass
class Flow:
    """The axes of every value and the demands on them; filled by `trace`.

    Attributes:
        axes: per node the axes of its tensor, or a tuple of those of each tensor it returns.
        roles: what operators do with axes of weights: reads, writes, scale, bias, table, mean, variance.
    """

    program: Program
    axes: dict[fx.Node, Outputs] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    absorbs: list[Absorb] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    reads: list[Contraction] = field(default_factory=list)
    mixes: list[Mix] = field(default_factory=list)
    counts: list[Pin] = field(default_factory=list)
    roles: list[tuple[Axis, str]] = field(default_factory=list)
    node: fx.Node = field(init=False)

    def of(self, value: object) -> Axes:
        """Return the axes of a tensor operand; a number has none."""
        found = self.axes.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, list) else []

    def tie(self, a: Axis, b: Axis, mask: int = ALL, dual: bool = False) -> bool:
        """Make two axes correspond by index and undergo the same change under `mask`."""
        if not a or not b or (a is b and not dual):
            return True
        if not align(atoms_of(a), atoms_of(b)):
            self.pin(a, "matches axes that are split in ways that do not fit each other")
            self.pin(b, "matches axes that are split in ways that do not fit each other")
            return False
        self.ties.append(Tie(mask, a, b, dual, self.node))
        return True

    def pin(self, axis: Axis, reason: str, mask: int = ALL) -> None:
        """Let an axis undergo no change under `mask`; the reason completes "<node> ..."."""
        if axis:
            self.pins.append(Pin(mask, axis, self.node, reason))

    def pin_all(self, axes: Sequence[Axis], reason: str, mask: int = ALL) -> None:
        for axis in axes:
            self.pin(axis, reason, mask)

    def count(self, axis: Axis, reason: str) -> None:
        """Let no coordinate of an axis be deleted, though they may be reordered; the reason completes "<node> ..."."""
        if axis:
            self.counts.append(Pin(0, axis, self.node, reason))

    def norm(self, x: Axis, out: Axis, centers: bool) -> None:
        """Say that the node takes the statistic of a norm over an axis, and whether it removes the mean itself."""
        self.norms.append(Norm(self.node, x, out, centers))

    def read(self, value: object, partner: object, axis: Axis) -> None:
        """Say that the node multiplies an axis of an activation by `partner` and sums over it."""
        if isinstance(value, fx.Node) and isinstance(partner, fx.Node) and value.op != "get_attr":
            self.reads.append(Contraction(self.node, value, partner, axis))

    def mix(self, mixed: Sequence[Axis], riding: Sequence[Axis]) -> None:
        mixed, riding = [axis for axis in mixed if axis], [axis for axis in riding if axis]
        if mixed and riding:
            self.mixes.append(Mix(tuple(mixed), tuple(riding)))

    def product(self, a: Axis, b: Axis, out: Axis) -> None:
        """Say that `out` is the elementwise product: under SIGN and DIAGONAL its change is that of both together."""
        self.products.append(Product(SCALES, a, b, out, self.node))

    def absorb(self, place: tuple[fx.Node, int], vector: Axis, x: Axis, out: Axis) -> None:
        """Say that a weight vector multiplies `x` to give `out`, and may change to keep both as they are wanted."""
        self.pin(vector, "stands between two axes", LINEAR)
        self.absorbs.append(Absorb(SCALES, *place, vector, x, out, self.node))

    def pinned(self, size: int | torch.SymInt, reason: str, mask: int = ALL) -> Axis:
        """Return a new axis that undergoes no change."""
        axis = fresh(size_of(size))
        self.pin(axis, reason, mask)
        return axis

    def role(self, value: object, dim: int, role: str) -> None:
        """Say what an operator does with an axis of a weight, moved or not; other values are passed over."""
        source = value
        while isinstance(source, fx.Node) and operator(source) in _MOVES:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            self.roles.append((self.of(value)[dim], role))

    def weight_axis(self, value: object, axis: Axis) -> tuple[fx.Node, int] | None:
        """Return the weight and dimension that `axis` of a value is, where that value alone is computed of it."""
        while isinstance(value, fx.Node) and len(value.users) == 1:
            if value.op == "get_attr":
                for dim, own in enumerate(self.of(value)):
                    if own and len(own) == len(axis) and all(a is b for a, b in zip(own, axis, strict=True)):
                        return value, dim
                return None
            if operator(value) not in _RESHAPES:
                return None
            value = value.args[0]
        return None


_RESHAPES = frozenset(("reshape", "view", "unsqueeze", "squeeze", "permute", "transpose", "t", "alias", "clone"))
_MOVES = _RESHAPES | {"index", "index_select", "select", "slice", "expand", "getitem", "split", "chunk", "_to_copy"}

Rule = Callable[[Flow, fx.Node, dict[str, Any]], Outputs]
Entered = TypeVar("Entered", bound=Rule)
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Entered], Entered]:
    """Enter a rule into the table under the names of its operators."""

    def enter(function: Entered) -> Entered:
        for name in names:
            assert name not in RULES, f"{name} has a rule"
            RULES[name] = function
        return function

    return enter


def shape_of(node: object) -> list[int | torch.SymInt]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return list(value.shape) if isinstance(value, Tensor) else []


def sizes_of(node: object) -> list[Size]:
    return [size_of(size) for size in shape_of(node)]


def trace(program: Program) -> Flow:
    """Walk over the graph once and return what its operators say."""
    flow = Flow(program)
    for node in program.graph.nodes:
        flow.node = node
        if node.op == "output":
            for value in program.outputs:
                flow.pin_all(flow.of(value), "is where the model returns it")
        elif node.op == "get_attr" and node.users:
            axes = [fresh(size_of(size)) for size in node.meta["val"].shape]
            flow.axes[node] = axes
            if not node.meta["val"].is_floating_point():
                flow.pin_all(axes, "holds indices or flags")
        elif node.op == "placeholder":
            flow.axes[node] = [flow.pinned(size, "is an input of the model") for size in shape_of(node)]
        elif operator(node) == "getitem":
            outputs = flow.axes.get(node.args[0])
            index = node.args[1]
            if isinstance(outputs, tuple) and isinstance(index, int) and index < len(outputs):
                flow.axes[node] = outputs[index]
        elif node.op == "call_function":
            _apply(flow, node)
    return flow


def _apply(flow: Flow, node: fx.Node) -> None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor | tuple | list):
        return  # arithmetic on sizes
    known, named = RULES.get(operator(node), unknown), arguments(node)
    outputs: Outputs | None = None
    # An overload that a rule was not written for lacks arguments, or returns several tensors instead of one.
    with suppress(LookupError):
        outputs = known(flow, node, named)
    flow.axes[node] = outputs if outputs is not None and _fits(outputs, value) else unknown(flow, node, named)


def _fits(outputs: Outputs, value: Tensor | Sequence[object]) -> bool:
    """True where there is an axis for each of a tensor, or of each tensor of a tuple."""
    if isinstance(value, Tensor):
        return isinstance(outputs, list) and len(outputs) == value.dim()
    return isinstance(outputs, tuple) and len(outputs) == len(value)


def unknown(flow: Flow, node: fx.Node, named: dict[str, Any]) -> Outputs:
    """Pin everything an operator touches: nothing is known of it."""
    form = "in a form that its rule does not know" if operator(node) in RULES else "which the analysis does not know"
    reason = f"is {operator(node) or node.target}, {form}"
    for source in node.all_input_nodes:
        outputs = flow.axes.get(source, [])
        for axes in outputs if isinstance(outputs, tuple) else [outputs]:
            flow.pin_all(axes, reason)
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return [flow.pinned(size, reason) for size in value.shape]
    return tuple(
        [flow.pinned(size, reason) for size in each.shape] if isinstance(each, Tensor) else [] for each in value or ()
    )


def broadcast(flow: Flow, node: fx.Node, operands: Sequence[object]) -> list[list[tuple[object, Axis]]]:
    """Return for each axis of the output the operands that have it, with their axis."""
    rank = len(shape_of(node))
    holders: list[list[tuple[object, Axis]]] = [[] for _ in range(rank)]
    for operand in operands:
        axes = flow.of(operand)
        for axis, holder in zip(axes, holders[rank - len(axes) :], strict=True):
            if axis:
                holder.append((operand, axis))
    return holders
