"""Rules: match a node, check the conditions, rewrite.

A rule is a function `apply(match, rewriter)` with three declarations: `match(node) -> Match | None` finds its place;
`needs` are conditions without which the rewrite would be wrong; `worth` are those without which it would gain nothing.
A condition is a function `(match, program) -> str`: empty when it holds, else the sentence that says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt.ir.program import Program, is_floating
from graphopt.ir.rewriter import Rewriter


@dataclass(frozen=True)
class Match:
    """A place where a rule fits: `root` is the node it starts from, the rest is by name (nodes and plain values)."""

    root: fx.Node
    parts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def get(self, name: str) -> Any:
        return self.parts.get(name)

    def node(self, name: str) -> fx.Node:
        part = self.parts[name]
        if not isinstance(part, fx.Node):
            raise TypeError(f"{name} of the match at {self.root.name} is no node")
        return part


Condition = Callable[[Match, Program], str]


@dataclass(frozen=True)
class Rule:
    """A rewrite with its declarations; see the module's docstring."""

    name: str
    match: Callable[[fx.Node], Match | None]
    apply: Callable[[Match, Rewriter], None]
    needs: tuple[Condition, ...] = ()
    worth: tuple[Condition, ...] = ()

    def declined(self, match: Match, program: Program) -> str:
        """Return why the rule must not or should not fire at `match`, or an empty string."""
        for condition in (*self.needs, *self.worth):
            if reason := condition(match, program):
                return reason
        return ""


def rule(
    match: Callable[[fx.Node], Match | None], needs: Iterable[Condition] = (), worth: Iterable[Condition] = ()
) -> Callable[[Callable[[Match, Rewriter], None]], Rule]:
    """Turn `apply(match, rewriter)` into a Rule of the same name."""

    def wrap(apply: Callable[[Match, Rewriter], None]) -> Rule:
        return Rule(apply.__name__, match, apply, tuple(needs), tuple(worth))

    return wrap


def apply_rules(rules: Iterable[Rule], rewriter: Rewriter, allowed: Callable[[fx.Node], str] = lambda node: "") -> None:
    """Apply every rule wherever it fits until none does; `allowed` says why a node is out of bounds, or nothing.

    Raises RuntimeError where the rules do not come to an end: a rule must leave behind what it does not match.
    """
    rules = tuple(rules)
    size = len(rewriter.graph.nodes)
    # A rule may carry an operator through the graph a step a sweep, and the next node after it, but not for ever.
    sweeps_left, firings_left = 2 * size + 16, 32 * size + 256
    progress = True
    while progress:
        progress = False
        sweeps_left -= 1
        for node in _live(rewriter.graph):
            for each in rules:
                match = each.match(node)
                if match is None:
                    continue
                rewriter.rule = each.name
                if reason := allowed(node) or each.declined(match, rewriter.program):
                    rewriter.decline(node, reason)
                    continue
                before = len(rewriter.changes.edits)
                each.apply(match, rewriter)
                if len(rewriter.changes.edits) > before:
                    # A dead reader would keep its inputs from having a sole user.
                    rewriter.sweep()
                    progress = True
                    firings_left -= 1
                    if sweeps_left < 0 or firings_left < 0:
                        raise RuntimeError(
                            f"rule {each.name} of {rewriter.author} still fires, now at {node.name}, after many "
                            f"rounds over a graph of {size} nodes: what it leaves behind matches again"
                        )
                    break
    rewriter.rule = ""


def _live(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield calls that somebody reads, while the graph changes under the iteration."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.users and not node._erased:
            yield node


# Conditions -----------------------------------------------------------------------------------------------------------


def constant(*names: str) -> Condition:
    """The named parts are weights (a part that is None is fine)."""

    def check(match: Match, program: Program) -> str:
        for name in names:
            part = match.get(name)
            if isinstance(part, fx.Node) and part.op != "get_attr":
                return f"{name} of {match.root.name} is computed by {part.name}, not a weight"
        return ""

    return check


def floating(*names: str) -> Condition:
    """The named parts are floating-point tensors."""

    def check(match: Match, program: Program) -> str:
        for name in names:
            part = match.get(name)
            if isinstance(part, fx.Node) and not is_floating(part):
                return f"{name} of {match.root.name} ({part.name}) is not a floating-point tensor"
        return ""

    return check


def sole_user(name: str) -> Condition:
    """Nobody but one node reads the named part; otherwise it would be computed twice."""

    def check(match: Match, program: Program) -> str:
        part = match.node(name)
        if len(part.users) > 1:
            others = ", ".join(user.name for user in part.users)
            return f"{part.name} is read by {len(part.users)} nodes ({others})"
        return ""

    return check


def finite(*names: str) -> Condition:
    """The named weights hold no NaN or infinity."""

    def check(match: Match, program: Program) -> str:
        for name in names:
            part = match.get(name)
            if isinstance(part, fx.Node) and part.op == "get_attr" and not bool(program.weight(part).isfinite().all()):
                return f"weight {part.target} holds NaN or infinity"
        return ""

    return check
