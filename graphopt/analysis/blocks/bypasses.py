"""Find where a value goes around some operators and joins their result again.

    join = skip(source) + body(source)         a residual branch; cat for +: a skip by concatenation

For an addition `join` (a tree of them counts as one: x + a(n(x)) + m(n(x))), one term is the skip and the rest the
bodies. The skip is a *path*: from the join back to the source each node reads one activation and is linear in it, with
one contraction at most (a projection). The source is the first node on the way back that also leads to another term by
nodes of which the join is the only way out (it post-dominates them): the two ways part there, and nothing but the join
sees what is between. A body computes something: an operator that mixes elements. So these are no residuals:

    x·cos + rotate(x)·sin       rotate only moves data
    x + 0.044 x³                only pointwise
    q kᵀ + bias                 the bias comes from elsewhere, or leads to other scores as well
    W x + V x                   which is the skip? one linear map
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from graphopt.analysis.blocks.flow import Flow, is_contraction, is_linear, mixes
from graphopt.ir.arguments import operator


@dataclass(frozen=True, eq=False)
class Bypass:
    """One body with its join, source, skip and ends, as numbers of the flow; `body` as nodes, in graph order."""

    join: int
    source: int
    skip: tuple[int, ...]
    body: tuple[fx.Node, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class _Way:
    """A term of a join as the skip: the way back to a source, and the other terms that the source leads to."""

    source: int
    path: tuple[int, ...]
    contractions: int
    region: set[int]
    others: tuple[int, ...]


def find_bypasses(flow: Flow) -> list[Bypass]:
    """Return all bypasses, joins in graph order."""
    return _Search(flow).run()


class _Search:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.found: list[Bypass] = []
        self.joins: set[int] = set()
        self.back: dict[int, tuple[int, ...]] = {}  # residual join -> the term that is its skip, and additions up to it

    def run(self) -> list[Bypass]:
        for join, node in enumerate(self.flow.nodes):
            if operator(node) in ("add", "cat") and len(self.flow.inputs[join]) > 1:
                self._try(join, operator(node))
        return self.found

    def _try(self, join: int, kind: str) -> None:
        terms = self._terms(join) if kind == "add" else dict.fromkeys(self.flow.inputs[join], ())
        ways: dict[int, _Way] = {}
        for term, sums in terms.items():
            way = self._way(join, term, sums, [other for other in terms if other != term])
            if way is not None:
                ways[term] = way
        if not ways:
            return
        fewest = min(way.contractions for way in ways.values())
        best = [term for term, way in ways.items() if way.contractions == fewest]
        if len(best) > 1 and (kind == "add" or fewest):
            return
        skip = min(best, key=lambda term: ways[term].source)  # of parts concatenated, the one that goes furthest
        way = ways[skip]
        if kind == "add":
            for ends in self._parallel(way):
                self._add(join, way, ends)
            self.back[join] = (*terms[skip], skip)
        else:
            self._add(join, way, way.others)
        self.joins.add(join)

    def _terms(self, join: int) -> dict[int, tuple[int, ...]]:
        """Return the terms of a sum and, for each, the additions between it and `join`, from the join back.

        Additions that nobody else reads are part of the sum, unless they are residual joins of their own.
        """
        terms: dict[int, tuple[int, ...]] = {}
        queue: list[tuple[int, tuple[int, ...]]] = [(join, ())]
        while queue:
            node, sums = queue.pop()
            for v in self.flow.inputs[node]:
                if self._is_inner_sum(v):
                    queue.append((v, (*sums, v)))
                else:
                    terms.setdefault(v, sums)
        return terms

    def _is_inner_sum(self, v: int) -> bool:
        flow = self.flow
        is_sum = operator(flow.nodes[v]) == "add" and len(flow.inputs[v]) > 1
        return is_sum and len(flow.readers[v]) == 1 and v not in self.joins

    def _way(self, join: int, term: int, sums: tuple[int, ...], others: list[int]) -> _Way | None:
        """Walk back from the join over `term` to the node that also leads to one of the other terms."""
        flow, node, path, contractions = self.flow, term, list(sums), 0
        while True:
            if len(flow.onward[node]) > 1:
                region = flow.between(node, join)
                if met := tuple(other for other in others if other in region):
                    body = flow.leading_to(met, region)
                    if body.isdisjoint(path) and any(mixes(flow.nodes[v]) for v in body):
                        return _Way(node, tuple(path), contractions, region, met)
                    return None
            if node in self.back and len(flow.readers[node]) == 1:  # x + a(x), to which m(x) is added
                path.append(node)
                *between, node = self.back[node]
                path += between
                continue
            contractions += is_contraction(flow.nodes[node])
            if len(flow.inputs[node]) != 1 or not is_linear(flow.nodes[node]) or contractions > 1:
                return None
            path.append(node)
            node = flow.inputs[node][0]

    def _parallel(self, way: _Way) -> list[tuple[int, ...]]:
        """Return the terms as branches of their own where they share no contraction, else as the ends of one."""
        bodies = {end: self.flow.leading_to([end], way.region) for end in way.others}
        working = {end: body for end, body in bodies.items() if any(mixes(self.flow.nodes[v]) for v in body)}
        seen: set[int] = set()
        for body in working.values():
            products = {v for v in body if is_contraction(self.flow.nodes[v])}
            if products & seen:
                return [way.others]
            seen |= products
        return [(end,) for end in working]

    def _add(self, join: int, way: _Way, ends: tuple[int, ...]) -> None:
        flow = self.flow
        nodes = {flow.nodes[v] for v in flow.leading_to(ends, way.region)}
        support = supporting(nodes, {flow.nodes[v] for v in (*self.joins, way.source, *way.path)})
        body = tuple(sorted(nodes | support, key=flow.order.__getitem__))
        self.found.append(Bypass(join, way.source, tuple(reversed(way.path)), body, ends))


def supporting(nodes: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Return the calls that serve `nodes` alone though no activation reaches them from the source.

    Projections of another sequence for attention, a reshaped mask: single-reader calls (a tuple's parts may be many)
    back to what is shared, an input, or a node of `stop`.
    """
    inside = set(nodes)
    found: set[fx.Node] = set()
    queue = list(inside)
    while queue:
        for each in queue.pop().all_input_nodes:
            if each.op != "call_function" or each in inside or each in stop:
                continue
            alone = len(each.users) == 1 or isinstance(each.meta.get("val"), tuple | list)
            if alone and all(user in inside for user in each.users):
                inside.add(each)
                found.add(each)
                queue.append(each)
    return found
