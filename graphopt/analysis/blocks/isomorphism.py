"""Which layers compute the same function of other weights, and which node of one is which of the other.

Every node gets a number that stands for the whole expression below it: operator, plain arguments, shapes and dtypes of
weights, the numbers of its inputs (hash-consing, so that equal numbers mean equal expressions). Layers whose ends have
different numbers differ. Equal ones may still share values differently (f(x) * f(x) computed once or twice): walking
both from their ends at once settles it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

from torch import Tensor, fx

from graphopt.ir.arguments import arguments

_SOURCE = ("source",)
_OUTSIDE = ("outside",)


class Expressions:
    """The numbers of expressions; layers are comparable when they are numbered by one table."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def number(self, nodes: Sequence[fx.Node], source: fx.Node, end: fx.Node) -> int:
        """Return the number of `end`, computed by `nodes` (in graph order) from `source` and what lies outside."""
        known: dict[fx.Node, Hashable] = {}

        def name(node: fx.Node) -> Hashable:
            return known[node] if node in known else _outside(node, source)

        for node in nodes:
            key = (node.target, _frozen(arguments(node), name))
            known[node] = self._numbers.setdefault(key, len(self._numbers))
        return self._numbers.setdefault((known[end], len(nodes)), len(self._numbers))


def _outside(node: fx.Node, source: fx.Node) -> Hashable:
    value = node.meta.get("val")
    if node.op == "get_attr" and isinstance(value, Tensor):
        return "weight", tuple(str(size) for size in value.shape), value.dtype
    return _SOURCE if node is source else _OUTSIDE


def _frozen(value: Any, name: Callable[[fx.Node], Hashable]) -> Hashable:
    """Return an argument as something hashable; its type counts, as 1, 1.0 and True are equal to Python."""
    if isinstance(value, fx.Node):
        return "node", name(value)
    if isinstance(value, tuple | list):
        return tuple(_frozen(each, name) for each in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(each, name)) for key, each in value.items())
    return type(value).__name__, repr(value)


def match(
    first: tuple[Collection[fx.Node], fx.Node, fx.Node], second: tuple[Collection[fx.Node], fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node] | None:
    """Return the one-to-one correspondence of two parts of a graph, or None where they are not isomorphic.

    Each is given as its nodes, its source and its end. Weights and what is read from outside correspond as well.
    """
    (nodes, source, end), (others, other_source, other_end) = first, second
    inside, other_inside = set(nodes), set(others)
    forth = {source: other_source, end: other_end}
    back = {other_source: source, other_end: end}
    queue = [(end, other_end)]
    while queue:
        a, b = queue.pop()
        if (a in inside) != (b in other_inside):
            return None
        if a not in inside:
            if _outside(a, source) != _outside(b, other_source):
                return None
            continue
        if a.target != b.target or _shape_of(a) != _shape_of(b):
            return None
        for x, y in zip(a.all_input_nodes, b.all_input_nodes, strict=True):
            if x not in forth and y not in back:
                forth[x], back[y] = y, x
                queue.append((x, y))
            elif forth.get(x) is not y:
                return None
    return forth if inside <= forth.keys() and other_inside <= back.keys() else None


def _shape_of(node: fx.Node) -> Hashable:
    """Return the call's arguments with each node replaced by its place among the nodes read."""
    places = {each: i for i, each in enumerate(node.all_input_nodes)}
    return len(places), _frozen(arguments(node), places.__getitem__)
